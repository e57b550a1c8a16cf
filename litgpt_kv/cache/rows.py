"""Some rows of a cache as a cache of their own: views that share its memory, and copies.

Every buffer of a cache has a dimension of rows, which its module names as `row_dim` (0 by default).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from litgpt_kv.cache.door import check_rows, check_static
from litgpt_kv.cache.table import Table

FOLLOWING = {"dtype", "_device", "device"}  # attributes that `cache.to(...)` changes besides buffers


class RowViews:
    """The views that were made of a cache, and what a view was made of.

    Attributes:
        made: Views by their first row and the row after the last. source: Of a view: the modules that it shows
            rows of.
        start, stop: Of a view: its rows. moves: How often buffers had been replaced when this cache last looked.
        parts: Of a cache of one row: how its slots are dealt out and what `parts_of` made of that.
    """

    parts: tuple[Any, Any] = (None, None)

    def __init__(self, source: Sequence[nn.Module] = (), start: int = 0, stop: int = 0, moves: int = 0) -> None:
        self.made: dict[tuple[int, int], Any] = {}
        self.source, self.start, self.stop, self.moves = source, start, stop, moves


def view_of(cache: Any, views: RowViews, start: int, stop: int) -> Any:
    """The rows `start` to `stop` - 1 of a cache as a cache that shares its memory; the same object each time."""
    if (start, stop) not in views.made:
        view = with_rows(cache, lambda buffer, dim: buffer.narrow(dim, start, stop - start))
        view.clock.rows = cache.clock.rows[start:stop]
        view._views = RowViews(list(cache.children()), start, stop, views.moves)
        views.made[start, stop] = view
    return views.made[start, stop]


def parts_of(cache: Any) -> tuple[list[Any], list[Any], list[int], list[int]]:
    """The slots of each group of layers of a cache of one row, its layers, the group of each, and the number by which
    its clock knows each group; each layer of a `Table` is a group of its own."""
    if not any(isinstance(slots, Table) for slots in cache.slots):
        return list(cache.slots), list(cache.layers), cache.group_of, list(range(len(cache.slots)))
    views, clock = cache._views, cache.clock
    dealt = clock.host.moves, [clock.sizes(g, 0) for g in range(len(cache.slots))]
    if views.parts[0] != dealt:
        groups, layers, group_of, fill_of = [], list(cache.layers), list(cache.group_of), []
        for g, (slots, sizes) in enumerate(zip(cache.slots, dealt[1])):
            members = [i for i, group in enumerate(cache.group_of) if group == g]
            own = [slots]
            if isinstance(slots, Table):
                own, parts = slots.part([layers[i] for i in members], 0, sizes)
                for i, part in zip(members, parts):
                    layers[i] = part
            for place, i in enumerate(members):
                group_of[i] = len(groups) + (place if isinstance(slots, Table) else 0)
            groups += own
            fill_of += [g] * len(own)
        views.parts = dealt, (groups, layers, group_of, fill_of)
    return views.parts[1]


def storages_of(cache: Any) -> list[tuple[Any, Any]]:
    """Every pair of storages of keys and values: of each layer that has its own, and of each `Table`."""
    owners = [*cache.layers, *cache.slots]
    return [(owner.keys, owner.values) for owner in owners if "keys" in owner._modules]


def repeated(cache: Any, count: int) -> Any:
    """A copy of a cache in which every row stands `count` times, side by side."""
    copy = with_rows(cache, lambda buffer, dim: buffer.repeat_interleave(count, dim))
    copy._views = RowViews()
    copy.clock.host = cache.clock.host.repeated(cache.clock.rows, count)
    copy.clock.rows = range(copy.clock.pos.size(0))
    return copy


def restore_row(cache: Any, row: int, state: Any) -> None:
    """Do the work of `KVCache.restore`."""
    view = cache.row(row)
    own, other = (dict(x.named_buffers()) for x in (view, state))
    if state.fingerprint != cache.fingerprint or state.batch_size != 1:
        raise ValueError("A row takes the state of one row of a cache of the same model.")
    if {name: (b.shape, b.dtype) for name, b in own.items()} != {name: (b.shape, b.dtype) for name, b in other.items()}:
        raise ValueError("A row takes the state of a row of a cache with the same settings.")
    for name, buffer in own.items():
        buffer.copy_(other[name])
    for pair in storages_of(view):
        for storage in pair:
            storage.changed()
    number, of, host = cache.clock.rows[row], state.clock.rows[0], state.clock.host
    for name in ("seen", "prompt", "interrupted"):
        getattr(cache.clock.host, name)[number] = getattr(host, name)[of]
    for name in ("fill", "sizes"):
        for own_group, their_group in zip(getattr(cache.clock.host, name), getattr(host, name)):
            own_group[number] = their_group[of]
    cache.clock.set_live([row], True)
    if state.clock.static and not cache.clock.static:  # whose host does not know how far its rows are
        recount(view)


def refresh(cache: Any, views: RowViews) -> None:
    """Let a view take its rows of buffers that were replaced, as `cache.to(...)` does, since it was made."""
    moves = cache.clock.host.moves
    if views.moves != moves:
        views.moves = moves
        for module, source in zip(cache.children(), views.source):
            take_rows(module, source, views.start, views.stop)


def reset_rows(cache: Any, rows: Sequence[int] | Tensor | None) -> None:
    """Empty the rows of slots, storages and rings, each on the device of its buffers; None: all rows."""
    chosen = check_rows(range(cache.batch_size) if rows is None else rows, cache.batch_size)
    index = None if rows is None else cache.clock.index(chosen)
    for module in (part for whole in (*cache.slots, *cache.layers) for part in whole.modules()):
        if hasattr(module, "reset"):
            module.reset(slice(None) if index is None else index.to(next(module.buffers()).device))
    cache.clock.reset(chosen)


def set_static(cache: Any, value: bool) -> None:
    """Set `KVCache.static`."""
    check_static(cache.plans, value)
    if cache.clock.static and not value:
        recount(cache)
    cache.clock.host.static = value


def recount(cache: Any) -> None:
    """Do the work of `KVCache.recount`."""
    cache.clock.recount([slots.count() for slots in cache.slots])
    for g, slots in enumerate(cache.slots):
        if isinstance(slots, Table):
            for row, sizes in enumerate(slots.read_sizes()):
                cache.clock.set_sizes(g, row, sizes)


def allocated(cache: Any) -> dict[str, int]:
    """Do the work of `KVCache.allocated`."""
    own = sum(s.nbytes for slots in cache.slots for s in slots.statistics.values())
    books = sum(buffer.nbytes for slots in cache.slots for buffer in slots.buffers(recurse=False))
    size = {
        "keys": sum(bytes_of(keys) for keys, _ in storages_of(cache)),
        "values": sum(bytes_of(values) for _, values in storages_of(cache)),
        "positions": books + bytes_of(cache.clock) - own,
        "statistics": own + sum(bytes_of(layer.ring) for layer in cache.layers if layer.ring is not None),
    }
    return {**size, "total": sum(size.values())}


def with_rows(module: nn.Module, change: Callable[[Tensor, int], Tensor]) -> Any:
    """A shallow copy of a tree of modules in which every buffer is changed along its dimension of rows."""
    copy = module.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    dim = getattr(module, "row_dim", 0)
    copy._buffers = {k: t if t is None else change(t, dim) for k, t in module._buffers.items()}
    copy._modules = {k: with_rows(m, change) for k, m in module._modules.items() if m is not None}
    return copy


def take_rows(module: nn.Module, source: nn.Module, start: int, stop: int) -> None:
    """Let a tree made by `with_rows` show the rows `start` to `stop` - 1 of the buffers that `source` has now."""
    dim = getattr(module, "row_dim", 0)
    for name in FOLLOWING & source.__dict__.keys():
        module.__dict__[name] = source.__dict__[name]
    for name, buffer in source._buffers.items():
        module._buffers[name] = buffer if buffer is None else buffer.narrow(dim, start, stop - start)
    for name, child in source._modules.items():
        if child is not None:
            take_rows(module._modules[name], child, start, stop)  # type: ignore[arg-type]


def bytes_of(module: nn.Module) -> int:
    """Bytes of all buffers of a tree of modules."""
    return sum(buffer.nbytes for buffer in module.buffers())
