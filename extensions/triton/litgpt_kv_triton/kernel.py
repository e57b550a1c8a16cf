"""The kernel "triton": one pass over keys and values for a decode step, and the attention that a prompt's tokens
received.

B rows · H query heads · G key/value heads · P sets of slots (G, or pools of heads) · M query heads of a set ·
T tokens · N keys · D, Dv widths of a key and a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from litgpt_kv import register
from litgpt_kv.attention import causal
from litgpt_kv.attention.kernels import Eager
from litgpt_kv_triton import columns
from litgpt_kv_triton.decode import decode_attention
from litgpt_kv_triton.stored import is_readable, stored

DEVICES = {"cuda"}
"""Where the kernel is used. The tests add "cpu", for Triton's interpreter."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AUTO = 0
"""Parts that slots are cut into: as many as keep the device busy."""


@register("kernel", "triton")
class Triton:
    """Read keys and values once, dequantise them in registers, and return the attention that slots received.

    It reads the storages plain, int8, int4, int4-hadamard, k8v4 and float8. The reference, "eager", does the rest:
    blocks of several tokens, latent attention, float64, training through a cache, and int4-hadamard with keys that are
    stored unrotated.
    """

    def supports(self, keys: Any, values: Any, device: torch.device) -> bool:
        return device.type in DEVICES and is_readable(keys) and is_readable(values)

    def attend(
        self, q: Tensor, keys: Any, values: Any, view: Any, want: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        spec, angles = view.spec, view.key_angles
        if q.size(2) > 1 or spec.latent or q.dtype not in DTYPES or (torch.is_grad_enabled() and q.requires_grad):
            return Eager().attend(q, keys, values, view, want)
        k, v = stored(keys), stored(values)
        if angles is not None and (k.turn is not None or spec.rope_size < 2):
            return Eager().attend(q, keys, values, view, want)
        B, H, _, D = q.shape
        P = k.data.size(1)
        near_q, near = view.sink_queries or (None, None)
        q, near_q = (None if x is None else _turned(x.reshape(B, P, H // P, D), k.turn) for x in (q, near_q))
        cos, sin = (None, None) if angles is None else (x if x.dim() == 4 else x.unsqueeze(1) for x in angles)
        y, mass = decode_attention(
            q, k.data, k.scale, k.zero, k.kind, k.group,
            v.data, v.scale, v.zero, v.kind, v.group, v.width,
            view.extent, view.mask, cos, sin, near_q, near,
            spec.scale, spec.softcap or 0.0, view.per_group, bool(want), AUTO,
        )  # fmt: skip
        return _turned(y, v.turn).view(B, H, 1, -1), dict.fromkeys(want, mass)

    def received_attention(self, q: Tensor, k: Tensor, length: Tensor, last: int = -1, **facts: Any) -> Tensor:
        """What a prompt's tokens received, (B, G, N); see `columns.received_attention`."""
        sums = columns if q.dtype in DTYPES else causal
        return sums.received_attention(q, k, length, last, **facts)


def _turned(x: Tensor, turn: Tensor | None) -> Tensor:
    """x (..., D) times a matrix (D, D): queries meet codes, and sums of codes become values, by the same one."""
    return x if turn is None else (x.to(turn.dtype) @ turn).to(x.dtype)
