"""Generation for batches of prompts of different lengths: loops over an `Engine`.

In the order to read: `request` (what is asked, its answer so far), `engine` (one step), `scheduler` (who has which
row), `runner` (the model and the cache), `sampling`, `stopping`, `text`, `limits`.

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
    """The first pass over a batch of prompts, into an empty cache.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        prompts: 1-D token ids of each row, of any lengths.
        cache: Empty, with as many rows as prompts.
        method: "min-length" reads the first tokens of every row, as many as the shortest prompt has and every layer can
            keep; the rest follows token by token with `decode`. "full" reads all prompts, padded on the right; each row
            is then compressed to its budget.

    Returns:
        The logits (B, V) after the last token read of each row, and how many tokens of each row were read.
    """
    check_prefill(method)
    check_type("cache", cache, KVCache, "a KVCache")
    _check_list(prompts)
    device = cache.pos.device
    rows = [check_prompt(p, vocabulary_of(model), f"Prompt {b}").to(device) for b, p in enumerate(prompts)]
    lengths = [len(row) for row in rows]
    if not any(cache.seen):  # else the model says what is wrong
        cache.set_prompt_lengths(dict(enumerate(lengths)))
    if method == "min-length":
        lengths = [min(*lengths, cache.first_chunk)] * len(rows)
    longest = max(lengths)  # a pad is the row's own last token: no other one is read
    padded = torch.stack([torch.cat((row, row[-1:].expand(max(0, longest - len(row)))))[:longest] for row in rows])
    return model(padded, cache, torch.tensor(lengths, device=device)), lengths


@torch.inference_mode()
def decode(model: Model, token: Tensor, cache: KVCache) -> Tensor:
    """One more token for every row: token (B,) int64 gives logits (B, V). Positions are the cache's own."""
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
    """Generates for a batch of prompts of different lengths, a token a row at a time.

    A row equals the same prompt alone, whatever its partners are (sampled rows if they have a seed): it stops at its
    own stop sequence or length.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        prompts: 1-D token ids of each row.
        cache: With as many rows as prompts: empty, or holding what came before each prompt, which is then read in
            blocks or one token at a time. None: no cache, the whole text is computed again at every step.
        max_new_tokens: The most new tokens of a row; one value or one a row. The last one is not in the cache yet.
        min_new_tokens: Stop sequences count only after so many; one value or one a row.
        sampling: How tokens are chosen.
        stop: Token sequences that end a row; a stop sequence is not part of the output.
        prefill: "min-length" reads each prompt in one pass as far as the budget allows, the rest in blocks where that
            changes nothing, else token by token beside the steps of the others. "full" reads each prompt in one pass
            and then compresses the row to its budget. Neighbours with prompts of one length are read together.
        prefill_chunk: With "min-length", read what a prompt still has after the first pass in blocks of so many tokens.
            None: in blocks where that changes nothing (dense, window, sink), else one at a time. A strategy that looks
            at attention, such as h2o, evicts for a whole block before the block attends, so that its results then
            depend on the blocks. With "full", read a prompt in passes of so many tokens: they give what one pass gives,
            with the memory of a shorter one.
        decoder: Runs the one-token steps instead of `model`, a compiled one for instance.
        stats: Filled with what the run did.
        logprobs: Fill `stats.logprobs`, too.

    Yields:
        For each step that made tokens, one list a row of the tokens that are now certain: mostly one, none for a row
        still reading its prompt or ended, several where what might have begun a stop sequence did not.

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
    stats = _begun(stats)
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
    """Raises ValueError if a sequence ended in an error, naming the first."""
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
    """New tokens for each of a batch of prompts of different lengths.

    Args:
        model: A `litgpt_kv.GPT`.
        prompts: 1-D token ids of each row.
        cache: What to keep, `KVCacheArgs` or a strategy's name: a cache of the right size is built. Or a cache. None:
            no cache, the whole text is computed again at every step.
        max_new_tokens: The most new tokens of a row; one value or one a row.
        options: All that `stream` takes.

    Returns:
        For each prompt its new tokens, 1-D int64 on the host, without the prompt and without a stop sequence.
    """
    _check_list(prompts)
    if isinstance(cache, (KVCacheArgs, str)):
        most = per_row("max_new_tokens", max_new_tokens, len(prompts))
        sees = [Request(p, new).sees for p, new in zip(prompts, most)]
        cache = KVCache.build(model, cache, len(prompts), max(1, *sees))
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
    """Answers any number of requests, as many at a time as the cache has rows.

    Each prompt is read into a free row while the others wait, see `stream`. A row gives what its prompt gives alone,
    whenever it comes.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        requests: Taken from the iterator only when a row is free, so that it may be endless; asked again at every step
            while a row is free.
        cache: Empty. None: no cache, every text is computed again at every step.
        rows: Rows without a cache; with one, its batch size.
        decode_text: From token ids to text, if rows shall have text.
        prefill, prefill_chunk, decoder, stats, logprobs: As in `stream`.

    Yields:
        For each draw the rows that took part in it: `new` tokens of each, and its `reason` when it ended.

    Raises:
        ValueError: Before the first step for the first requests; later when a request is taken that does not fit.
    """
    options = dict(prefill=prefill, prefill_chunk=prefill_chunk, decoder=decoder, logprobs=logprobs)
    engine = Engine(model, cache, rows=rows, pieces=None, decode_text=decode_text, stats=_begun(stats), **options)
    check_type("requests", None if isinstance(requests, Tensor) else requests, Iterable, "an iterable of Requests")
    return _serve(engine, begin(engine, cache, requests))


def begin(engine: Engine, cache: KVCache | None, requests: Iterable[Request]) -> Iterator[Request]:
    """Give an engine on an empty cache its first requests, and return an iterator of the others.

    Raises:
        ValueError: If the cache is not empty, there is no request, or a first one does not fit.
    """
    if cache is not None and any(cache.seen):
        raise ValueError(f"serve needs an empty cache; tokens seen are {cache.seen}: call reset() first.")
    waiting = iter(requests)
    fill(engine, waiting)
    if not engine.unfinished:
        raise ValueError("There are no prompts.")
    return waiting


def fill(engine: Engine, waiting: Iterator[Request]) -> None:
    """Offer every free row to the next request."""
    while engine.free and (request := next(waiting, None)) is not None:
        engine.add(request)


def _serve(engine: Engine, waiting: Iterator[Request]) -> Iterator[list[Sequence]]:
    while engine.unfinished:
        if outputs := engine.step():
            yield [output.sequence for output in outputs]
        fill(engine, waiting)


def _check_list(prompts: Prompts) -> int:
    """The number of prompts, at least one."""
    single = isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() == 0)
    if single or not isinstance(prompts, (abc.Sequence, Tensor)):
        raise TypeError(f"prompts must be a list of lists of token ids, got {shown(prompts)}.")
    if not len(prompts):
        raise ValueError("There are no prompts.")
    return len(prompts)


def _begun(stats: Stats | None) -> Stats:
    """Stats that begin at zero, also where they were used before."""
    if stats is None:
        return Stats()
    check_type("stats", stats, Stats, "Stats")
    vars(stats).update(vars(Stats()))
    return stats
