"""Strategies that score a token by the attention it received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.registry import register


@register("strategy", "h2o")
@dataclass(frozen=True)
class H2O(Strategy):
    """Keep the tokens that received most attention so far, and the most recent half of the budget.

    Attention is summed over all queries, the prompt's included, never normalised by age, per row and key/value head
    (averaged over the query heads of a group; the official FMInference/H2O code knows no groups and sums over the
    batch). The official code attends and then evicts; evicting first, as here, equals it with budget and recent smaller
    by one.
    """

    statistics: ClassVar[tuple[str, ...]] = ("mass",)
    paper: ClassVar[str] = (
        "Zhang et al. 2023, H2O: Heavy-Hitter Oracle for Efficient Generative Inference, arXiv 2306.14048"
    )

    def protected(self, budget: int) -> tuple[int, int]:
        return 0, budget // 2

    def score(self, tokens: Tokens) -> Tensor:
        return tokens["mass"]
