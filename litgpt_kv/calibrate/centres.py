"""The centres of a model's queries: what the strategy `triattention` is calibrated with.

T tokens · H query heads · D head size · E rotated elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litgpt_kv.model import GPT

FIRST = 4  # tokens of a text whose queries are not counted: they see next to nothing


@torch.no_grad()
def query_centres(model: GPT, rows: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """The mean unrotated query of each head, and the mean length of each rotated pair of its elements, over texts.

    Arithmetic is float64, so that long texts are summed as exactly as short ones. One text at a time is read, without
    a cache.

    Args:
        model: A model with rotary attention, whole on one device.
        rows: Token ids of texts, each longer than 4 tokens and at most the model's context.

    Returns:
        By layer, as a calibration file has them: `layers.{i}.mean` (H, D) and `layers.{i}.length` (H, E / 2), float32.

    Raises:
        ValueError: If there is no text, a text is too short or too long, or the model's attention is latent or has an
            odd number of rotated elements.
    """
    spec = model.transformer.h[0].attn.spec
    if spec.latent or spec.rope_size % 2:
        raise ValueError("Query centres are defined for attention with an even number of rotated elements, not latent.")
    sums = [_Sums(block.attn) for block in model.transformer.h]
    hooks = [block.attn.register_forward_pre_hook(found.add) for block, found in zip(model.transformer.h, sums)]
    try:
        for row in rows:
            context = model.max_seq_length
            if not FIRST < len(row) <= context:
                raise ValueError(
                    f"A text must have {FIRST + 1} to {context} tokens (the model's context), got {len(row)}."
                )
            model(torch.tensor([list(row)], device=model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    if not sums[0].count:
        raise ValueError("Calibration needs at least one text.")
    out = {}
    for i, found in enumerate(sums):
        out[f"layers.{i}.mean"], out[f"layers.{i}.length"] = (x.float().cpu() for x in found.means())
    return out


class _Sums:
    """Sums over the queries of one layer."""

    def __init__(self, attn: Any) -> None:
        self.attn, self.count, self.query, self.length = attn, 0, 0.0, 0.0

    def add(self, module: nn.Module, args: tuple) -> None:
        """Note the queries of an input x (1, T, C); called before the layer attends."""
        q = self.attn.project(args[0])[0][0, :, FIRST:].double()  # (H, T - 4, D)
        first, second = q[..., : self.attn.spec.rope_size].chunk(2, dim=-1)
        self.query = self.query + q.sum(dim=1)
        self.length = self.length + (first.square() + second.square()).sqrt().sum(dim=1)
        self.count += q.size(1)

    def means(self) -> tuple[Tensor, Tensor]:
        return self.query / self.count, self.length / self.count
