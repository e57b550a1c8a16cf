"""Prefill, decode, and batches of prompts of different lengths. Floor 5.

B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt_kv.cache import KVCache
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate.sampling import Sampler
from litgpt_kv.generate.stopping import Row, check_stops
from litgpt_kv.model import GPT

PREFILLS = ("min-length", "full")
BLOCK = 128  # tokens; the logits of a block are (B, BLOCK, V), so a longer one would cost memory and save little
Model = Callable[..., Tensor]


@dataclass
class Stats:
    """What a run did.

    Attributes:
        prompt_tokens, new_tokens: Tokens read and made, by all rows.
        prefill_tokens, prefill_seconds: Tokens read before the first new one was made, and the time that took.
        decode_tokens, decode_seconds: Tokens made after each row's first, and the time of the steps that made them;
            what the caller does between two steps is not counted.
        reasons: Why each row ended: "stop" or "length".
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    reasons: list[str | None] = field(default_factory=list)


@dataclass
class Prompts:
    """Prompts of different lengths as one right-padded tensor (B, T); a pad is the row's own last token."""

    padded: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, prompts: Sequence[Tensor | Sequence[int]], vocabulary: int, device: torch.device) -> Prompts:
        rows = [torch.as_tensor(p) for p in prompts]
        if not rows:
            raise ValueError("There are no prompts.")
        for b, row in enumerate(rows):
            if row.dim() != 1 or row.numel() == 0:
                raise ValueError(f"Prompt {b} must be a list of at least one token, got shape {tuple(row.shape)}.")
            if row.is_floating_point():
                raise ValueError(f"Prompt {b} must be integer token ids, got {row.dtype}.")
            if not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
                raise ValueError(f"Prompt {b} has a token outside the vocabulary of {vocabulary}.")
        rows = [row.to(device, torch.int64) for row in rows]
        longest = max(map(len, rows))
        padded = torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])
        return cls(padded, [len(row) for row in rows])


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
    batch = Prompts.of(prompts, _vocabulary(model), cache.pos.device)
    return _prefill(model, batch, cache, method)


def _prefill(model: Model, batch: Prompts, cache: KVCache, method: str) -> tuple[Tensor, list[int]]:
    lengths = batch.lengths
    if method == "min-length":
        first = min(*lengths, cache.first_chunk)
        lengths = [first] * len(lengths)
    length = torch.tensor(lengths, device=batch.padded.device)
    return model(batch.padded[:, : max(lengths)], cache, length), lengths


@torch.inference_mode()
def decode(model: Model, token: Tensor, cache: KVCache) -> Tensor:
    """One more token for every row: token (B,) int64 gives logits (B, V). Positions are the cache's own."""
    return model(token.unsqueeze(1), cache).squeeze(1)


class _Recompute:
    """Stands in for a cache in the loop below and has none: every step runs the whole text again, the baseline."""

    limit: int | None

    def __init__(self, model: GPT, batch: Prompts, max_new_tokens: int) -> None:
        B, T = batch.padded.shape
        self.model, self.limit, self.rows = model, model.max_seq_length, torch.arange(B, device=batch.padded.device)
        self.text = torch.nn.functional.pad(batch.padded, (0, max_new_tokens))
        self.pos = torch.tensor(batch.lengths, device=batch.padded.device)
        self.longest, self.lengths = T, batch.lengths

    def first(self) -> tuple[Tensor, list[int]]:
        return self._logits(), self.lengths

    def step(self, token: Tensor) -> Tensor:
        self.text[self.rows, self.pos] = token
        self.pos += 1
        self.longest += 1
        return self._logits()

    def _logits(self) -> Tensor:
        return self.model(self.text[:, : self.longest])[self.rows, self.pos - 1]

    def retire(self, rows: Sequence[int]) -> None:
        """Rows are independent: a finished one goes on unseen."""


class _Cached:
    """The loop below over a cache."""

    def __init__(
        self, model: Model, decoder: Model, batch: Prompts, cache: KVCache, method: str, chunk: int | None
    ) -> None:
        self.model, self.decoder, self.batch, self.cache, self.method = model, decoder, batch, cache, method
        self.limit, self.retire = cache.limit, cache.retire
        self.chunk = chunk or (min(BLOCK, cache.longest_block) if cache.exact_blocks else 1)

    def first(self) -> tuple[Tensor, list[int]]:
        logits, read = _prefill(self.model, self.batch, self.cache, self.method)
        shortest = min(self.batch.lengths)
        while self.chunk > 1 and self.method == "min-length" and read[0] < shortest:
            end = min(read[0] + self.chunk, shortest)
            logits = self.model(self.batch.padded[:, read[0] : end], self.cache)[:, -1]
            read = [end] * len(read)
        return logits, read

    def step(self, token: Tensor) -> Tensor:
        return decode(self.decoder, token, self.cache)

    @property
    def pos(self) -> Tensor:
        return self.cache.pos


