"""Many prompts through few rows: a row that ends makes room for the next prompt at once. Floor 5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.generate.base import check, run_rows, runner
from litgpt_kv.generate.loop import Stats
from litgpt_kv.generate.request import Request, Row
from litgpt_kv.generate.runners import Limits, Model


def serve(
    model: Model,
    requests: Iterable[Request | Row],
    cache: KVCache | None,
    *,
    rows: int | None = None,
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    decoder: Model | None = None,
    stats: Stats | None = None,
    logprobs: bool = False,
) -> Iterator[list[Row]]:
    """Answers any number of requests, as many at a time as the cache has rows.

    Each prompt is read on its own, into a free row or that of one that ended, while the others wait: its first tokens
    in one pass, as many as the budget allows, the rest in blocks where that changes nothing, else token by token beside
    the others. With `prefill` "full" the first ones are read together and all in one pass each. A row gives what its
    prompt gives alone, whenever it comes.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        requests: Taken from the iterator only when a row is free, so that it may be endless. A `Row` is a request with
            an index, or a text stream, of its own.
        cache: Empty. None: no cache, every text is computed again at every step.
        rows: Rows without a cache; with one, its batch size.
        prefill, prefill_chunk, decoder, stats, logprobs: As in `stream`.

    Yields:
        For each draw the rows that took part in it: `new` tokens of each, and its `reason` when it ended.

    Raises:
        ValueError: Before the first step for the first requests; later when a request is taken that does not fit.
    """
    size = rows if cache is None else cache.batch_size
    if size is None or size < 1 or rows not in (None, size):
        raise ValueError(f"rows must be at least 1, and the cache's batch size if there is one, got {rows}.")
    run = runner(model, cache, size, prefill, prefill_chunk, decoder, together=False)
    if any(run.seen):
        raise ValueError(f"serve needs an empty cache; tokens seen are {run.seen}: call reset() first.")
    waiting = numbered(requests)
    first = list(islice(waiting, size))
    if first:  # a cache larger than there are requests: the rows left over have ended before they began
        first += [Row(first[0].request, -1, reason="empty") for _ in range(size - len(first))]
    return run_rows(run, first, checked(waiting, run.limits), Stats() if stats is None else stats, logprobs)


def numbered(requests: Iterable[Request | Row]) -> Iterator[Row]:
    for index, request in enumerate(requests):
        yield Row(request, index) if isinstance(request, Request) else request


def checked(rows: Iterable[Row], limits: Limits) -> Iterator[Row]:
    for row in rows:
        check(row.request, limits, f"Prompt {row.index}")
        yield row
