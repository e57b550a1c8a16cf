"""Where a strategy's `Tokens` get keys, values and queries from: fresh tensors of a pass, or the slots of a layer.

B rows · P sets of kept tokens · H query heads · G key/value heads · T tokens · S slots · w queries · D head size ·
E rotated elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from litgpt_kv.attention.masks import cache_positions
from litgpt_kv.attention.rope import Angles, angles_at, rotate, rows_at, unrotate
from litgpt_kv.cache import pool
from litgpt_kv.cache.spec import LayerSpec
from litgpt_kv.cache.storage.base import scatter
from litgpt_kv.cache.strategies.base import LayerConstants


@dataclass(eq=False)
class FreshTokens:
    """The tokens of a prompt or of a step, as the pass has them.

    Attributes:
        spec: The layer.
        rotated, unrotated: (B, G, T, D) keys at their positions, and before rotation, None where nobody kept them.
        v: (B, G, T, Dv) values.
        q: (B, H, n, D) queries at the positions from `first_query` on, rotated as the keys they meet.
        raw_q: The same, unrotated.
        length: (B,) tokens of each row, so that the position of its last query is one less.
        window: How many last queries are of interest.
        constants: Of the layer.
    """

    spec: LayerSpec
    rotated: Tensor
    unrotated: Tensor | None
    v: Tensor
    q: Tensor
    raw_q: Tensor
    length: Tensor
    window: int
    first_query: int = 0
    constants: LayerConstants | None = None

    @property
    def sliding_window(self) -> int | None:
        return self.spec.window

    def held(self, unrotated: bool) -> FreshTokens:
        """The same to be kept for a while: of the queries only those of interest; unrotated keys, or else these are
        made of the rotated ones if anyone asks."""
        (q, _), (raw_q, _) = self.last(self.q), self.last(self.raw_q)
        kept = self.unrotated if unrotated and self.unrotated is not None else None
        return replace(
            self,
            rotated=_alone(self.rotated),
            unrotated=None if kept is None else _alone(kept),
            v=_alone(self.v),
            q=q,
            raw_q=raw_q,
        )

    def row(self, b: int, n: int) -> FreshTokens:
        """One row of `held` ones, of `n` tokens, without pads."""
        count = min(n, self.q.size(2))
        rotated, v = (x[b : b + 1, :, :n] for x in (self.rotated, self.v))
        unrotated = None if self.unrotated is None else self.unrotated[b : b + 1, :, :n]
        q, raw_q = (x[b : b + 1, :, x.size(2) - count :] for x in (self.q, self.raw_q))
        tensors = dict(rotated=rotated, unrotated=unrotated, v=v, q=q, raw_q=raw_q)
        return replace(self, **tensors, length=self.length[b : b + 1], first_query=n - count)

    def keys(self) -> Tensor:
        return torch.cat((self.rotated, self.v), dim=-1) if self.spec.latent else self.rotated

    def unrotated_keys(self) -> Tensor:
        if self.unrotated is not None:
            return self.unrotated
        if self.constants is None:
            raise ValueError("A cache made without its model knows nothing of it: use KVCache.build.")
        pos = torch.arange(self.rotated.size(2), device=self.rotated.device)
        angles = angles_at(self.constants.theta, pos, self.constants.dtype)
        return unrotate(self.rotated, angles, self.spec.rope_size)

    def values(self) -> Tensor:
        return self.v

    def queries(self) -> tuple[Tensor, Tensor]:
        return self.last(self.q)

    def unrotated_queries(self) -> tuple[Tensor, Tensor]:
        return self.last(self.raw_q)

    def distance(self, pos: Tensor, now: Tensor) -> Tensor:
        return now.view(-1, 1, 1) - pos

    def last(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The last `window` queries of each row and their positions, -1 where there are fewer."""
        n = min(self.window, q.size(2))
        pos = self.length.unsqueeze(1) - n + torch.arange(n, device=q.device)  # (B, n)
        index = (pos - self.first_query).clamp(0, max(0, q.size(2) - 1))
        index = index.view(pos.size(0), 1, n, 1).expand(-1, q.size(1), -1, q.size(3))
        return q.gather(2, index), pos.clamp(min=-1)


