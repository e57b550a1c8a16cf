"""The floor that every strategy is compared with: tokens chosen by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.cache.strategies.common import check_number
from litgpt_kv.registry import register

MASK = 2**32 - 1
GOLDEN = 0x9E3779B9  # without it, number 0 of everything would be 0 whatever is mixed


@register("strategy", "random")
@dataclass(frozen=True)
class Random(Strategy):
    """Keep tokens by chance: what any strategy must beat.

    A token's score is a uniform number that is a pure function of the seed, the layer, the head and the position, so
    that a row keeps what it keeps alone, and a run can be repeated. No official code; the paper reports that with kept
    prompts (`keep_prompt`) uniform eviction while decoding matches the strongest strategies on reasoning tasks.

    Args:
        seed: Another seed keeps other tokens; 0 to 2**32 - 1.
    """

    seed: int = 0

    statistics: ClassVar[tuple[str, ...]] = ("draw",)
    paper: ClassVar[str] = "Random eviction as a decode-time baseline, arXiv 2609.03430"

    def __post_init__(self) -> None:
        check_number("seed", self.seed, 0, MASK, int)

    def enter(self, tokens: Tokens) -> dict[str, Tensor]:
        head = torch.arange(tokens.pos.size(1), device=tokens.pos.device).view(-1, 1) + tokens.first_head
        state = torch.full_like(head, self.seed + GOLDEN)
        for number in (tokens.layer.index, head, tokens.pos):
            state = mix(state) + number
        state = mix(state)
        return {"draw": (state >> 8).float() * 2.0**-24}

    def score(self, tokens: Tokens) -> Tensor:
        return tokens["draw"]


def mix(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit numbers held in int64 (the finalizer of MurmurHash3, Appleby 2011)."""
    x = x & MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & MASK  # of a product that wraps around the low 32 bits are right
    return x
