"""Prefill, decode, and generation for batches of prompts of different lengths. Floor 5.

B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs, SamplingArgs, per_row
from litgpt_kv.generate.loop import Loop, Stats
from litgpt_kv.generate.runners import (
    PREFILLS,
    Cached,
    Limits,
    Model,
    Prompts,
    Recompute,
    check_fit,
    check_prompt,
    first_pass,
    vocabulary,
)
from litgpt_kv.generate.sampling import Sampler
from litgpt_kv.generate.stopping import Request, Row


@torch.inference_mode()
def prefill(
    model: Model, prompts: Sequence[Tensor | Sequence[int]], cache: KVCache, method: str = "min-length"
) -> tuple[Tensor, list[int]]:
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
    if method not in PREFILLS:
        raise ValueError(f"prefill must be one of {', '.join(PREFILLS)}, got {method!r}.")
    batch = Prompts.of(prompts, vocabulary(model), cache.pos.device)
    return first_pass(model, batch, cache, method)


@torch.inference_mode()
def decode(model: Model, token: Tensor, cache: KVCache) -> Tensor:
    """One more token for every row: token (B,) int64 gives logits (B, V). Positions are the cache's own."""
    return model(token.unsqueeze(1), cache).squeeze(1)


def stream(
    model: Model,
    prompts: Sequence[Tensor | Sequence[int]],
    cache: KVCache | None,
    *,
    max_new_tokens: int | Sequence[int],
    min_new_tokens: int | Sequence[int] = 0,
    sampling: SamplingArgs | None = None,
    stop: Sequence[Sequence[int]] = (),
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    decoder: Model | None = None,
    stats: Stats | None = None,
    logprobs: bool = False,
) -> Iterator[list[list[int]]]:
    """Generates for a batch of prompts of different lengths, a token a row at a time.

    A row equals the same prompt alone, whatever its partners are (sampled rows if they have a seed): it stops at its
    own stop sequence or length, and another row's length decides nothing but when its turn comes.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        prompts: 1-D token ids of each row.
        cache: With as many rows as prompts: empty, or holding what came before each prompt, which is then read in
            blocks or one token at a time. None: no cache, the whole text is computed again at every step.
        max_new_tokens: The most new tokens of a row; one value or one a row. The last one is not in the cache yet.
        min_new_tokens: Stop sequences count only after so many; one value or one a row.
        sampling: How tokens are chosen.
        stop: Token sequences that end a row; a stop sequence is not part of the output.
        prefill: "min-length" or "full", see `prefill`.
        prefill_chunk: With "min-length", read what all prompts still have after the first pass in blocks of so many
            tokens. None: in blocks where that changes nothing (dense, window, sink), else one at a time. A strategy
            that looks at attention, such as h2o, evicts for a whole block before the block attends, so that its
            results then depend on the blocks, and through the shortest prompt on a row's partners.
        decoder: Runs the one-token steps instead of `model`, a compiled one for instance.
        stats: Filled with what the run did.
        logprobs: Fill `stats.logprobs`, too.

    Yields:
        For each step that made tokens, one list a row of the tokens that are now certain: mostly one, none for a row
        still reading its prompt or ended, several where what might have begun a stop sequence did not.

    Raises:
        ValueError: If a prompt is empty, a prompt and its new tokens do not fit, or an argument is out of range.
    """
    if not (cache is None or isinstance(cache, KVCache)):
        raise ValueError(f"stream needs a KVCache or None, got {cache!r}; generate builds one from KVCacheArgs.")
    count, stats = len(prompts), Stats() if stats is None else stats
    limits = per_row("max_new_tokens", max_new_tokens, count), per_row("min_new_tokens", min_new_tokens, count)
    settings = (sampling or SamplingArgs()).rows(count)
    rows = [
        Row(Request(p, *new, args, stop), b) for b, (p, new, args) in enumerate(zip(prompts, zip(*limits), settings))
    ]
    run = runner(model, cache, max(1, count), prefill, prefill_chunk, decoder)
    return _tokens(run_rows(run, rows, (), stats, logprobs), rows, stats)


def _tokens(steps: Iterator[list[Row]], rows: list[Row], stats: Stats) -> Iterator[list[list[int]]]:
    for drew in steps:
        stats.reasons, stats.logprobs = [row.reason for row in rows], [row.logprobs for row in rows]
        yield [row.new if row in drew else [] for row in rows]


def runner(
    model: Model,
    cache: KVCache | None,
    rows: int,
    prefill: str,
    chunk: int | None,
    decoder: Model | None,
    together: bool = True,
) -> Cached | Recompute:
    """What `run_rows` drives: a cache, or its absence."""
    return Recompute(model, rows) if cache is None else Cached(model, decoder, cache, prefill, chunk, together)


def run_rows(
    run: Cached | Recompute, rows: Sequence[Row], waiting: Iterable[Row], stats: Stats, logprobs: bool = False
) -> Iterator[list[Row]]:
    """Checks the first rows and starts the loop; see `Loop` for what it yields. Rows that wait must be checked."""
    if not rows:
        raise ValueError("There are no prompts.")
    if len(rows) != run.size:
        raise ValueError(f"The cache has {run.size} rows, there are {len(rows)} prompts.")
    vars(stats).update(vars(Stats()))  # one that was used before begins anew
    sampler = Sampler(run.size, vocabulary(run.model), run.device)
    for row, seen in zip(rows, run.seen):
        check(row.request, run.limits, f"Prompt {max(0, row.index)}", seen)
    sampler.place(dict(enumerate(row.request for row in rows)))
    return Loop(run, list(rows), waiting, sampler, stats, logprobs).steps()


def check(request: Request, limits: Limits, name: str = "The prompt", seen: int = 0) -> None:
    """Raises ValueError if a request cannot be run; `seen` tokens came before it."""
    prompt = check_prompt(request.prompt, limits.vocabulary, name)
    check_fit(name, seen + len(prompt), request.max_new_tokens, limits.limit, limits.why)
    if limits.most is not None and len(prompt) > limits.most and not seen:
        raise ValueError(
            f"{name} has {len(prompt)} tokens; prefill 'full' reads it in one pass and the model's context is "
            f"{limits.most}. The min-length prefill reads longer prompts into a cache that evicts."
        )


def generate(
    model: GPT,
    prompts: Sequence[Tensor | Sequence[int]],
    cache: KVCacheArgs | str | KVCache | None = "dense",
    *,
    max_new_tokens: int | Sequence[int],
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
    if isinstance(cache, (KVCacheArgs, str)):
        most = per_row("max_new_tokens", max_new_tokens, len(prompts))
        longest = max((len(p) + new for p, new in zip(prompts, most)), default=0)
        cache = KVCache.build(model, cache, max(1, len(prompts)), max(1, longest - 1))
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, cache, max_new_tokens=max_new_tokens, **options):
        for row, tokens in zip(rows, step):
            row += tokens
    return [torch.tensor(row, dtype=torch.int64) for row in rows]
