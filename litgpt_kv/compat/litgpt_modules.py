"""Our modules with litgpt's signatures, for litgpt's own code, LoRA and adapters.

`install()` replaces litgpt's modules by these. litgpt calls a block as `block(x, cos, sin, mask, input_pos, ...)`; our
`GPT` calls it as `block(x, view)`. litgpt's adapters override `scaled_dot_product_attention` to add to its output.

B rows · T tokens · H query heads · D head size · C embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import litgpt.model as base
from litgpt_kv.cache.views import LatentProjection, LayerView
from litgpt_kv.compat import input_pos
from litgpt_kv.compat.input_pos import BuildsKVCache
from litgpt_kv.model import attention, block, latent

# litgpt's classes, before `install` replaces them
LitgptBlock, LitgptAttention = base.Block, base.CausalSelfAttention
LitgptLatentAttention = base.MultiheadLatentAttention


class CausalSelfAttention(BuildsKVCache, attention.CausalSelfAttention):
    """Our attention if it is called with a view, litgpt's if it is called with litgpt's arguments.

    A subclass may override `scaled_dot_product_attention`, as litgpt's adapters do.
    """

    _attended: Tensor | None = None

    def forward(self, x: Tensor, view: LayerView | Tensor, *litgpt: Any) -> Tensor:
        """Map x (B, T, C) to (B, T, C), with a view or with litgpt's cos, sin, mask, input_pos, input_pos_maxp1."""
        if litgpt:
            return LitgptAttention.forward(self, x, view, *litgpt)
        if type(self).scaled_dot_product_attention is CausalSelfAttention.scaled_dot_product_attention:
            return super().forward(x, view)
        return super().forward(x, AdaptedView(self, view))

    def adapt(self, q: Tensor, y: Tensor) -> Tensor:
        """Pass the attention output y (B, T, H, D) of rotated queries q (B, H, T, D) through the subclass' override."""
        self._attended = y
        return self.scaled_dot_product_attention(q, None, None)

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, mask: Tensor | None = None
    ) -> Tensor:
        """Return litgpt's attention (B, T, H, D); without keys, return the output that `adapt` was given.

        With softcapping, litgpt adds a boolean mask to the scores; here it masks them.
        """
        if k is None:
            y, self._attended = self._attended, None
            return y
        if mask is not None and mask.dtype == torch.bool and self.spec.softcap is not None:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        return super().scaled_dot_product_attention(q, k, v, mask)


class AdaptedView:
    """A layer's view whose attention output passes through a subclass' `scaled_dot_product_attention`."""

    def __init__(self, attn: CausalSelfAttention, view: LayerView) -> None:
        self.attn, self.view, self.last = attn, view, view.last

    def attend(self, q: Tensor, k: Tensor, v: Tensor, projection: LatentProjection | None = None) -> Tensor:
        queries: list[Tensor] = []
        self.view.observer = queries.append
        y = self.view.attend(q, k, v, projection)
        return self.attn.adapt(queries[0], y)


class MultiheadLatentAttention(BuildsKVCache, latent.MultiheadLatentAttention):
    """Our module if it is called with a view, litgpt's if it is called with litgpt's arguments."""

    def forward(self, x: Tensor, view: LayerView | Tensor, *litgpt: Any, **named: Any) -> Tensor:
        """Map x (B, T, C) to (B, T, C), with a view or with litgpt's cos, sin, mask, input_pos, input_pos_maxp1."""
        if litgpt or named:
            return LitgptLatentAttention.forward(self, x, view, *litgpt, **named)
        return super().forward(x, view)


class Block(block.Block):
    """Our module if it is called with a view, litgpt's if it is called with litgpt's arguments."""

    attention = CausalSelfAttention
    latent_attention = MultiheadLatentAttention

    def forward(self, x: Tensor, view: LayerView | Tensor, *litgpt: Any) -> Tensor:
        """Map x (B, T, C) to (B, T, C), with a view or with litgpt's cos, sin, mask, input_pos, input_pos_maxp1."""
        return LitgptBlock.forward(self, x, view, *litgpt) if litgpt else super().forward(x, view)


class GPT(input_pos.GPT):
    """`litgpt_kv.GPT` with these modules."""

    block = Block
