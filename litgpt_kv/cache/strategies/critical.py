"""Another strategy's score, weighted by what a token can change in the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from litgpt_kv import registry
from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.config import shown
from litgpt_kv.registry import register


@register("strategy", "criticalkv")
@dataclass(frozen=True)
class CriticalKV(Strategy):
    """Keep the tokens that another strategy finds important, as far as their values change the layer's output.

    The other's score (plus 1e-4) times the L1 norm of the value after the output projection, averaged over the query
    heads of a group. As kvpress 0.5.5's second stage; its first one keeps the best half of the budget by the other's
    score alone, which this does not. Scores below 0 are first moved up so that the lowest is 0, as else a large norm
    would count against a token. Protected tokens and positions are by default the other's. Not defined for latent
    attention.

    Args:
        base: The other strategy, with its options as by default: not one that goes by position or needs a file.
    """

    base: str = "snapkv"

    latent: ClassVar[bool] = False
    paper: ClassVar[str] = (
        "Feng et al. 2025, Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective, "
        "arXiv 2502.03805"
    )

    def __post_init__(self) -> None:
        known = [n for n in registry.names("strategy") if n != "criticalkv"]
        if self.base not in known or self.other.recency or "calibration" in self.other.needs:
            built = {n: registry.build("strategy", n) for n in known}
            known = [n for n, s in built.items() if not s.recency and "calibration" not in s.needs]
            raise ValueError(f"base must be one of {', '.join(known)}, got {shown(self.base)}.")

    @cached_property
    def other(self) -> Strategy:
        """The strategy whose score is weighted."""
        return registry.build("strategy", self.base)

    @property
    def statistics(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.other.statistics, "output_norm")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.other.needs | {"output_weight"}

    @property
    def window(self) -> int:
        """Last queries that the other reads."""
        return self.other.window  # type: ignore[attr-defined]

    @property
    def select(self) -> str:  # type: ignore[override]
        return self.other.select

    @property
    def positions(self) -> str:  # type: ignore[override]
        return self.other.positions

    @property
    def comparable(self) -> bool:  # type: ignore[override]
        return self.other.comparable

    def protected(self, budget: int) -> tuple[int, int]:
        return self.other.protected(budget)

    def enter(self, tokens: Tokens) -> dict[str, Tensor]:
        return {**self.other.enter(tokens), "output_norm": tokens.output_norm}

    def update(self, tokens: Tokens) -> dict[str, Tensor]:
        return self.other.update(tokens)

    def score(self, tokens: Tokens) -> Tensor:
        score = self.other.score(tokens)
        low = score.masked_fill(~tokens.live, float("inf")).amin(dim=-1, keepdim=True).clamp(max=0.0)
        return (score - low + 1e-4) * tokens["output_norm"]
