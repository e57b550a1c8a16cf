"""Choosing the next token of every row at once, with litgpt's meaning of temperature, top-k and top-p. Floor 5.

B rows · V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt_kv.config import SamplingArgs


@dataclass
class Sampler:
    """Draws tokens as `args` says, from a generator of its own when a seed is given."""

    args: SamplingArgs
    device: torch.device

    def __post_init__(self) -> None:
        self.generator = None
        if self.args.seed is not None:
            self.generator = torch.Generator(self.device).manual_seed(self.args.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) to tokens (B,) int64, on the device."""
        args = self.args
        if args.temperature == 0 or args.top_p == 0:
            return logits.argmax(dim=-1)
        if args.top_k is not None and args.top_k < logits.size(-1):
            best, index = logits.topk(args.top_k, dim=-1)
            logits = torch.full_like(logits, float("-inf")).scatter(-1, index, best)
        probs = (logits.float() / args.temperature).softmax(dim=-1)
        if args.top_p < 1.0:
            ascending, index = probs.sort(dim=-1, stable=True)
            drop = ascending.cumsum(dim=-1) <= 1 - args.top_p
            drop[:, -1] = False  # the most probable token always stays
            probs = probs.masked_fill(drop.gather(-1, index.argsort(dim=-1)), 0.0)
        return torch.multinomial(probs, 1, generator=self.generator).squeeze(-1)
