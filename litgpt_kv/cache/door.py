"""What a call may do, checked on the host before anything changes, without waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from litgpt_kv import registry
from litgpt_kv.cache.plan import LayerPlan, check_prompt_kept, check_reread
from litgpt_kv.config import KVCacheArgs, shown


def check_build(args: Any, batch_size: Any, max_tokens: Any) -> KVCacheArgs:
    """What the user asked for, also given as a strategy's name; the sizes must be counts.

    Raises:
        TypeError: If it is something else. ValueError: For "none", which is no cache, and for sizes.
    """
    found = KVCacheArgs.of(args)
    if found is None:
        raise ValueError("kv_cache 'none' keeps nothing: there is no cache to build.")
    check_count("batch_size", batch_size)
    check_count("max_tokens", max_tokens)
    return found


@contextlib.contextmanager
def refused_without_memory(size: Callable[[], dict[str, int]], batch_size: int) -> Iterator[None]:
    """Around the making of a cache: raise ValueError, with its `size` in bytes, if there is no memory for it."""
    try:
        yield
    except RuntimeError as error:  # on a CPU torch has no class of its own for that
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            f"A cache of {size()['total']:,} bytes does not fit the memory: {batch_size} rows; a budget, fewer rows or "
            "another storage take less."
        ) from error


def own_pools(args: KVCacheArgs, groups: int, devices: int) -> KVCacheArgs:
    """The arguments of one device's part of a cache: pools lie within devices, which have equal parts of them.

    Args:
        args: Of the whole cache. groups: Key/value heads of the whole model, divided among `devices`.

    Raises:
        ValueError: If a pool would cross devices.
    """
    names = args.strategy if isinstance(args.strategy, (list, tuple)) else [args.strategy]
    selects = {args.select or registry.build("strategy", n).select for n in names if n in registry.names("strategy")}
    parts = min(groups, devices)  # more devices: each has one key/value head, and others have it, too
    if "pool" not in selects or groups == 1:
        return args
    if args.pools % parts or groups % parts:
        able = ", ".join(str(n) for n in range(parts, groups + 1, parts) if groups % n == 0)
        raise ValueError(
            f"pools {args.pools} would cross devices: the {groups} key/value heads of a layer are divided among "
            f"{devices}. pools must be a multiple of {parts} that divides the heads: {able or 'there is none'}; select "
            "'head' needs none."
        )
    return replace(args, pools=args.pools // parts)


def check_one_device(plans: Iterable[LayerPlan], devices: int) -> None:
    """Raise ValueError if layers choose together and their heads are divided among several devices."""
    if devices > 1 and any(plan.select == "model" for plan in plans):
        raise ValueError(
            f"select 'model' deals out the slots of all heads, which must be on one device: they are divided among "
            f"{devices}. select 'head' and 'layer' run on any number, and data_parallel has all heads on each device."
        )


def check_static(plans: Iterable[LayerPlan], static: bool) -> None:
    """Raise ValueError if a static cache has layers whose sizes depend on the text, or that wait for the host."""
    if not static:
        return
    plans = list(plans)
    if any(plan.select == "model" for plan in plans):
        raise ValueError(
            "select 'model' gives layers sizes that depend on the text: a compiled model, whose shapes are fixed, "
            "takes 'head', 'layer' or 'pool'."
        )
    refused = [plan.storage for plan in plans if not registry.get("storage", plan.storage).capturable]
    if refused:
        able = [name for name in registry.names("storage") if registry.get("storage", name).capturable]
        raise ValueError(
            f"A compiled model cannot wait for copies between the device and the host, which the storage "
            f"{refused[0]!r} makes at each step: run it without compiling, or store tokens as {', '.join(able)}."
        )


def check_count(name: str, value: Any, most: int = 2**31 - 1) -> None:
    """Raise ValueError if a value is not a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        limit = "at least 1" if isinstance(value, int) and value < 1 else f"a whole number from 1 to {most}"
        raise ValueError(f"{name} must be {limit}, got {shown(value)}.")


def check_rows(rows: Iterable[int] | Tensor, batch_size: int) -> list[int]:
    """Row numbers as a list.

    Args:
        rows: Numbers, or a mask (B,) of rows.

    Raises:
        ValueError: If one is not in the cache.
    """
    if isinstance(rows, Tensor):
        if rows.dtype == torch.bool and rows.shape != (batch_size,):
            raise ValueError(f"A mask of rows has shape ({batch_size},), got {tuple(rows.shape)}.")
        rows = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist()
    if not isinstance(rows, Iterable):
        raise ValueError(f"Rows are a list of row numbers, got {shown(rows)}.")
    rows = list(rows)
    if bad := [b for b in rows if isinstance(b, bool) or not isinstance(b, int) or not 0 <= b < batch_size]:
        raise ValueError(f"The cache has rows 0 to {batch_size - 1}, got {shown(bad[0])}.")
    return rows


