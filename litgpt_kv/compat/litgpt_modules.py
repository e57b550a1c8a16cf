"""Our modules in a form that litgpt's own code can call and derive from: blocks with arguments by position, adapters.

`install()` puts them in litgpt's place. litgpt calls a block as `block(x, cos, sin, mask, input_pos, ...)`; our `GPT`
calls it as `block(x, view)`. litgpt's adapters override `scaled_dot_product_attention` to add to its output.

B rows · T tokens · H query heads · D head size · C embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import litgpt.model as base
from litgpt_kv.attention.rope import rotate
from litgpt_kv.cache.views import LatentProjection, LayerView
from litgpt_kv.compat import input_pos
from litgpt_kv.compat.input_pos import dense_cache
from litgpt_kv.model import attention, block, latent


class CausalSelfAttention(attention.CausalSelfAttention):
    """Ours for a view, litgpt's for its own arguments; a subclass may override `scaled_dot_product_attention`."""

    _attended: Tensor | None = None

    def forward(self, x: Tensor, view: LayerView | Tensor, *litgpt: Any) -> Tensor:
        """x (B, T, C) to (B, T, C): with a view, or with litgpt's cos, sin, mask, input_pos, input_pos_maxp1."""
        if litgpt:
            return base.CausalSelfAttention.forward(self, x, view, *litgpt)
        if type(self).scaled_dot_product_attention is CausalSelfAttention.scaled_dot_product_attention:
            return super().forward(x, view)
        return super().forward(x, AdaptedView(self, view))

    def adapt(self, q: Tensor, y: Tensor) -> Tensor:
        """What a subclass makes of the attention y (B, T, H, D) of the rotated queries q (B, H, T, D)."""
        self._attended = y
        return self.scaled_dot_product_attention(q, None, None)

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """litgpt's, to (B, T, H, D); without keys, the attention that `adapt` was given.

        litgpt adds boolean masks to softcapped scores; in this one they mask.
        """
        if k is None:
            y, self._attended = self._attended, None
            return y
        if mask is not None and mask.dtype == torch.bool and self.spec.softcap is not None:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        return super().scaled_dot_product_attention(q, k, v, mask)

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> base.KVCache:
        """This layer's part of `GPT.set_kv_cache`."""
        return dense_cache(self, batch_size, max_seq_length, device, dtype)


class AdaptedView:
    """A layer's view whose attention passes through a subclass' `scaled_dot_product_attention`."""

    def __init__(self, attn: CausalSelfAttention, view: LayerView) -> None:
        self.attn, self.view, self.last = attn, view, view.last

    def attend(self, q: Tensor, k: Tensor, v: Tensor, projection: LatentProjection | None = None) -> Tensor:
        y = self.view.attend(q, k, v, projection)
        angles = self.view.angles
        turned = rotate(q, angles, self.attn.spec.rope_size)
        if self.last is not None:
            turned = turned.gather(2, self.last.view(-1, 1, 1, 1).expand(-1, q.size(1), 1, turned.size(-1)))
        return self.attn.adapt(turned, y)


class MultiheadLatentAttention(latent.MultiheadLatentAttention):
    """Ours for a view, litgpt's for its own arguments."""

    def forward(self, x: Tensor, view: LayerView | Tensor, *litgpt: Any, **named: Any) -> Tensor:
        """x (B, T, C) to (B, T, C): with a view, or with litgpt's cos, sin, mask, input_pos, input_pos_maxp1."""
        if litgpt or named:
            return base.MultiheadLatentAttention.forward(self, x, view, *litgpt, **named)
        return super().forward(x, view)

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> base.KVCache:
        """This layer's part of `GPT.set_kv_cache`. `k` has the rotary parts, `v` the latents."""
        return dense_cache(self, batch_size, max_seq_length, device, dtype)


class Block(block.Block):
    """Ours for a view, litgpt's for its own arguments."""

    attention = CausalSelfAttention
    latent_attention = MultiheadLatentAttention

    def forward(self, x: Tensor, view: LayerView | Tensor, *litgpt: Any) -> Tensor:
        """x (B, T, C) to (B, T, C): with a view, or with litgpt's cos, sin, mask, input_pos, input_pos_maxp1."""
        return base.Block.forward(self, x, view, *litgpt) if litgpt else super().forward(x, view)


class GPT(input_pos.GPT):
    """`litgpt_kv.GPT` made of these modules."""

    block = Block