def stream(
    model: Model,
    prompts: Sequence[Tensor | Sequence[int]],
    cache: KVCache | None,
    *,
    max_new_tokens: int,
    sampling: SamplingArgs | None = None,
    stop: Sequence[Sequence[int]] = (),
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    decoder: Model | None = None,
    stats: Stats | None = None,
) -> Iterator[list[list[int]]]:
    """Generates for a batch of prompts of different lengths, a token a row at a time.

    A row equals the same prompt alone, whatever its partners are (sampled rows if they have a seed): it stops at its
    own stop sequence or length, and another row's length decides nothing but when its turn comes.

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        prompts: 1-D token ids of each row.
        cache: Empty, with as many rows as prompts. None: no cache, the whole text is computed again at every step.
        max_new_tokens: The most new tokens of a row.
        sampling: How tokens are chosen.
        stop: Token sequences that end a row; a stop sequence is not part of the output.
        prefill: "min-length" or "full", see `prefill`.
        prefill_chunk: With "min-length", read what all prompts still have after the first pass in blocks of so many
            tokens. None: in blocks where that changes nothing (dense, window, sink), else one at a time. A strategy
            that looks at attention, such as h2o, evicts for a whole block before the block attends, so that its
            results then depend on the blocks, and through the shortest prompt on a row's partners.
        decoder: Runs the one-token steps instead of `model`, a compiled one for instance.
        stats: Filled with what the run did.

    Yields:
        For each step that made tokens, one list a row of the tokens that are now certain: mostly one, none for a row
        still reading its prompt or ended, several where what might have begun a stop sequence did not.

    Raises:
        ValueError: If a prompt is empty, a prompt and its new tokens do not fit, or an argument is out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if prefill not in PREFILLS:
        raise ValueError(f"prefill must be one of {', '.join(PREFILLS)}, got {prefill!r}.")
    if not (cache is None or isinstance(cache, KVCache)):
        raise ValueError(f"stream needs a KVCache or None, got {cache!r}; generate builds one from KVCacheArgs.")
    device = next(model.parameters()).device if cache is None else cache.pos.device
    batch = Prompts.of(prompts, _vocabulary(model), device)
    rows = [Row(check_stops(stop), max_new_tokens) for _ in batch.lengths]
    if cache is None:
        run = _Recompute(model, batch, max_new_tokens)
    else:
        if prefill_chunk is not None and not 1 <= prefill_chunk <= cache.longest_block:
            most = cache.longest_block
            raise ValueError(f"prefill_chunk must be 1 to {most} (budget less sinks), got {prefill_chunk}.")
        run = _Cached(model, model if decoder is None else decoder, batch, cache, prefill, prefill_chunk)
    _check_fit(batch, max_new_tokens, run.limit, cache)
    sampler = Sampler(sampling or SamplingArgs(), len(rows), device)
    return _loop(run, batch, rows, sampler, Stats() if stats is None else stats)


@torch.inference_mode()
def _loop(
    run: _Cached | _Recompute, batch: Prompts, rows: list[Row], sample: Sampler, stats: Stats
) -> Iterator[list[list[int]]]:
    length = torch.tensor(batch.lengths, device=batch.padded.device)
    stats.reasons = [None] * len(rows)
    began = time.perf_counter()
    logits, read = run.first()  # (B, V), and how many tokens of each row have been read
    stats.prompt_tokens = sum(read)
    while True:
        new = [b for b, row in enumerate(rows) if row.reason is None and read[b] >= batch.lengths[b]]
        reading = [b for b, n in enumerate(read) if n < batch.lengths[b]]
        inside = run.pos < length
        token = sample(logits, ~inside) if new else None  # (B,)
        if reading:
            of_prompt = batch.padded.gather(1, run.pos.clamp(max=batch.padded.size(1) - 1).unsqueeze(1)).squeeze(1)
            token = of_prompt if token is None else torch.where(inside, of_prompt, token)
        if new:
            chosen = token.tolist()  # the one copy to the host
            seconds = time.perf_counter() - began
            if stats.new_tokens == 0:
                stats.prefill_seconds, stats.prefill_tokens = seconds, stats.prompt_tokens
            else:
                stats.decode_seconds += seconds
            stats.new_tokens += len(new)
            stats.decode_tokens += sum(read[b] > batch.lengths[b] for b in new)
            out = [rows[b].push(chosen[b]) if b in new else [] for b in range(len(rows))]
            stats.reasons = [row.reason for row in rows]
            yield out
            if all(stats.reasons):
                return
            began = time.perf_counter()
            if ended := [b for b in new if rows[b].reason is not None]:
                run.retire(ended)
        logits = run.step(token)
        stats.prompt_tokens += len(reading)
        read = [n + (row.reason is None) for n, row in zip(read, rows)]


def generate(
    model: GPT,
    prompts: Sequence[Tensor | Sequence[int]],
    cache: KVCacheArgs | str | KVCache | None = "dense",
    *,
    max_new_tokens: int,
    sampling: SamplingArgs | None = None,
    stop: Sequence[Sequence[int]] = (),
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    decoder: Model | None = None,
    stats: Stats | None = None,
) -> list[Tensor]:
    """New tokens for each of a batch of prompts of different lengths; arguments as in `stream`.

    Args:
        cache: What to keep, `KVCacheArgs` or a strategy's name: a cache of the right size is built. Or an empty cache.
            None: no cache, the whole text is computed again at every step.

    Returns:
        For each prompt its new tokens, 1-D int64 on the host, without the prompt and without a stop sequence.
    """
    if isinstance(cache, (KVCacheArgs, str)):
        longest = max((len(p) for p in prompts), default=0)
        cache = KVCache.build(model, cache, max(1, len(prompts)), max(1, longest + max_new_tokens - 1))
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream(
        model,
        prompts,
        cache,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        prefill=prefill,
        prefill_chunk=prefill_chunk,
        decoder=decoder,
        stats=stats,
    ):
        for row, tokens in zip(rows, step):
            row += tokens
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


def _check_fit(batch: Prompts, max_new_tokens: int, limit: int | None, cache: KVCache | None) -> None:
    for b, n in enumerate(batch.lengths):
        if limit is not None and n + max_new_tokens - 1 > limit:  # the last new token is never read
            why = "the model's context" if cache is None else cache.why
            raise ValueError(
                f"Prompt {b} has {n} tokens; with {max_new_tokens} new ones it is over the limit of {limit}: {why}."
            )


def _vocabulary(model: Model) -> int:
    return model.lm_head.out_features
