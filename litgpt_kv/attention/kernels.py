"""Decode attention as a registered kind: a kernel reads two storages and attends.

B rows · T new tokens · H query heads · G key/value heads · S slots · D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from litgpt_kv import registry
from litgpt_kv.attention.eager import Rows, product_attention, slot_attention
from litgpt_kv.attention.integer import has_fast_products
from litgpt_kv.attention.rope import rotate


class Readable(Protocol):
    """What a kernel needs of a storage: `read`, and whatever a special kernel knows of a special storage."""

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots, (B, G, extent, D)."""


class Kernel(Protocol):
    """Decode attention. Register a class with `register("kernel", name)`; it is made without arguments.

    A kernel that says it supports a layer is used there without being asked for, unless the user names another one.
    If it has a method `received_attention`, with the arguments of the function in `litgpt_kv.attention.causal`, that is
    asked what a prompt's tokens received.
    """

    def supports(self, keys: Readable, values: Readable, device: torch.device) -> bool:
        """Say whether this kernel can read these storages on this device."""

    def attend(
        self, q: Tensor, keys: Readable, values: Readable, view: Any, want: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend to the slots.

        Args:
            q: (B, H, T, D) rotated queries.
            keys, values: Storages of (B, G, S, D) and (B, G, S, Dv).
            view: The step's `DecodeView`: `extent` (slots to read), `mask`, `key_angles` (for keys that are stored
                unrotated), `sink_queries`, `per_group`, and `spec` with scale and softcap; see `slot_attention`.
            want: Statistics of the slots to return: "mass", "last".

        Returns:
            (B, H, T, Dv), and the statistics by name, (B, G, S) float32.
        """


@registry.register("kernel", "eager")
class Eager:
    """Read the slots, then multiply. Works everywhere; other kernels are compared with it."""

    def supports(self, keys: Readable, values: Readable, device: torch.device) -> bool:
        return True

    def attend(
        self, q: Tensor, keys: Readable, values: Readable, view: Any, want: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        spec, k, v = view.spec, keys.read(view.extent), values.read(view.extent)
        if k.dtype != q.dtype:
            k = k.to(q.dtype)
        if v.dtype != q.dtype:
            v = v.to(q.dtype)
        if view.key_angles is not None:
            k = rotate(k, view.key_angles, spec.rope_size)
        if view.value_padding:  # a column of ones, which meets what a bias adds to the scores
            v = torch.nn.functional.pad(v, (0, 1), value=1.0)
        return slot_attention(
            q,
            k,
            v,
            view.mask,
            scale=spec.scale,
            softcap=spec.softcap,
            sink_queries=view.sink_queries,
            want=want,
            per_group=view.per_group,
        )


@registry.register("kernel", "products")
class Products:
    """Let storages multiply what they hold as they hold it, where they can: int8 codes are never made floats.

    Scales multiply scores and probabilities instead. The reference, "eager", takes what this kernel cannot: blocks of
    tokens and float64. Keys that are stored unrotated are read and rotated.
    """

    def supports(self, keys: Readable, values: Readable, device: torch.device) -> bool:
        able = all(hasattr(storage, "products") and hasattr(storage, "sums") for storage in (keys, values))
        return able and has_fast_products(device)

    def attend(
        self, q: Tensor, keys: Any, values: Any, view: Any, want: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        spec, dtype = view.spec, q.dtype
        if q.size(2) > 1 or dtype == torch.float64:
            return Eager().attend(q, keys, values, view, want)
        B, H, _, width = q.shape
        q = q.view(B, values.sets, -1, width)  # a set for every head, or for every pool of heads
        if view.key_angles is not None:
            keys = Rows(rotate(keys.read(view.extent).to(dtype), view.key_angles, spec.rope_size))
        if view.value_padding:
            values = _OneMore(values)
        y, received = product_attention(
            q,
            keys,
            values,
            view.mask,
            extent=view.extent,
            key_size=spec.key_size,
            scale=spec.scale,
            softcap=spec.softcap,
            sink_queries=view.sink_queries,
            want=want,
            per_group=view.per_group,
        )
        return y.to(dtype).view(B, H, 1, -1), received


class _OneMore:
    """Values with a column of ones at their end, which meets what a bias adds to the scores."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def products(self, x: Tensor, extent: int) -> Tensor:
        return self.values.products(x[..., :-1], extent) + x[..., -1:]

    def sums(self, p: Tensor, extent: int) -> Tensor:
        return self.values.sums(p, extent)


def choose_kernel(name: str | None, keys: Readable, values: Readable, device: torch.device) -> Kernel:
    """The kernel of that name, or without one the first special kernel that supports the storages, else "eager".

    Raises:
        ValueError: If the name is unknown, or that kernel cannot read these storages on this device.
    """
    if name is not None:
        kernel = registry.build("kernel", name)
        if not kernel.supports(keys, values, device):
            storages = f"{type(keys).__name__} and {type(values).__name__}"
            raise ValueError(f"The attention kernel {name!r} does not read {storages} on {device.type}; use 'eager'.")
        return kernel
    others = (registry.build("kernel", other) for other in registry.names("kernel") if other != "eager")
    return next((k for k in others if k.supports(keys, values, device)), Eager())
