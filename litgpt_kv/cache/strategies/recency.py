"""Strategies whose score is the position: all tokens, the last ones, and the first four with the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from litgpt_kv.cache.strategies.base import Strategy
from litgpt_kv.registry import register


@register("strategy", "dense")
@dataclass(frozen=True)
class Dense(Strategy):
    """Keep every token; memory for all of them is taken up front."""

    recency: ClassVar[bool] = True
    evicts: ClassVar[bool] = False


@register("strategy", "window")
@dataclass(frozen=True)
class Window(Strategy):
    """Keep the last tokens."""

    recency: ClassVar[bool] = True


@register("strategy", "sink")
@dataclass(frozen=True)
class Sink(Strategy):
    """Keep the first four tokens and the last ones, at positions inside the cache: a stream may run for ever.

    The official code (mit-han-lab/streaming-llm) attends over `budget + 1` tokens and evicts afterwards; evicting
    first, as here, equals it with a cache smaller by one. A prompt longer than the budget is read a token at a time
    with the "min-length" prefill, as its evaluation does.
    """

    recency: ClassVar[bool] = True
    positions: ClassVar[str] = "cache"
    paper: ClassVar[str] = (
        "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"
    )

    def protected(self, budget: int) -> tuple[int, int]:
        return 4, 0
