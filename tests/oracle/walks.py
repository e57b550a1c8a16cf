"""Driving the library as generation does, one pass at a time, and reading what its caches hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from litgpt_kv import GPT, KVCache, registry


@torch.no_grad()
def walk(
    model: GPT, cache: KVCache, rows: list[list[int]], prompts: list[int], way: str, pad: int = 0, step: object = None
) -> Iterator[tuple[list[int | None], Tensor]]:
    """Feeds each row its prompt and then its own next tokens, as the ways of generation do.

    "streamed" and "full" are the two prefills; with "admitted", a row's whole prompt comes when others are under way.

    Yields for every pass the index of the token that each row's logits (B, V) belong to; None once a row has ended,
    which is then retired.
    """
    step = model if step is None else step
    if way == "admitted":
        yield from _admit(model, cache, rows, prompts, pad, step)
        return
    cache.set_prompt_lengths(dict(enumerate(prompts)))
    first = min(*prompts, cache.first_chunk) if way == "streamed" else max(prompts)
    lengths = [first] * len(rows) if way == "streamed" else prompts
    on = dict(device=cache.pos.device)
    idx = torch.tensor([row[:n] + [pad] * (first - n) for row, n in zip(rows, lengths)], **on)
    logits = model(idx, cache, torch.tensor(lengths, **on))
    at: list[int | None] = [n - 1 for n in lengths]
    yield at, logits
    while any(i is not None and i + 1 < len(row) for i, row in zip(at, rows)):
        over = [b for b, (i, row) in enumerate(zip(at, rows)) if i is not None and i + 1 >= len(row)]
        if over:
            cache.retire(over)
        at = [None if i is None or b in over else i + 1 for b, i in enumerate(at)]
        idx = torch.tensor([[pad if i is None else row[i]] for i, row in zip(at, rows)], **on)
        yield at, step(idx, cache)[:, -1]


def _admit(
    model: GPT, cache: KVCache, rows: list[list[int]], prompts: list[int], pad: int, step: object
) -> Iterator[tuple[list[int | None], Tensor]]:
    """Every third step another row begins, the last one first, in a cache whose rows are stopped until then."""
    cache.retire(range(len(rows)))
    coming, running, at = list(range(len(rows))), set(), [-1] * len(rows)
    on = dict(device=cache.pos.device)
    logits = torch.zeros(len(rows), model.lm_head.out_features, dtype=model.lm_head.weight.dtype, **on)
    for tick in range(10**6):
        if tick % 3 == 0 and coming:
            b = coming.pop()
            cache.reset([b])
            idx, length = torch.tensor([rows[b][: prompts[b]]], **on), torch.tensor([prompts[b]], **on)
            logits[b] = model(idx, cache.row(b), length)[0]
            at[b] = prompts[b] - 1
            running.add(b)
            yield [at[i] if i == b else None for i in range(len(rows))], logits
        if over := [b for b in running if at[b] + 1 >= len(rows[b])]:
            cache.retire(over)
            running -= set(over)
        if not running and not coming:
            return
        at = [n + (b in running) for b, n in enumerate(at)]
        idx = torch.tensor([[rows[b][n] if b in running else pad] for b, n in enumerate(at)], **on)
        logits = step(idx, cache)[:, -1]
        yield [n if b in running else None for b, n in enumerate(at)], logits


def logits_of(model: GPT, cache: KVCache, rows: list[list[int]], prompts: list[int], way: str, **others) -> list[dict]:
    """For each row its logits by token index."""
    found: list[dict[int, Tensor]] = [{} for _ in rows]
    for at, logits in walk(model, cache, rows, prompts, way, **others):
        for b, i in enumerate(at):
            if i is not None:
                found[b][i] = logits[b].clone()
    return found


def steps_agree(step: Any, model: GPT, caches: list[KVCache], text: Tensor, start: int, stop: int) -> None:
    """The tokens `start` to `stop` of text (B, T) give the same by `step` on one cache and `model` on the other."""
    for i in range(start, stop):
        token = text[:, i : i + 1]
        torch.testing.assert_close(step(token, caches[0]), model(token, caches[1]), rtol=0, atol=1e-8)


def slots_of(cache: KVCache, layer: int, b: int) -> tuple[Tensor, Tensor | None]:
    """Positions (G, S) of the tokens in a row's slots, -1 where empty, and the attention they received or None."""
    slots, heads = cache.slots[cache.group_of[layer]], cache.layers[layer].spec.groups
    index = cache.layers[layer].stack_index
    mass = slots.statistics["mass"][index, b].expand(heads, -1) if "mass" in slots.statistics else None
    return slots.pos[index, b].expand(heads, -1), mass


def kept_of(cache: KVCache, b: int) -> list[list[list[int]]]:
    """By layer and key/value head the sorted positions that a row keeps."""
    return [[head.positions.tolist() for head in layer.heads] for layer in cache.inspect(b)]


def scores_of(cache: KVCache, b: int) -> list[list[dict[int, float]]]:
    """By layer and key/value head the score of each kept position."""
    return [
        [dict(zip(head.positions.tolist(), head.scores.tolist())) for head in layer.heads] for layer in cache.inspect(b)
    ]


def storages_for(strategy: str) -> list[str]:
    """The storages that take a strategy, on a model on the CPU."""
    recency = registry.get("strategy", strategy).recency
    classes = {name: registry.get("storage", name) for name in registry.names("storage")}
    return [n for n, c in classes.items() if not c.needs_accelerator and (recency or not c.in_order)]
