"""Which token is in which slot: protecting, choosing, evicting and counting, on positions and scores alone.

L layers that share a strategy and a budget (stacked, so that a decode step keeps all their books at once) · B rows ·
P sets of kept tokens (1, one a key/value head, or one a pool) · g heads of a pool (1 without pools) · S slots of a
set · T new tokens · N keys attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from litgpt_kv.cache import pool
from litgpt_kv.cache.plan import LayerPlan
from litgpt_kv.cache.spec import LayerSpec
from litgpt_kv.cache.storage.base import scatter
from litgpt_kv.cache.strategies.base import Strategy, TokenReader, Tokens

LAST = torch.iinfo(torch.int64).max


class Sharing(Protocol):
    """What slots ask for where other devices hold a layer's other heads. Each process of a run asks the same.

    Attributes:
        heads: Ranges `queries` and `groups` of the heads that are here, and how many `all_queries` there are.
    """

    heads: Any

    @property
    def groups_and_devices(self) -> tuple[int, int]:
        """Key/value heads of the whole model, and devices."""

    def mass(self, mass: Tensor, per_head: bool) -> Tensor:
        """Attention (..., G, S) that this device's query heads paid, to that of all: (..., G, S), or for one choice
        for all heads (..., 1, S)."""

    def score(self, score: Tensor, per_head: bool) -> Tensor:
        """Scores (..., P, S) made from this device's keys and queries, to the mean over all devices with a say."""

    def largest(self, x: Tensor) -> Tensor:
        """Numbers (B, G, ...) of this device's query heads, to the largest over all that have heads of these groups."""