def _alone(x: Tensor) -> Tensor:
    """The tensor in memory of its own: a part of a larger one, like values of a joint projection, keeps all of it."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


class QueryRing(nn.Module):
    """The last `window` queries of each row: that of position p is in slot p % window.

    Attributes:
        data: (B, H, w, D). pos: (B, w) int64, -1 where empty.
    """

    row_dim: ClassVar[int] = 0
    data: Tensor
    pos: Tensor

    def __init__(
        self, batch_size: int, heads: int, window: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.window = window
        data = torch.zeros(batch_size, heads, window, width, dtype=dtype, device=device)
        self.register_buffer("data", data, persistent=False)
        pos = torch.full((batch_size, window), -1, dtype=torch.int64, device=device)
        self.register_buffer("pos", pos, persistent=False)

    def write(self, q: Tensor, pos: Tensor, live: Tensor | None) -> None:
        """Note queries (B, H, T, D) of the positions (B, T), which are below 0 for what is no query."""
        q, pos = q[:, :, -self.window :], pos[:, -self.window :]
        keep = pos < 0 if live is None else (pos < 0) | ~live.unsqueeze(1)
        slot = pos % self.window
        index = slot.view(*slot.shape[:1], 1, -1, 1).expand(q.shape)
        old = self.data.gather(2, index)
        scatter(self.data, 2, index, torch.where(keep[:, None, :, None], old, q.to(self.data.dtype)))
        scatter(self.pos, 1, slot, torch.where(keep, self.pos.gather(1, slot), pos))

    def reset(self, rows: Tensor | slice) -> None:
        """Forget the queries of rows."""
        self.data[rows], self.pos[rows] = 0, -1


@dataclass(eq=False)
class StoredTokens:
    """The tokens in the slots of one layer.

    Attributes:
        spec: The layer. stores: Its storages of keys and values. ring: Its last queries, or None.
        pos: (B, P, S) positions of the slots. owner: (B, P, S) of a pool, or None. heads: Heads of a pool.
        now: (B,) positions of the newest tokens.
        tables: The layer's rope tables. stores_unrotated: Whether keys are stored unrotated.
        sliding_window: How many tokens back a query sees, None for all.
        constants: Of the layer.
    """

    spec: LayerSpec
    stores: tuple[nn.Module, nn.Module]
    ring: QueryRing | None
    pos: Tensor
    owner: Tensor | None
    heads: int
    now: Tensor
    tables: Angles
    stores_unrotated: bool
    sliding_window: int | None
    constants: LayerConstants | None

    def keys(self) -> Tensor:
        keys = self._read(0)
        if self.stores_unrotated:
            keys = rotate(keys, rows_at(self.tables, cache_positions(self._pos())), self.spec.rope_size)
        return torch.cat((keys, self._read(1)), dim=-1) if self.spec.latent else keys

    def unrotated_keys(self) -> Tensor:
        keys = self._read(0)
        if self.stores_unrotated:
            return keys
        return unrotate(keys, rows_at(self.tables, self._pos()), self.spec.rope_size)

    def values(self) -> Tensor:
        return self._read(1)

    def queries(self) -> tuple[Tensor, Tensor]:
        q, pos = self._ring()
        if self.stores_unrotated:  # as far from the newest token as in the text, which keeps them with their tokens
            newest = (self._pos() >= 0).sum(dim=-1, keepdim=True) - 1  # (B, P, 1)
            place = newest - (self.now.view(-1, 1, 1) - pos.unsqueeze(1))  # (B, P, w), below 0 for some in small caches
            cos, sin = self._angles(place)
            repeats = self.spec.heads // place.size(1) if place.size(1) > 1 else 1
            angles = cos.repeat_interleave(repeats, dim=1), sin.repeat_interleave(repeats, dim=1)
            q = rotate(q, angles, self.spec.rope_size)
        return q, pos

    def unrotated_queries(self) -> tuple[Tensor, Tensor]:
        q, pos = self._ring()
        return (q if self.stores_unrotated else unrotate(q, rows_at(self.tables, pos), self.spec.rope_size)), pos

    def distance(self, pos: Tensor, now: Tensor) -> Tensor:
        if not self.stores_unrotated:
            return now.view(-1, 1, 1) - pos
        return (pos >= 0).sum(dim=-1, keepdim=True) - 1 - cache_positions(pos)

    def _angles(self, pos: Tensor) -> Angles:
        if self.constants is None:
            return rows_at(self.tables, pos)
        return angles_at(self.constants.theta, pos, self.tables[0].dtype)

    def _ring(self) -> tuple[Tensor, Tensor]:
        """The last queries (B, H, w, D) as they are kept, and their positions (B, w), oldest first."""
        if self.ring is None:
            raise ValueError("A strategy that reads queries must say so: list 'queries' in `needs`.")
        q, pos = self.ring.data, self.ring.pos
        order = pos.argsort(dim=-1)
        q = q.gather(2, order.view(order.size(0), 1, -1, 1).expand(q.shape))
        return q, pos.gather(1, order)

    def _pos(self) -> Tensor:
        """Positions (B, P, S), for pools (B, G, S) with the other heads' slots empty."""
        return self.pos if self.owner is None else pool.per_head(self.pos, self.owner, self.heads, -1)

    def _read(self, which: int) -> Tensor:
        x = self.stores[which].read(self.pos.size(-1))
        return x if self.owner is None else x.repeat_interleave(self.heads, dim=1)