def check_prompts(cache: Any, lengths: dict[int, int]) -> None:
    """Raise ValueError unless `lengths` are of rows, and a prompt that is to be kept fits the budget."""
    check_rows(list(lengths), cache.batch_size)
    check_prompt_kept(cache.plans, max(lengths.values(), default=0))


def check_range(start: int, stop: int, batch_size: int) -> None:
    """Raise IndexError or ValueError unless `start` to `stop` - 1 are rows."""
    check_rows([start, stop - 1 if isinstance(stop, int) else stop], batch_size)
    if start >= stop:
        raise ValueError(f"rows must start before they stop, got {start} and {stop}.")


def check_pieces(length: int, context: int, rereads: bool) -> None:
    """Raise ValueError if a prompt cannot be read in pieces: longer than the model's context, or to be read twice."""
    if rereads:
        raise ValueError("A strategy that reads prompts twice reads them in one pass, not in pieces.")
    if length > context:
        raise ValueError(
            f"A prompt of {length} tokens is over the limit of {context}: the model's context. "
            "The min-length prefill reads longer prompts into a cache that evicts."
        )


def check_prompt(cache: Any, T: int, length: Tensor) -> list[int]:
    """The lengths of prompts that are to seed the rows of a `KVCache`.

    Args:
        T: Tokens of the padded prompts. length: (B,).

    Raises:
        ValueError: If a row is not empty, or a prompt does not fit.
    """
    clock, plans, limit, why = cache.clock, cache.plans, cache.limit, cache.why
    batch_size = clock.pos.size(0)
    if not isinstance(length, Tensor) or tuple(length.shape) != (batch_size,):
        raise ValueError(f"length must have shape ({batch_size},), one a row, got {getattr(length, 'shape', length)}.")
    lengths = length.tolist()
    if min(lengths) < 1 or max(lengths) > T:
        bad = min(lengths) if min(lengths) < 1 else max(lengths)
        raise ValueError(f"Every row's prompt must have 1 to {T} tokens, got {bad}.")
    clock.check_whole("A prefill", range(batch_size))
    seen, alive = clock.seen, clock.alive
    if any(seen) or not all(alive):
        what = f"tokens seen are {seen}" if any(seen) else f"row {alive.index(False)} is retired"
        raise ValueError(f"A prompt needs empty rows; {what}: call reset() first.")
    if limit is not None and max(lengths) > limit:
        raise ValueError(f"A prompt of {max(lengths)} tokens is over the limit of {limit}: {why}.")
    check_prompt_kept(plans, max(lengths))
    check_reread(plans, max(lengths), cache.context)
    return lengths


def check_step(cache: Any, T: int) -> None:
    """Refuse T more tokens a row of a `KVCache` that do not fit, or a row that a step left half-way.

    Raises:
        ValueError: With the row and the limit. In static mode a row over the limit is an assertion on the device.
    """
    clock, longest_block, limit, why = cache.clock, cache.longest_block, cache.limit, cache.why
    if T < 1:
        raise ValueError("A step needs at least one token a row, got none.")
    if T > longest_block:
        hint = "" if any(clock.seen) else " To read a prompt into an empty cache give its length, too."
        raise ValueError(
            f"A block of {T} tokens is longer than the {longest_block} a layer can take (budget less sinks).{hint}"
        )
    if clock.static:
        if limit is not None:
            fits = ((clock.pos + T <= limit) | ~clock.live).all()
            torch._assert_async(fits, f"A row is over the limit of {limit} tokens: {why}.")
        return
    seen, alive = clock.seen, clock.alive
    clock.check_whole("A step", [row for row, live in enumerate(alive) if live])
    for row, n in enumerate(seen):
        if limit is not None and alive[row] and n + T > limit:
            raise ValueError(f"Row {row} would see {n + T} tokens, over the limit of {limit}: {why}.")


def check_by_token(groups: Iterable[Any], seen: int, tokens: Any, statistic: str | None) -> None:
    """Refuse fewer tokens than a row has seen, and a statistic that a strategy does not keep.

    Raises:
        ValueError: With the value and what there is.
    """
    check_count("tokens", tokens)
    if tokens < seen:
        raise ValueError(f"tokens must be at least {seen}, what the row has seen, got {tokens}.")
    for slots in groups:
        if statistic is not None and statistic not in slots.names:
            keeps = ", ".join(slots.names) or "none"
            raise ValueError(
                f"{type(slots.strategy).__name__.lower()} keeps no statistic {statistic!r}; it keeps {keeps}."
            )
