"""Another strategy's score, weighted by what a token can change in the layer's output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from litgpt_kv import registry
from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.cache.strategies.common import check_number, spread
from litgpt_kv.config import shown
from litgpt_kv.registry import register


@register("strategy", "criticalkv")
@dataclass(frozen=True)
class CriticalKV(Strategy):
    """Keep the tokens that another strategy finds important, as far as their values change the layer's output.

    First the best `first` of the budget stay by the other's score alone, protected tokens among them. The rest of the
    budget goes by that score (plus 1e-4) times the L1 norm of the value after the output projection, averaged over the
    query heads of a group. As kvpress 0.5.5, but for three things: scores below 0 are moved up so that the lowest is 0,
    as else a large norm would count against a token; where heads share slots, `first` is a share of the mean budget
    (kvpress's AdaKV variant: of what each head gets); and it goes on while decoding. Protected tokens, who chooses and
    positions are by default the other's. Over kvzip, with `first` 0, it is KVzip+ but for the norm of the hidden state
    by which that divides. Not defined for latent attention.

    Args:
        base: The other strategy: not one that goes by position or needs a file.
        base_options: Its options: "window=32, kernel=7".
        first: The share of the budget that goes by the other's score alone, 0 to 1.
    """

    base: str = "snapkv"
    base_options: str = ""
    first: float = 0.5

    latent: ClassVar[bool] = False
    paper: ClassVar[str] = (
        "Feng et al. 2025, Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective, "
        "arXiv 2502.03805"
    )

    SURE: ClassVar[float] = 2.0**100

    def __post_init__(self) -> None:
        check_number("first", self.first, 0, 1)
        if not isinstance(self.base_options, str):
            raise ValueError(f'base_options must be text like "window=32, kernel=7", got {shown(self.base_options)}.')
        known = [n for n in registry.names("strategy") if n != "criticalkv"]
        if self.base not in known or self.other.recency or "calibration" in self.other.needs:
            built = {n: registry.build("strategy", n) for n in known}
            known = [n for n, s in built.items() if not s.recency and "calibration" not in s.needs]
            raise ValueError(f"base must be one of {', '.join(known)}, got {shown(self.base)}.")

    @cached_property
    def other(self) -> Strategy:
        """The strategy whose score is weighted."""
        return registry.build("strategy", self.base, **parse_options(self.base_options))

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
    def rereads(self) -> bool:  # type: ignore[override]
        return self.other.rereads

    @property
    def chunk(self) -> int:
        """Tokens that are read again at once, if the other reads prompts twice."""
        return self.other.chunk  # type: ignore[attr-defined]

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
        score = tokens.mean_of_devices(self.other.score(tokens))
        low = score.masked_fill(~tokens.live, float("inf")).amin(dim=-1, keepdim=True).clamp(max=0.0)
        weighted = (score - low + 1e-4) * tokens["output_norm"]
        if tokens.protected is not None:
            score = score.masked_fill(tokens.protected, float("inf"))
        score = score.masked_fill(~tokens.live, float("-inf"))
        earliest_first = spread(tokens.pos, score).argsort(dim=-1, stable=True)
        best_first = earliest_first.gather(
            -1, score.gather(-1, earliest_first).argsort(dim=-1, descending=True, stable=True)
        )
        first = torch.arange(score.size(-1), device=score.device) < int(self.first * tokens.budget)
        sure = torch.zeros_like(best_first, dtype=torch.bool).scatter_(-1, best_first, first.expand(best_first.shape))
        return weighted.masked_fill(sure & tokens.live, self.SURE)


def parse_options(text: str) -> dict[str, Any]:
    """Options written as "name=value, name=value"; values as in JSON, anything else is text.

    Raises:
        ValueError: If a part is not of this form.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not (name and equals and value):
            raise ValueError(f'base_options must be like "window=32, kernel=7", got {shown(text)}.')
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
