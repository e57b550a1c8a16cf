"""What a cache keeps: a strategy is a rank. Floor 2: knows tensors and the registry, no cache, storage or model.

The cache evicts the lowest rank; empty slots fill first, sinks and recent tokens are protected by position, and on a
tie the earlier token stays. A strategy says what a token is worth when it enters, and what it is worth after attention
was paid to it. Ranks and masses are float32 at least, whatever the model's dtype.

B rows (layers that share a strategy are stacked along them in `update`) · P sets of kept tokens (1, or one a key/value
head) · T tokens · S slots · H query heads · G key/value heads · D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from litgpt_kv.config import LayerFacts
from litgpt_kv.registry import register


@dataclass
class Seen:
    """Everything a strategy may look at.

    Attributes:
        pos: (B, P, T) positions of the tokens (of the slots, in `update`; -1 is an empty slot).
        now: (B,) the row's clock: the position of its newest token.
        prompt: Whether the tokens are a prompt's.
        layer: The layer's static facts; None in `update`, which is called for all layers at once.
        mass: (B, P, T) attention received, summed over queries and averaged over a group's query heads, or None.
        k, v: (B, G, T, D) keys as they are stored, and values; None in `update`.
        q: (B, H, T, D) the queries of this pass, rotated; None in `update`.

    With latent attention G is 1, v are the latents, and k and q are the shared rotary part and what meets the latent,
    side by side: the product of q and k is still what is scaled to a score (but for a bias).
    """

    pos: Tensor
    now: Tensor
    prompt: bool
    layer: LayerFacts | None
    mass: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    q: Tensor | None = None


@dataclass(frozen=True)
class Strategy:
    """Base of all strategies; the fields of a subclass are its options. Pure: holds no tensors."""

    attention: ClassVar[int] = 0
    """How many last queries of a prompt it observes: 0 none, -1 all. Unless 0, it observes every decoded one too."""
    recency: ClassVar[bool] = False
    """Whether the rank is the position alone: what is kept is the sinks and an unbroken run of last tokens."""
    evicts: ClassVar[bool] = True
    """Whether a full cache makes room; otherwise it refuses the next token."""
    per_head: ClassVar[bool] = True
    """Whether each key/value head keeps its own tokens; otherwise all heads of a layer keep the same ones."""
    layer_cache: ClassVar[str] = "slots"
    """The registered layer cache it runs in; another one may choose, store and read as it likes."""
    positions: ClassVar[str] = "absolute"
    """The positions it runs with unless the user says otherwise."""
    paper: ClassVar[str] = ""

    def protected(self, budget: int) -> tuple[int, int]:
        """Its own default of (sinks, recent) for a budget."""
        return 0, 0

    def enter(self, seen: Seen) -> Tensor:
        """The rank (B, P, T) with which tokens enter; by default their position."""
        return seen.pos

    def update(self, rank: Tensor, seen: Seen) -> Tensor:
        """The rank (B, P, S) of every slot after attention was paid to it; by default unchanged."""
        return rank


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


@register("strategy", "h2o")
@dataclass(frozen=True)
class H2O(Strategy):
    """Keep the tokens that received most attention so far, and the most recent half of the budget.

    Attention is summed over all queries, the prompt's included, never normalised by age, per row and key/value head
    (averaged over the query heads of a group; the official FMInference/H2O code knows no groups and sums over the
    batch). The official code attends and then evicts; evicting first, as here, equals it with budget and recent smaller
    by one.
    """

    attention: ClassVar[int] = -1
    paper: ClassVar[str] = (
        "Zhang et al. 2023, H2O: Heavy-Hitter Oracle for Efficient Generative Inference, arXiv 2306.14048"
    )

    def protected(self, budget: int) -> tuple[int, int]:
        return 0, budget // 2

    def enter(self, seen: Seen) -> Tensor:
        return seen.mass if seen.prompt else torch.zeros_like(seen.pos, dtype=torch.float32)

    def update(self, rank: Tensor, seen: Seen) -> Tensor:
        return rank + seen.mass
