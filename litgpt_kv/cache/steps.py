"""Begin a decode step of a cache: of all rows at once, or row by row where layers have sizes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from litgpt_kv.attention.rope import RopeTables
from litgpt_kv.cache.decode import RowsPass, begin_decode, read_length_for
from litgpt_kv.cache.rows import parts_of
from litgpt_kv.cache.table import Table
from litgpt_kv.cache.views import Pass


def begin_step(cache: Any, T: int, rope: RopeTables) -> Pass:
    """Do the work of `KVCache.begin_decode`."""
    if any(isinstance(slots, Table) for slots in cache.slots):
        views = [cache.row(b) for b in range(cache.batch_size)] if cache.batch_size > 1 else [cache]
        return RowsPass.of([_begin_row(view, T, rope) for view in views])
    own = cache.clock, cache.slots, cache.layers, cache.group_of, cache.theta
    return begin_decode(*own, T, rope, cache.evicting, read_length=cache.read_length)


def _begin_row(view: Any, T: int, rope: RopeTables) -> Pass:
    """A decode step of a view of one row, whose layers are parts of a table."""
    groups, layers, group_of, fill_of = parts_of(view)
    return begin_decode(view.clock, groups, layers, group_of, view.theta, T, rope, True, fill_of)


@contextlib.contextmanager
def expecting(cache: Any, seen: int) -> Iterator[None]:
    """Do the work of `KVCache.expect`."""
    room = min((plan.slots for plan in cache.plans if plan.strategy.evicts), default=None)
    length = read_length_for(seen + 1)
    cache.evicting = room is not None and seen >= room
    cache.read_length = length if length < max(plan.slots for plan in cache.plans) else None
    try:
        yield
    finally:
        cache.evicting, cache.read_length = True, None  # right for everyone
