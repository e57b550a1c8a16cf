"""What a cache keeps: a strategy is a score over named statistics of tokens.

The cache evicts the lowest score when room must be made. Empty slots fill first; sinks, recent tokens and a kept
prompt are protected by position; among equal scores the later token goes first. Scores and statistics are float32
at least, whatever the model's dtype.

B rows (layers that share a strategy are stacked along them where it needs no keys) · P sets of kept tokens (1, or one
a key/value head) · N tokens of a prompt, or slots · w queries · H query heads · G key/value heads · D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from litgpt_kv.attention.rope import Angles, angles_at
from litgpt_kv.cache.spec import LayerSpec

RECEIVED = ("mass", "last")
"""Statistics that the cache keeps by itself: attention received from all queries so far, and from the newest one."""


@dataclass(eq=False)
class LayerConstants:
    """What strategies read of one layer of the model that no token changes.

    Attributes:
        theta: What one position turns, see `litgpt_kv.attention.rope.theta_of`.
        dtype: Of scores and statistics: float32, or float64 for a float64 model.
        first_head: The number of this device's first set of kept tokens; not 0 on a device that has later heads.
        largest: From numbers (B, G, ...) of this device's query heads, the largest of all devices; None on one.
        mean: From scores (B, G, N) of this device's query heads, the mean of all devices; None on one.
        output_weight: (C, H, Dv) the output projection, of each query head; where "output_weight" is needed.
        calibration: By name, what a calibration file says of this layer; where "calibration" is needed.
    """

    theta: tuple[Tensor, Tensor, Tensor]
    dtype: torch.dtype = torch.float32
    first_head: int = 0
    largest: Callable[[Tensor], Tensor] | None = None
    mean: Callable[[Tensor], Tensor] | None = None
    output_weight: Tensor | None = None
    calibration: Mapping[str, Tensor] = field(default_factory=dict)


class TokenReader(Protocol):
    """Where `Tokens` gets what is expensive: each is made when a strategy asks for it."""

    constants: LayerConstants | None

    @property
    def sliding_window(self) -> int | None: ...
    def keys(self) -> Tensor: ...
    def unrotated_keys(self) -> Tensor: ...
    def values(self) -> Tensor: ...
    def queries(self) -> tuple[Tensor, Tensor]: ...
    def unrotated_queries(self) -> tuple[Tensor, Tensor]: ...
    def distance(self, pos: Tensor, now: Tensor) -> Tensor: ...


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
        budget: Tokens that a set keeps; of heads that share slots, the mean.
        protected: (B, P, N) bool, what never leaves; None: nothing.
    """

    pos: Tensor
    now: Tensor
    prompt_length: Tensor
    layer: LayerSpec
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    reader: TokenReader | None = None
    budget: int = 0
    protected: Tensor | None = None

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
        return self._exact(queries), pos

    @property
    def unrotated_queries(self) -> tuple[Tensor, Tensor]:
        """As `queries`, before rotation."""
        queries, pos = self._reader("queries").unrotated_queries()
        return self._exact(queries), pos

    @property
    def distance(self) -> Tensor:
        """(B, P, N) int64, how far the newest token is from each, as their rotations say: in the text, or in the
        cache."""
        return self._reader("rope").distance(self.pos, self.now)

    @property
    def sliding_window(self) -> int | None:
        """How many tokens back a query sees, or None for all: the layer's sliding window where it is at work."""
        return self._reader("queries").sliding_window

    def angles(self, pos: Tensor) -> Angles:
        """The angles of any positions (...), negative and beyond the model's context too: a pair of (..., E)."""
        constants = self._constants("rope")
        return angles_at(constants.theta, pos, constants.dtype)

    @property
    def first_head(self) -> int:
        """The number of the first of the P sets among all devices' ones."""
        return self._constants("keys").first_head

    def largest_of_group(self, x: Tensor) -> Tensor:
        """The largest of numbers (B, G, R, ...) of the query heads of each group: (B, G, ...)."""
        x, constants = x.amax(dim=2), self._constants("queries")
        return x if constants.largest is None else constants.largest(x)

    def mean_of_devices(self, score: Tensor) -> Tensor:
        """Scores (B, G, N) made from query heads, the mean over devices that have some of the heads of a group."""
        mean = self._constants("queries").mean
        return score if mean is None else mean(score)

    @property
    def output_norm(self) -> Tensor:
        """(B, G, N) float32: how much a token can change the layer's output, 0 where empty.

        The L1 norm of the value after the output projection, averaged over the query heads of a group.
        """
        v, weight = self.values, self._constants("output_weight").output_weight
        if weight is None:
            raise ValueError("A strategy that reads output_norm must list 'output_weight' in `needs`.")
        heads = weight.to(v.dtype).permute(1, 2, 0).unflatten(0, (v.size(1), -1))  # (G, R, Dv, C)
        parts = [  # few tokens at a time: (B, G, n, C) is larger than the values
            sum((part @ heads[:, r]).abs().sum(dim=-1) for r in range(heads.size(1))) for part in v.split(1024, dim=2)
        ]
        return torch.cat(parts, dim=-1) / heads.size(1)

    @property
    def calibration(self) -> Mapping[str, Tensor]:
        """By name, what the strategy's calibration file says of this layer's heads, (H, ...) each."""
        return self._constants("calibration").calibration

    def _constants(self, what: str) -> LayerConstants:
        constants = self._reader(what).constants
        if constants is None:
            raise ValueError("A cache made without its model knows nothing of it: use KVCache.build.")
        return constants

    def _reader(self, what: str) -> TokenReader:
        if self.reader is None:
            raise ValueError(f"A strategy that reads {what} must say so: list {what!r} in `needs`.")
        return self.reader

    def _exact(self, x: Tensor) -> Tensor:
        constants = None if self.reader is None else self.reader.constants
        return x.to(torch.promote_types(x.dtype, torch.float32 if constants is None else constants.dtype))

    def _masked(self, x: Tensor) -> Tensor:
        return self._exact(x).masked_fill(~self.live.unsqueeze(-1), 0.0)


