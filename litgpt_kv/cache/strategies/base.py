"""What a cache keeps: a strategy is a score over named statistics of tokens.

The cache evicts the lowest score when room must be made. Empty slots fill first; sinks, recent tokens and a kept
prompt are protected by position; among equal scores the later token goes first. Scores and statistics are float32
at least, whatever the model's dtype.

B rows (layers that share a strategy are stacked along them where it needs no keys) · P sets of kept tokens (1, or one
a key/value head) · N tokens of a prompt, or slots · w queries · H query heads · G key/value heads · D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from litgpt_kv.cache.spec import LayerSpec

RECEIVED = ("mass", "last")
"""Statistics that the cache keeps by itself: attention received from all queries so far, and from the newest one."""


class TokenReader(Protocol):
    """Where `Tokens` gets what is expensive: each is made when a strategy asks for it."""

    def keys(self) -> Tensor: ...
    def unrotated_keys(self) -> Tensor: ...
    def values(self) -> Tensor: ...
    def queries(self) -> tuple[Tensor, Tensor]: ...


@dataclass(eq=False)
class Tokens:
    """The tokens of a prompt, or those in the slots of a cache: everything a strategy may look at.

    `tokens["mass"]` is a statistic by name, (B, P, N) float32: "mass" and "last" (if the strategy lists them: attention
    received so far, and from the newest query, averaged over the query heads of a group), and the strategy's own.

    Attributes:
        pos: (B, P, N) int64 positions, -1 for an empty slot or a pad.
        now: (B,) int64 position of each row's newest token.
        prompt_length: (B,) int64 tokens of each row's prompt.
        layer: Static facts of the layer; of a stack of layers, those of its first one.
        statistics: By name, (B, P, N).
    """

    pos: Tensor
    now: Tensor
    prompt_length: Tensor
    layer: LayerSpec
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    reader: TokenReader | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.statistics:
            raise KeyError(f"This strategy keeps no statistic {name!r}: list it in `statistics`.")
        return self.statistics[name]

    @property
    def live(self) -> Tensor:
        """(B, P, N) bool: False for empty slots and pads."""
        return self.pos >= 0

    @property
    def keys(self) -> Tensor:
        """(B, G, N, D) float32 keys as attention sees them, rotated at their positions; 0 where empty.

        With latent attention the shared rotary part and the latent side by side: a query's product with it is what is
        scaled to a score (but for a bias).
        """
        return self._masked(self._reader("keys").keys())

    @property
    def unrotated_keys(self) -> Tensor:
        """(B, G, N, D) float32 keys before rotation; 0 where empty."""
        return self._masked(self._reader("keys").unrotated_keys())

    @property
    def values(self) -> Tensor:
        """(B, G, N, Dv) float32 values; 0 where empty."""
        return self._masked(self._reader("values").values())

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """The last w queries of each row, w being the strategy's `window`, and their positions.

        (B, H, w, D) float32, rotated as the keys are, and (B, w) int64, -1 where a row has fewer than w; w is the
        length of the prompt where that is shorter.
        """
        queries, pos = self._reader("queries").queries()
        return queries.to(torch.promote_types(queries.dtype, torch.float32)), pos

    def _reader(self, what: str) -> TokenReader:
        if self.reader is None:
            raise ValueError(f"A strategy that reads {what} must say so: list {what!r} in `needs`.")
        return self.reader

    def _masked(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.masked_fill(~self.live.unsqueeze(-1), 0.0)


@dataclass(frozen=True)
class Strategy:
    """Base of all strategies; the fields of a subclass are its options. Pure: it holds no tensors.

    Attributes:
        statistics: Names of what the cache keeps of every token: "mass", "last", and own names.
        needs: What `score`, `enter` or `update` read besides: "keys", "values", "queries" (with a field or class
            attribute `window`, how many). A strategy with needs runs a layer at a time, others all layers at once.
        recency: Whether the score is the position alone: what stays is the sinks and an unbroken run of last tokens.
        evicts: Whether a full cache makes room; otherwise it refuses the next token.
        comparable: Whether scores of different heads can be compared; if not, `select="pool"` divides each by its
            head's sum.
        select: Who chooses unless the user says otherwise: "head", "layer" or "pool", see `KVCacheArgs`.
        positions: The positions it runs with unless the user says otherwise: "absolute" or "cache".
        paper: Where it comes from.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    recency: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    select: ClassVar[str] = "head"
    positions: ClassVar[str] = "absolute"
    paper: ClassVar[str] = ""

    def protected(self, budget: int) -> tuple[int, int]:
        """The strategy's own default of (sinks, recent) for a budget."""
        return 0, 0

    def enter(self, tokens: Tokens) -> dict[str, Tensor]:
        """Own statistics of tokens that enter, (B, P, N) each; a missing one starts at 0."""
        return {}

    def update(self, tokens: Tokens) -> dict[str, Tensor]:
        """Own statistics of all tokens after attention was paid to them, (B, P, N) each; a missing one stays."""
        return {}

    def score(self, tokens: Tokens) -> Tensor:
        """What each token is worth when room must be made, (B, P, N) or (B, G, N); the lowest leave."""
        return tokens.pos
