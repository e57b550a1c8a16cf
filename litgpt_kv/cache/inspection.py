"""What a row of a cache holds, on the host, for people and tests to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litgpt_kv.cache import door, pool
from litgpt_kv.cache.decode import stored_tokens
from litgpt_kv.cache.readers import StoredTokens
from litgpt_kv.cache.rows import parts_of
from litgpt_kv.cache.slots import Slots


@dataclass(frozen=True)
class HeadContents:
    """The kept tokens of one key/value head, in the order of the text.

    Attributes:
        positions: (n,) int64.
        statistics: By name, (n,).
        scores: (n,) what each is worth to the strategy now; positions for strategies that score by recency.
        keys: (n, D) as they are stored, dequantised; unrotated where `LayerContents.unrotated`.
        values: (n, Dv).
    """

    positions: Tensor
    statistics: dict[str, Tensor]
    scores: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerContents:
    """What one layer holds of a row: `heads`, one for each key/value head; `unrotated` says how keys are stored."""

    heads: list[HeadContents]
    unrotated: bool


@torch.no_grad()
def inspect_row(view: Any) -> list[LayerContents]:
    """`KVCache.inspect`, of a view of one row."""
    clock, rope, out = view.clock, view.rope, []
    groups, layers, group_of, _ = parts_of(view)
    for layer, g in zip(layers, group_of):
        slots, i = groups[g], layer.stack_index
        device = slots.pos.device
        now, prompt_length = (clock.pos - 1).to(device), clock.prompt_length.to(device)
        members = [other for other, group in zip(layers, group_of) if group == g]
        readers: Sequence[StoredTokens] = ()
        if slots.strategy.needs and rope is not None:
            cos, sin = (x.to(device) for x in rope.tables[rope.which[layer.spec.index]])
            readers = stored_tokens(slots, members, now, (cos, sin))
        score = slots.score(now, prompt_length, readers)
        pos, statistics, keys, values = slots.pos[i], slots.statistics, layer.keys, layer.values
        keys, values = (storage.read(slots.size) for storage in (keys, values))
        statistics = {name: s[i] for name, s in statistics.items()}
        score = score[i]
        if slots.owner is not None:
            owner = slots.owner[i]
            pos = pool.per_head(pos, owner, slots.heads, -1)
            statistics = {name: pool.per_head(s, owner, slots.heads, 0.0) for name, s in statistics.items()}
            keys, values = (x.repeat_interleave(slots.heads, dim=1) for x in (keys, values))
        heads = [_head(pos[0], {n: s[0] for n, s in statistics.items()}, score[0], keys[0, h], values[0, h], h)
                 for h in range(layer.spec.groups)]  # fmt: skip
        out.append(LayerContents(heads, layer.stores_unrotated))
    return out


def _head(
    pos: Tensor, statistics: dict[str, Tensor], score: Tensor, keys: Tensor, values: Tensor, head: int
) -> HeadContents:
    """One head of (P, S) positions, statistics and scores; heads that share one set have the same."""
    p = min(head, pos.size(0) - 1)
    order = pos[p].argsort()
    order = order[pos[p][order] >= 0]
    return HeadContents(
        pos[p][order].cpu(),
        {name: s[p][order].cpu() for name, s in statistics.items()},
        score[min(head, score.size(0) - 1)][order].cpu(),
        keys[order].cpu(),
        values[order].cpu(),
    )


@torch.no_grad()
def by_token(view: Any, tokens: int, statistic: str | None) -> Tensor:
    """`KVCache.by_token`, of a view of one row."""
    groups, layers, group_of, _ = parts_of(view)
    door.check_by_token(groups, view.seen[0], tokens, statistic)
    spread = [_spread(slots, tokens, statistic) for slots in groups]
    rows = [spread[g][layer.stack_index] for layer, g in zip(layers, group_of)]
    return torch.stack([x.expand(layer.spec.groups, tokens).to(rows[0].device) for x, layer in zip(rows, layers)])


def _spread(slots: Slots, tokens: int, statistic: str | None) -> Tensor:
    """Slots of one row in the order of the text, (L, P, N), for pools (L, G, N)."""
    pos, owner = slots.pos[:, 0], None if slots.owner is None else slots.owner[:, 0]
    held = torch.ones_like(pos, dtype=torch.bool) if statistic is None else slots.statistics[statistic][:, 0]
    if owner is not None:
        pos, held = (pool.per_head(x, owner, slots.heads, empty) for x, empty in ((pos, -1), (held, 0)))
    out = held.new_zeros(*pos.shape[:2], tokens + 1)  # empty slots write into the last place
    return out.scatter_(-1, pos.masked_fill(pos < 0, tokens), held)[..., :tokens]
