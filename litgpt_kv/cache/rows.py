"""Some rows of a cache as a cache of their own: views that share its memory, and copies.

Every buffer of a cache has a dimension of rows, which its module names as `row_dim` (0 by default).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

FOLLOWING = {"dtype", "_device"}  # attributes of a storage that `cache.to(...)` changes besides its buffers


class RowViews:
    """The views that were made of a cache, and what a view was made of.

    Attributes:
        made: Views by their first row and the row after the last. source: Of a view: the modules that it shows
            rows of.
        start, stop: Of a view: its rows. moves: How often buffers had been replaced when this cache last looked.
    """

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
    for layer in view.layers:
        layer.keys.changed()
        layer.values.changed()
    number, of, host = cache.clock.rows[row], state.clock.rows[0], state.clock.host
    for name in ("seen", "prompt", "interrupted"):
        getattr(cache.clock.host, name)[number] = getattr(host, name)[of]
    for fill, theirs in zip(cache.clock.host.fill, host.fill):
        fill[number] = theirs[of]
    cache.clock.set_live([row], True)


def refresh(cache: Any, views: RowViews) -> None:
    """Let a view take its rows of buffers that were replaced, as `cache.to(...)` does, since it was made."""
    moves = cache.clock.host.moves
    if views.moves != moves:
        views.moves = moves
        for module, source in zip(cache.children(), views.source):
            take_rows(module, source, views.start, views.stop)


def reset_rows(modules: Iterable[nn.Module], rows: Tensor | None) -> None:
    """Empty the rows (n,) of slots, storages and rings, each on the device of its buffers; None: all rows."""
    for module in (part for whole in modules for part in whole.modules()):
        if hasattr(module, "reset"):
            module.reset(slice(None) if rows is None else rows.to(next(module.buffers()).device))


def allocated(cache: Any) -> dict[str, int]:
    """Do the work of `KVCache.allocated`."""
    own = sum(s.nbytes for slots in cache.slots for s in slots.statistics.values())
    size = {
        "keys": sum(bytes_of(layer.keys) for layer in cache.layers),
        "values": sum(bytes_of(layer.values) for layer in cache.layers),
        "positions": bytes_of(cache.slots) + bytes_of(cache.clock) - own,
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