@dataclass(frozen=True)
class Strategy:
    """Base of all strategies; the fields of a subclass are its options. Pure: it holds no tensors.

    Attributes:
        statistics: Names of what the cache keeps of every token: "mass", "last", and own names.
        needs: What `score` or `update` read besides: "keys", "values", "queries" (with a field or class attribute
            `window`, how many), "rope" (angles and distances); and for `enter`, too, "output_weight", "calibration".
            A strategy with needs runs a layer at a time, others all layers at once.
        recency: Whether the score is the position alone: what stays is the sinks and an unbroken run of last tokens.
        rereads: Whether prompts that must be compressed are read a second time, right after they were read: the
            statistic "reread" is then the largest attention that the second reading paid to a token, over the query
            heads of a group; 0 where nothing was read again. `chunk` says how many tokens are read again at once.
        evicts: Whether a full cache makes room; otherwise it refuses the next token.
        outside_window: Whether a layer with a sliding window keeps tokens outside of it, too, which no query sees; for
            a strategy that does not evict. Otherwise a budget of at least the window keeps the window alone.
        comparable: Whether scores of different heads can be compared; if not, `select="pool"` divides each by its
            head's sum.
        select: Who chooses unless the user says otherwise: "head", "layer" or "pool", see `KVCacheArgs`.
        positions: The positions it runs with unless the user says otherwise: "absolute" or "cache".
        latent: Whether it is defined for multi-head latent attention.
        paper: Where it comes from.
    """

    statistics: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    recency: ClassVar[bool] = False
    rereads: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    outside_window: ClassVar[bool] = False
    comparable: ClassVar[bool] = True
    select: ClassVar[str] = "head"
    positions: ClassVar[str] = "absolute"
    latent: ClassVar[bool] = True
    paper: ClassVar[str] = ""

    @property
    def reads_on_entry(self) -> bool:
        """Whether `enter` is called for new tokens."""
        return type(self).enter is not Strategy.enter

    def protected(self, budget: int) -> tuple[int, int]:
        """The strategy's own default of (sinks, recent) for a budget."""
        return 0, 0

    def enter(self, tokens: Tokens) -> dict[str, Tensor]:
        """Own statistics of tokens that enter, (B, P, N) or (B, G, N) each; a missing one starts at 0.

        It may read the keys and values of `tokens`, whatever `needs` says. Where the heads of a layer choose together,
        a statistic is the mean over them.
        """
        return {}

    def update(self, tokens: Tokens) -> dict[str, Tensor]:
        """Own statistics of all tokens after attention was paid to them, (B, P, N) each; a missing one stays."""
        return {}

    def score(self, tokens: Tokens) -> Tensor:
        """What each token is worth when room must be made, (B, P, N) or (B, G, N); the lowest leave."""
        return tokens.pos
