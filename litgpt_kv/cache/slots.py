"""Which token is in which slot: choosing, protecting, evicting and counting, on positions and ranks alone. Floor 3.

L layers that share a strategy and a budget (stacked, so that a decode step does their bookkeeping at once) · B rows ·
P sets of kept tokens (1, or one a key/value head) · S slots (the budget) · T new tokens · N keys attended to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from litgpt_kv.cache.plan import Plan
from litgpt_kv.cache.strategies.base import Seen, Strategy
from litgpt_kv.config import LayerFacts

LAST = torch.iinfo(torch.int64).max


class Sharing(Protocol):
    """What slots ask for where other devices hold a layer's other heads. Each process of a run asks the same."""

    def mass(self, mass: Tensor, per_head: bool) -> Tensor:
        """Attention (..., G, S) that this device's query heads paid, to that of all: (..., G, S), or for one choice
        for all heads (..., 1, S)."""

    def rank(self, rank: Tensor, per_head: bool) -> Tensor:
        """Ranks (..., P, S) made from this device's keys and queries, to the mean over all devices with a say."""


class Slots(nn.Module):
    """The slots of a stack of layers: `pos` (L, B, P, S), -1 where empty, and `rank` (L, B, P, S), -inf where empty.

    A strategy that ranks by recency keeps the same tokens in every layer and head, so L and P are 1 and its rank is
    `pos` itself, an integer, exact however long the stream.
    """

    row_dim: ClassVar[int] = 1
    rank: Tensor | None
    sharing: Sharing | None = None

    def __init__(
        self,
        plan: Plan,
        layers: tuple[LayerFacts, ...],
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.strategy, self.layers, self.size = plan.strategy, layers, plan.slots
        self.sinks, self.recent, self.window = plan.sinks, plan.recent, plan.window
        strategy = plan.strategy
        stack = 1 if strategy.recency else len(layers)
        heads = layers[0].groups if strategy.per_head and not strategy.recency else 1
        shape = (stack, batch_size, heads, plan.slots)
        self.register_buffer("pos", torch.full(shape, -1, dtype=torch.int64, device=device), persistent=False)
        rank = None if strategy.recency else torch.full(shape, float("-inf"), dtype=dtype, device=device)
        self.register_buffer("rank", rank, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        """Moves with the module, but ranks are never cast: sums in bfloat16 stop growing at 128."""
        self.pos = fn(self.pos)
        if self.rank is not None:
            moved = fn(self.rank)
            self.rank = moved if moved.dtype == self.rank.dtype else self.rank.to(moved.device)
        return self

    def place(self, layer: int) -> int:
        """Where in the stack layer number `layer` of this group stands."""
        return 0 if self.strategy.recency else layer

    def choose(self, now: Tensor, count: int) -> Tensor:
        """The slots (L, B, P, count) that new tokens take, lowest rank first; `now` (B,): the newest one's position."""
        pos, now = self.pos, now.view(1, -1, 1, 1)
        worth, best = (pos, LAST) if self.rank is None else (self.rank, float("inf"))
        if self.sinks or self.recent > 1:
            safe = (pos >= 0) & ((pos < self.sinks) | (pos > now - self.recent))
            worth = worth.masked_fill(safe, best)
        if self.window is not None:  # what has left a sliding window is of no use, whoever protects it
            worth = worth.masked_fill(pos <= now - self.window, -1 if self.rank is None else float("-inf"))
        if count > 1:
            latest_first = pos.argsort(dim=-1, descending=True, stable=True)
            order = worth.gather(-1, latest_first).argsort(dim=-1, stable=True)
            return latest_first.gather(-1, order)[..., :count]
        if self.rank is not None:  # among equals the latest goes; equal empties, all at -1, fill in order
            worth = -pos.masked_fill(worth != worth.amin(dim=-1, keepdim=True), -2)
        return worth.argmin(dim=-1, keepdim=True)

    def put(self, slot: Tensor, pos: Tensor, live: Tensor | None) -> None:
        """Writes the positions (B, T) of new tokens into slots (L, B, P, T); rows that are not `live` stay."""
        entering = pos[None, :, None].expand(slot.shape)
        if live is not None:
            entering = torch.where(live.view(1, -1, 1, 1), entering, self.pos.gather(-1, slot))
        self.pos.scatter_(-1, slot, entering)

    def rerank(
        self, slot: Tensor, entered: list[Tensor], masses: list[Tensor], now: Tensor, live: Tensor | None
    ) -> None:
        """After attention: new tokens' ranks [L x (B, P, T)] are entered, then all are updated, L layers at once."""
        if self.rank is None:
            return
        entering = self._agreed(torch.stack(entered).to(self.rank.dtype))
        rank = self.rank.scatter(-1, slot, entering)  # (L, B, P, S)
        if type(self.strategy).update is not Strategy.update:
            fold = (-1, *rank.shape[2:])  # layers are rows to a strategy
            seen = Seen(pos=self.pos.reshape(fold), now=now.repeat(rank.size(0)), prompt=False, layer=None)
            if masses:
                seen.mass = self._observed(torch.stack(masses)).reshape(fold)  # of (L, B, G, S)
            rank = self.strategy.update(rank.view(fold), seen).view(rank.shape)
        rank = rank.masked_fill(self.pos < 0, float("-inf"))
        self.rank.copy_(rank if live is None else torch.where(live.view(1, -1, 1, 1), rank, self.rank))

    def keep(self, worth: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses what stays of right-padded prompts: worth (B, P, T), length (B,).

        Returns:
            The kept tokens' indices into the prompt and their positions (-1 for a pad), both (B, P, n), n = min(T, S),
            in the order of the text.
        """
        B, P, T = worth.shape
        pos = torch.arange(T, device=worth.device).expand(B, P, T)
        end = length.view(-1, 1, 1)
        if T > self.size:
            best, least = (LAST, -1) if self.rank is None else (float("inf"), float("-inf"))
            worth = worth.masked_fill((pos < self.sinks) | (pos > end - 1 - self.recent), best)
            if self.window is not None:
                worth = worth.masked_fill(pos <= end - 1 - self.window, least)
            worth = worth.masked_fill(pos >= end, least)
            order = worth.argsort(dim=-1, descending=True, stable=True)
            pos = order[..., : self.size].sort(dim=-1).values
        return pos, pos.masked_fill(pos >= end, -1)

    def seed(self, place: int, index: Tensor, pos: Tensor, rank: Tensor | None) -> None:
        """Takes the tokens chosen by `keep`, with their ranks (B, P, T), as the slots of one layer of the stack."""
        n = index.size(-1)
        self.pos[place, :, :, :n] = pos
        if self.rank is not None and rank is not None:
            chosen = rank.gather(-1, index).to(self.rank.dtype)
            self.rank[place, :, :, :n] = chosen.masked_fill(pos < 0, float("-inf"))

    def reset(self, rows: Tensor | slice) -> None:
        """Empties rows."""
        self.pos[:, rows] = -1
        if self.rank is not None:
            self.rank[:, rows] = float("-inf")

    def prompt_rank(self, seen: Seen) -> Tensor:
        """The rank (B, P, T) with which a prompt's tokens enter, or their integer position for recency."""
        if self.rank is None:
            return seen.pos
        if seen.mass is not None:
            seen = replace(seen, mass=self._observed(seen.mass))
        return self._agreed(self.strategy.enter(seen).to(self.rank.dtype))

    def _observed(self, mass: Tensor) -> Tensor:
        """Mass (..., G, T) as the strategy sees it, (..., P, T): heads that share one choice share their mean."""
        if self.sharing is not None:
            return self.sharing.mass(mass, self.strategy.per_head)
        return mass if self.pos.size(2) > 1 else mass.mean(dim=-2, keepdim=True)

    def _agreed(self, rank: Tensor) -> Tensor:
        """Ranks (..., P, T) that a strategy worked out; devices that keep the same tokens agree on them."""
        if self.sharing is None or type(self.strategy).enter is Strategy.enter:
            return rank
        return self.sharing.rank(rank, self.strategy.per_head)
