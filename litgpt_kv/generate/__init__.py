"""Generate text for batches of prompts of different lengths, with loops over an `Engine`.

Read the files in this order: `request` (a request and its state), `engine` (one step), `scheduler` (which request has
which row), `runner` (the model and the cache), `sampling`, `stopping`, `text`, `limits`.

B rows · V vocabulary.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from litgpt_kv.arguments import PREFILLS
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs, SamplingArgs, check_type, per_row, shown
from litgpt_kv.generate.engine import Engine, Stats
from litgpt_kv.generate.limits import check_prefill, check_prompt, vocabulary_of
from litgpt_kv.generate.request import Output, Request, Sequence
from litgpt_kv.generate.runner import Model

__all__ = [
    "PREFILLS",
    "Engine",
    "Output",
    "Request",
    "Sequence",
    "Stats",
    "decode",
    "generate",
    "prefill",
    "raise_failed",
    "serve",
    "stream",
]

Prompts = abc.Sequence[Tensor | abc.Sequence[int]]


@torch.inference_mode()
def prefill(model: Model, prompts: Prompts, cache: KVCache, method: str = "min-length") -> tuple[Tensor, list[int]]:
    """Run the first pass over a batch of prompts, into an empty cache.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        prompts: 1-D token ids of each row, of any lengths.
        cache: An empty cache with one row for each prompt.
        method: "min-length" reads the same number of tokens in every row: as many as the shortest prompt has and every
            layer can keep. Feed the rest token by token to `decode`. "full" reads all prompts, padded on the right, and
            then evicts each row down to its budget. With a storage that loses digits, such as int8, a "min-length" row
            equals its prompt alone only up to that loss; the engine reads each prompt by itself, so its rows equal it.

    Returns:
        The logits (B, V) after the last token read in each row, and the number of tokens read in each row.
    """
    check_prefill(method)
    check_type("cache", cache, KVCache, "a KVCache")
    _check_list(prompts)
    device = cache.pos.device
    rows = [check_prompt(p, vocabulary_of(model), f"Prompt {b}").to(device) for b, p in enumerate(prompts)]
    lengths = [len(row) for row in rows]
    if not any(cache.seen):  # else the model raises an error
        cache.set_prompt_lengths(dict(enumerate(lengths)))
    if method == "min-length":
        lengths = [min(*lengths, cache.first_chunk)] * len(rows)
    longest = max(lengths)  # pad with the row's last token, which adds no token to the pass
    padded = torch.stack([torch.cat((row, row[-1:].expand(max(0, longest - len(row)))))[:longest] for row in rows])
    return model(padded, cache, torch.tensor(lengths, device=device)), lengths


@torch.inference_mode()
def decode(model: Model, token: Tensor, cache: KVCache) -> Tensor:
    """Run one decode step: token (B,) int64 gives logits (B, V). The cache knows the positions."""
    check_type("token", token, Tensor, "a tensor with one token id a row")
    check_type("cache", cache, KVCache, "a KVCache")
    if token.shape != (cache.batch_size,) or token.dtype != torch.int64:
        shape = f"{tuple(token.shape)} {token.dtype}"
        raise ValueError(f"token must have shape ({cache.batch_size},) and dtype torch.int64, got {shape}.")
    return model(token.unsqueeze(1), cache).squeeze(1)


def stream(
    model: Model,
    prompts: Prompts,
    cache: KVCache | None,
    *,
    max_new_tokens: int | abc.Sequence[int],
    min_new_tokens: int | abc.Sequence[int] = 0,
    sampling: SamplingArgs | None = None,
    stop: abc.Sequence[abc.Sequence[int]] = (),
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    decoder: Model | None = None,
    stats: Stats | None = None,
    logprobs: bool = False,
) -> Iterator[list[list[int]]]:
    """Generate tokens for a batch of prompts of different lengths, step by step.

    A row does not depend on the other rows: it gives the same tokens as its prompt alone (if it is sampled, it needs a
    seed), and ends at its own stop sequence or length.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        prompts: 1-D token ids of each row.
        cache: A cache with one row for each prompt. It may hold the text before each prompt; the prompts are then read
            in blocks or one token at a time. None: no cache, every step computes the whole text again.
        max_new_tokens: The most new tokens of a row; one value or one a row. The last new token is not put into the
            cache.
        min_new_tokens: Stop sequences count only after so many new tokens; one value or one a row.
        sampling: How tokens are chosen.
        stop: Token sequences that end a row; a stop sequence is not part of the output.
        prefill: "min-length" reads as much of each prompt as the budget allows in one pass. The rest is read in blocks
            if that does not change results, else token by token, in the decode steps of the other rows. "full" reads
            each prompt in one pass and then evicts down to the budget. Prompts of the same length in neighbouring rows
            are read together.
        prefill_chunk: With "min-length", the tokens of a block for the rest of a prompt. None: blocks if they do not
            change results (dense, window, sink), else one token at a time. A strategy that uses attention, such as h2o,
            evicts for a whole block before the block attends, so its results depend on the block size. With "full",
            read a prompt in passes of so many tokens: results are the same, with less memory.
        decoder: Runs the one-token steps instead of `model`, for instance a compiled model.
        stats: Is filled with tokens and seconds of the run.
        logprobs: Also fill `stats.logprobs`.

    Yields:
        For each step with new tokens, a list of new tokens for each row. Mostly it has one token; none if the row still
        reads its prompt or has ended; several if tokens were held back as the possible start of a stop sequence.

    Raises:
        ValueError: If a prompt is empty, a prompt and its new tokens do not fit, or an argument is out of range; after
            the last step if a row ended because its logits were not finite.
    """
    if not (cache is None or isinstance(cache, KVCache)):
        raise ValueError(f"stream needs a KVCache or None, got {shown(cache)}; generate builds one from KVCacheArgs.")
    count = _check_list(prompts)
    if cache is not None and cache.batch_size != count:
        raise ValueError(f"The cache has {cache.batch_size} rows, there are {count} prompts.")
    limits = per_row("max_new_tokens", max_new_tokens, count), per_row("min_new_tokens", min_new_tokens, count)
    sampling = SamplingArgs() if sampling is None else sampling
    check_type("sampling", sampling, SamplingArgs, "SamplingArgs")
    settings = sampling.rows(count)
    requests = [Request(p, *new, args, stop) for p, new, args in zip(prompts, zip(*limits), settings)]
    stats = _reset(stats)
    options = dict(prefill=prefill, prefill_chunk=prefill_chunk, decoder=decoder, logprobs=logprobs)
    engine = Engine(model, cache, rows=count, pieces=None, stats=stats, **options)
    for row, request in enumerate(requests):
        engine.add(request, row)
    return _stream(engine, stats, count)


def _stream(engine: Engine, stats: Stats, count: int) -> Iterator[list[list[int]]]:
    stats.reasons, stats.logprobs = [None] * count, [[] for _ in range(count)]
    ended: list[Sequence] = []
    while engine.unfinished:
        tokens: list[list[int]] = [[] for _ in range(count)]
        outputs = engine.step()
        for output in outputs:
            tokens[output.id] = output.tokens
            stats.reasons[output.id], stats.logprobs[output.id] = output.finish_reason, output.sequence.logprobs
            ended += [output.sequence] if output.finish_reason else []
        if outputs:
            yield tokens
    raise_failed(ended)


def raise_failed(sequences: Iterable[Sequence]) -> None:
    """Raise ValueError with the error of the first sequence that ended in one."""
    failed = [sequence for sequence in sequences if sequence.error is not None]
    if failed:
        first = min(failed, key=lambda sequence: sequence.index)
        raise ValueError(f"Prompt {first.index}: {first.error}")


def generate(
    model: GPT,
    prompts: Prompts,
    cache: KVCacheArgs | str | KVCache | None = "dense",
    *,
    max_new_tokens: int | abc.Sequence[int],
    **options: object,
) -> list[Tensor]:
    """Generate tokens for a batch of prompts of different lengths; return all at the end.

    Args:
        model: A `litgpt_kv.GPT`.
        prompts: 1-D token ids of each row.
        cache: `KVCacheArgs` or a strategy's name, from which a cache of the right size is built; or a cache. None: no
            cache, every step computes the whole text again.
        max_new_tokens: The most new tokens of a row; one value or one a row.
        options: The other arguments of `stream`.

    Returns:
        For each prompt the new tokens, 1-D int64 on the CPU, without the prompt and the stop sequence.
    """
    _check_list(prompts)
    if isinstance(cache, (KVCacheArgs, str)):
        most = per_row("max_new_tokens", max_new_tokens, len(prompts))
        tokens = [Request(p, new).cache_tokens for p, new in zip(prompts, most)]
        cache = KVCache.build(model, cache, len(prompts), max(1, *tokens))
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, cache, max_new_tokens=max_new_tokens, **options):
        for row, tokens in zip(rows, step):
            row += tokens
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


def serve(
    model: Model,
    requests: Iterable[Request],
    cache: KVCache | None,
    *,
    rows: int | None = None,
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    decoder: Model | None = None,
    decode_text: object = None,
    stats: Stats | None = None,
    logprobs: bool = False,
) -> Iterator[list[Sequence]]:
    """Answer any number of requests, as many at a time as the cache has rows.

    A new prompt is read into a free row while the other rows wait, see `stream`. A request gives the same tokens as its
    prompt alone, no matter when it starts.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        requests: An iterator of any length. A request is taken only when a row is free; after its end, the iterator is
            tried again at every step with a free row.
        cache: An empty cache. None: no cache, every step computes the whole texts again.
        rows: The number of rows without a cache; with one, its batch size.
        decode_text: A function from token ids to text; None: sequences have no text.
        prefill, prefill_chunk, decoder, stats, logprobs: As in `stream`.

    Yields:
        For each step the sequences with new tokens: `new_tokens`, and `reason` if the sequence ended.

    Raises:
        ValueError: If a request does not fit: at once for the first requests, else when it is taken.
    """
    options = dict(prefill=prefill, prefill_chunk=prefill_chunk, decoder=decoder, logprobs=logprobs)
    engine = Engine(model, cache, rows=rows, pieces=None, decode_text=decode_text, stats=_reset(stats), **options)
    check_type("requests", None if isinstance(requests, Tensor) else requests, Iterable, "an iterable of Requests")
    return serve_steps(engine, begin(engine, cache, requests))


def begin(engine: Engine, cache: KVCache | None, requests: Iterable[Request]) -> Iterator[Request]:
    """Add the first requests to an engine with an empty cache; return an iterator over the others.

    Raises:
        ValueError: If the cache is not empty, there is no request, or one of the first does not fit.
    """
    if cache is not None and any(cache.seen):
        raise ValueError(f"serve needs an empty cache; tokens seen are {cache.seen}: call reset() first.")
    waiting = iter(requests)
    fill(engine, waiting)
    if not engine.unfinished:
        raise ValueError("There are no prompts.")
    return waiting


def fill(engine: Engine, waiting: Iterator[Request]) -> None:
    """Add a waiting request for every free row."""
    while engine.free and (request := next(waiting, None)) is not None:
        engine.add(request)


def serve_steps(engine: Engine, waiting: Iterator[Request]) -> Iterator[list[Sequence]]:
    """Yield the sequences of each step, and offer free rows to the waiting requests after it."""
    while engine.unfinished:
        if outputs := engine.step():
            yield [output.sequence for output in outputs]
        fill(engine, waiting)


def _check_list(prompts: Prompts) -> int:
    """Return the number of prompts; refuse a list without any."""
    single = isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() == 0)
    if single or not isinstance(prompts, (abc.Sequence, Tensor)):
        raise TypeError(f"prompts must be a list of lists of token ids, got {shown(prompts)}.")
    if not len(prompts):
        raise ValueError("There are no prompts.")
    return len(prompts)


def _reset(stats: Stats | None) -> Stats:
    """Return new stats, or set the given ones to zero."""
    if stats is None:
        return Stats()
    check_type("stats", stats, Stats, "Stats")
    vars(stats).update(vars(Stats()))
    return stats