class Slots(nn.Module):
    """The slots of a stack of layers.

    A strategy that scores by recency keeps the same tokens in every layer and head, so L and P are 1 and its score is
    `pos` itself, an integer, exact however long the stream.

    Attributes:
        pos: (L, B, P, S) int64 position of the token in each slot, -1 where empty.
        owner: (L, B, P, S) int64 number within its pool of the head that a token belongs to; None without pools.
        statistics: By name, (L, B, P, S) float32 (float64 for a float64 model).
    """

    row_dim: ClassVar[int] = 1
    pos: Tensor
    owner: Tensor | None
    sharing: Sharing | None = None

    def __init__(
        self,
        plan: LayerPlan,
        layers: tuple[LayerSpec, ...],
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.plan, self.strategy, self.layers = plan, plan.strategy, layers
        recency, one = plan.strategy.recency, plan.select == "model"
        self.per_head = plan.select != "layer" and not recency
        self.names, self.dtype = plan.strategy.statistics, dtype
        stack, groups = 1 if recency or one else len(layers), layers[0].groups
        sets = plan.pools or (groups if self.per_head else 1)
        self.heads = groups * len(layers) if one else groups // plan.pools if plan.pools else 1
        self.size = plan.slots * self.heads
        shape = (stack, batch_size, sets, self.size)
        self.register_buffer("pos", torch.full(shape, -1, dtype=torch.int64, device=device), persistent=False)
        owner = torch.zeros(shape, dtype=torch.int64, device=device) if plan.pools else None
        self.register_buffer("owner", owner, persistent=False)
        for name in self.names:
            self.register_buffer(f"statistic_{name}", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        """Move with the module, but never cast statistics: sums in bfloat16 stop growing at 128."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    @property
    def statistics(self) -> dict[str, Tensor]:
        return {name: self._buffers[f"statistic_{name}"] for name in self.names}  # type: ignore[misc]

    def stack_index(self, layer: int) -> int:
        """Where in the stack layer number `layer` of this group stands."""
        return 0 if self.strategy.recency else layer

    # -- scores ------------------------------------------------------------------------------------------------------

    def score(self, now: Tensor, prompt_length: Tensor, readers: Sequence[TokenReader]) -> Tensor:
        """What every slot's token is worth, (L, B, P, S); for pools a score for each head, (L, B, G, S).

        Args:
            now: (B,) positions of the newest tokens in the slots.
            prompt_length: (B,).
            readers: One a layer, for a strategy that needs more than statistics.
        """
        if self.strategy.recency:
            return self.pos
        every = self.tokens(now, prompt_length, readers)
        scores = [self._score(tokens) for tokens in every]
        sets = self.pos.size(2) * self.heads
        if not self.strategy.needs:  # the layers are stacked
            return scores[0].view(*self.pos.shape[:2], sets, self.size)
        score = torch.stack([self._one_choice(score) for score in scores])
        return score if self.sharing is None else self.sharing.score(score, self.per_head)

    def tokens(self, now: Tensor, prompt_length: Tensor, readers: Sequence[TokenReader]) -> list[Tokens]:
        """What the strategy may look at: one view of all layers, or one a layer where it needs keys.

        With pools, every head has a row of its own in which the others' slots are empty.
        """
        pos, statistics = self.pos, self.statistics
        if self.owner is not None:
            pos = pool.per_head(pos, self.owner, self.heads, -1)
            statistics = {n: pool.per_head(s, self.owner, self.heads, 0.0) for n, s in statistics.items()}
        if self.strategy.needs:
            return [
                self.view(pos[i], now, prompt_length, spec, {n: s[i] for n, s in statistics.items()}, readers[i])
                for i, spec in enumerate(self.layers)
            ]
        stack = pos.size(0)
        flat = {name: s.flatten(0, 1) for name, s in statistics.items()}
        return [self.view(pos.flatten(0, 1), now.repeat(stack), prompt_length.repeat(stack), self.layers[0], flat)]

    def view(
        self,
        pos: Tensor,
        now: Tensor,
        prompt_length: Tensor,
        layer: LayerSpec,
        statistics: Mapping[str, Tensor],
        reader: TokenReader | None = None,
    ) -> Tokens:
        """Tokens at positions (B, P, N) as the strategy sees them."""
        protected = self.protected(pos, now, prompt_length) if self.strategy.needs else None
        return Tokens(pos, now, prompt_length, layer, statistics, reader, self.plan.slots, protected)

    def _score(self, tokens: Tokens) -> Tensor:
        """The strategy's score, whose shape is checked: users write strategies, and a wrong shape could broadcast."""
        score = self.strategy.score(tokens)
        (B, P, N), G = tokens.pos.shape, tokens.layer.groups
        if not isinstance(score, Tensor) or score.shape not in ((B, P, N), (B, G, N)):
            shape = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            name = type(self.strategy).__name__
            raise ValueError(f"{name}.score must give a number for each token, {(B, P, N)} here; it gave {shape}.")
        return score

    def _one_choice(self, score: Tensor) -> Tensor:
        """A score (B, G, N) made from every head's keys, where the heads of a layer choose together: its mean."""
        if self.per_head or score.size(-2) == 1:
            return score
        return score.mean(dim=-2, keepdim=True)

    def protected(self, pos: Tensor, now: Tensor, prompt_length: Tensor) -> Tensor | None:
        """Which tokens never leave: sinks, recent tokens, a kept prompt; None if none does.

        Args:
            pos: (..., B, P, N). now: (B,) the newest position, which counts as recent.
            prompt_length: (B,).
        """
        plan = self.plan
        if not (plan.sinks or plan.recent or plan.keep_prompt):
            return None
        safe = (pos < plan.sinks) | (pos > now.view(-1, 1, 1) - plan.recent)
        if plan.keep_prompt:
            safe = safe | (pos < prompt_length.view(-1, 1, 1))
        return safe & (pos >= 0)

    def worth(self, score: Tensor, pos: Tensor, now: Tensor, prompt_length: Tensor) -> Tensor:
        """A score with what is protected at the top, then empty slots at the bottom.

        Tokens outside the sliding window are worth least, even protected ones.
        """
        best, least = (LAST, -1) if not score.is_floating_point() else (float("inf"), float("-inf"))
        if (safe := self.protected(pos, now, prompt_length)) is not None:
            score = score.masked_fill(safe, best)
        gone = pos < 0
        if self.plan.window is not None:
            gone = gone | (pos <= now.view(-1, 1, 1) - self.plan.window)
        return score.masked_fill(gone, least)

    # -- decoding ----------------------------------------------------------------------------------------------------

    def make_room(self, score: Tensor, now: Tensor, prompt_length: Tensor, T: int, live: Tensor | None) -> Tensor:
        """Evict where T new tokens do not fit.

        Args:
            score: Of `score`. now: (B,) position of the newest token that enters.
            live: (B,) rows that take their tokens; None: all.

        Returns:
            (L, B, P, g * T) the slots that the new tokens take.
        """
        if T == 1 and self.plan.interval == 1 and self.owner is None:
            return self._replace(self.worth(score, self.pos, now, prompt_length))
        free = (self.pos < 0).sum(dim=-1, keepdim=True)  # (L, B, P, 1)
        count, interval = T * self.heads, self.plan.interval * self.heads
        need = (count - free).clamp(min=interval).masked_fill(free >= count, 0)
        if live is not None:
            need = need.masked_fill(~live.view(1, -1, 1, 1), 0)
        if self.owner is None:
            worst_first = self._worst_first(self.worth(score, self.pos, now, prompt_length))
        else:
            worth = self.worth(score, pool.per_head(self.pos, self.owner, self.heads, -1), now, prompt_length)
            sure = max(0, self.plan.floor - T)  # the tokens that enter count, too
            worst_first = pool.worst_first(worth, self.pos, self.owner, self.heads, sure, self.strategy.comparable)
        filled_first = worst_first.gather(-1, (self.pos.gather(-1, worst_first) < 0).int().argsort(dim=-1, stable=True))
        leaves = torch.arange(self.size, device=need.device) < need
        gone = torch.zeros_like(self.pos, dtype=torch.bool).scatter_(-1, filled_first, leaves)
        self.pos.masked_fill_(gone, -1)
        return self.free_slots(T)

    def _replace(self, worth: Tensor) -> Tensor:
        """The one slot of each set that the next token takes, (L, B, P, 1): an empty one, or that of the worst token.

        Among equals the latest goes; empty slots, all at position -1, fill in order.
        """
        if worth.is_floating_point():
            worth = -self.pos.masked_fill(worth != worth.amin(dim=-1, keepdim=True), -2)
        return worth.argmin(dim=-1, keepdim=True)

    def _worst_first(self, worth: Tensor) -> Tensor:
        """Slots in the order in which they would leave: lowest worth first, among equals the latest."""
        latest_first = self.pos.argsort(dim=-1, descending=True, stable=True)
        return latest_first.gather(-1, worth.gather(-1, latest_first).argsort(dim=-1, stable=True))

    def free_slots(self, T: int) -> Tensor:
        """The first g * T empty slots of each set, (L, B, P, g * T); of a retired row that is full, any."""
        if T * self.heads == 1:
            return self.pos.argmin(dim=-1, keepdim=True)
        return (self.pos >= 0).int().argsort(dim=-1, stable=True)[..., : T * self.heads]

    def entering(self, pos: Tensor, slot: Tensor) -> Tensor:
        """Positions (B, T) of new tokens in the shape of their slots (L, B, P, g * T), head by head."""
        return pos.repeat(1, self.heads)[None, :, None].expand(slot.shape)

    def write_positions(self, slot: Tensor, pos: Tensor, live: Tensor | None) -> None:
        """Put new tokens into their slots, with statistics of 0; rows that are not `live` stay.

        Args:
            slot: (L, B, P, g * T). pos: (B, T). live: (B,), None for all.
        """
        self._put(self.pos, slot, self.entering(pos, slot), live)
        if self.owner is not None:
            heads = torch.arange(self.heads, device=slot.device).repeat_interleave(pos.size(1))
            self._put(self.owner, slot, heads.expand(slot.shape), live)
        for statistic in self.statistics.values():
            self._put(statistic, slot, statistic.new_zeros(()).expand(slot.shape), live)

    @staticmethod
    def _put(buffer: Tensor, slot: Tensor, x: Tensor, live: Tensor | None) -> None:
        if live is not None:
            x = torch.where(live.view(1, -1, 1, 1), x, buffer.gather(-1, slot))
        scatter(buffer, 3, slot, x)

    def add_received(self, name: str, received: Tensor, live: Tensor | None) -> None:
        """Note the attention that slots received in a step, (L, B, P, n) of the first n: sum "mass", replace "last"."""
        statistic = self._buffers[f"statistic_{name}"][..., : received.size(-1)]  # type: ignore[index]
        if live is not None and name == "mass":
            received = received * live.view(1, -1, 1, 1)
        elif live is not None:
            received = torch.where(live.view(1, -1, 1, 1), received, statistic)
        if name == "mass":
            statistic.add_(received)
        else:
            statistic.copy_(received)

    def enter_own(self, values: list[Mapping[str, Tensor]], slot: Tensor, live: Tensor | None) -> None:
        """Note the strategy's own statistics of new tokens: of each layer by name, (B, P, T) or (B, G, T)."""
        for name in values[0]:
            entered = torch.stack([self.own(own[name]) for own in values])
            if self.owner is not None:
                entered = entered.unflatten(2, (-1, self.heads)).flatten(3, 4)  # (L, B, P, g * T)
            buffer = self._buffers[f"statistic_{name}"]
            self._put(buffer, slot, entered.to(buffer.dtype).expand(slot.shape), live)  # type: ignore[arg-type,union-attr]

    def update_own(
        self, now: Tensor, prompt_length: Tensor, readers: Sequence[TokenReader], live: Tensor | None
    ) -> None:
        """Let the strategy update its own statistics of all slots."""
        changed = [self.strategy.update(tokens) for tokens in self.tokens(now, prompt_length, readers)]
        for name in changed[0]:
            values = torch.stack([own[name] for own in changed])
            values = values.view(*self.pos.shape[:2], -1, self.size)
            if self.owner is not None:
                values = pool.of_owner(values, self.owner, self.heads)
            buffer = self._buffers[f"statistic_{name}"]
            values = values.to(buffer.dtype)  # type: ignore[union-attr]
            buffer.copy_(values if live is None else torch.where(live.view(1, -1, 1, 1), values, buffer))  # type: ignore[union-attr,arg-type]

    def own(self, x: Tensor) -> Tensor:
        """A strategy's own statistic of new tokens, (B, P or G, T), a set: where heads choose together, their mean."""
        return self.per_set(x) if x.size(-2) == self.layers[0].groups else x

    @property
    def enters(self) -> bool:
        """Whether the strategy looks at tokens when they enter."""
        return self.strategy.reads_on_entry

    @property
    def updates(self) -> bool:
        """Whether the strategy looks at tokens after attention."""
        return type(self.strategy).update is not Strategy.update

    # -- prompts -----------------------------------------------------------------------------------------------------

    def select_prompt(self, score: Tensor | None, length: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Choose what stays of right-padded prompts.

        Args:
            score: (B, P, T), for pools (B, G, T); None where the prompt fits, or for recency.
            length: (B,) real tokens of each row. T: Tokens of the padded prompts.

        Returns:
            Indices of the kept tokens (into T; with pools into g * T, head by head), their positions (-1 for a pad,
            which come last), and their owners (None without pools); all (B, P, n), n = g * min(T, slots).
        """
        B, sets = length.size(0), self.pos.size(2)
        pos = torch.arange(T, device=length.device)
        end = length.view(-1, 1, 1)
        if self.owner is not None:
            if score is None:
                score = length.new_zeros(B, sets * self.heads, T, dtype=torch.float32)
            padded = pos.expand(score.shape).masked_fill(pos >= end, -1)
            worth = self.worth(score, padded, length - 1, length)
            index = pool.best(worth, padded, self.heads, self.size, self.plan.floor, self.strategy.comparable)
            pads_last = (index % T >= end).int().argsort(dim=-1, stable=True)  # the slots of a row fill without gaps
            index = index.gather(-1, pads_last)
            kept = index % T
            return index, kept.masked_fill(kept >= end, -1), index // T
        index = pos.expand(B, sets, T)
        if T > self.plan.slots:
            padded = index.masked_fill(index >= end, -1)
            worth = self.worth(padded if score is None else score, padded, length - 1, length)
            order = worth.argsort(dim=-1, descending=True, stable=True)
            index = order[..., : self.size].sort(dim=-1).values
        return index, index.masked_fill(index >= end, -1), None

    def seed(
        self, stack_index: int, index: Tensor, pos: Tensor, owner: Tensor | None, statistics: Mapping[str, Tensor]
    ) -> None:
        """Take the tokens chosen by `select_prompt` as the slots of one layer of the stack.

        `statistics` by name are (B, P, T), for pools (B, G, T).
        """
        n = index.size(-1)
        self.pos[stack_index, ..., :n] = pos
        if self.owner is not None and owner is not None:
            self.owner[stack_index, ..., :n] = owner
        for name, values in statistics.items():
            if self.owner is not None:
                values = values.unflatten(1, (-1, self.heads)).flatten(2, 3)  # (B, P, g * T)
            buffer = self._buffers[f"statistic_{name}"]
            buffer[stack_index, ..., :n] = values.gather(-1, index).to(buffer.dtype).masked_fill(pos < 0, 0.0)  # type: ignore[index,union-attr]

    def per_set(self, received: Tensor) -> Tensor:
        """Attention (..., G, N) as the sets see it, (..., P, N): heads that choose together share their mean."""
        if self.sharing is not None:
            return self.sharing.mass(received, self.per_head)
        return received if self.per_head else received.mean(dim=-2, keepdim=True)

    def prompt_score(self, tokens: Tokens) -> Tensor:
        """What the tokens of a prompt are worth, (B, P, T); for pools (B, G, T)."""
        score = self._one_choice(self._score(tokens))
        return self.sharing.score(score, self.per_head) if self.sharing is not None and self.strategy.needs else score

    def reset(self, rows: Tensor | slice) -> None:
        """Empty rows."""
        self.pos[:, rows] = -1
        for statistic in self.statistics.values():
            statistic[:, rows] = 0
        if self.owner is not None:
            self.owner[:, rows] = 0

    def count(self) -> list[int]:
        """Tokens that a set of each row holds, a head (a copy from the device)."""
        return ((self.pos >= 0).sum(dim=-1).amax((0, 2)) // self.heads).tolist()

    def kept_per_head(self) -> Tensor:
        """(B,) the most tokens of each row that any head holds."""
        pos = self.pos if self.owner is None else pool.per_head(self.pos, self.owner, self.heads, -1)
        return (pos >= 0).sum(-1).amax((0, 2))
