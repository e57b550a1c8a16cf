"""`litgpt_kv benchmark_batches`: compare one prompt at a time, static batches, and continuous batching."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from tqdm import tqdm

from litgpt_kv.arguments import DeviceArgs, Without, check_count
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Request, Stats, generate, serve
from litgpt_kv.llm.llm import LLM

MOST = 10_000_000  # the limit of all counts
ONE_DEVICE = Without("devices", "num_nodes", "generate_strategy", "compile")
GREEDY = SamplingArgs(temperature=0)


@dataclass
class Candidate:
    """A method to answer all requests, and its measurements."""

    name: str
    run: Callable[[], Stats]
    seconds: list[float] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)


def benchmark_batches(
    checkpoint_dir: str = "demo",
    *,
    prompts: int = 64,
    rows: int = 8,
    shortest: int = 8,
    longest: int = 800,
    new_tokens: int = 32,
    answers: int = 1000,
    fewest: int = 32,
    spread: int = 10,
    repeats: int = 3,
    seed: int = 1,
    kv_cache: KVCacheArgs = KVCacheArgs(),
    device: Annotated[DeviceArgs, ONE_DEVICE] = DeviceArgs(threads=1),
) -> None:
    """Measure tokens/s of many prompts: one at a time, in batches that wait for their longest row, and in rows that
    take the next prompt when they end. The first table has prompts of different lengths, the second one answers.

    Args:
        checkpoint_dir: A checkpoint, or "demo" for the shipped model.
        prompts: The number of prompts in the first table; their tokens are random.
        rows: The number of rows of the cache.
        shortest: Tokens of the shortest prompt.
        longest: Tokens of the longest prompt; lengths are uniformly distributed.
        new_tokens: New tokens of each prompt in the first table.
        answers: The number of prompts in the second table, which all have the shortest length.
        fewest: New tokens of the shortest answer in the second table.
        spread: The longest answer has so many times the tokens of the shortest; lengths are log-uniform.
        repeats: Repetitions of everything, interleaved; the table shows the best and the median.
        seed: The seed of lengths and tokens.
        kv_cache: Which tokens the cache keeps, as for `generate`.
        device: Where to run; with threads null, torch chooses the number of threads.
    """
    counts = {"prompts": prompts, "rows": rows, "shortest": shortest, "new_tokens": new_tokens, "answers": answers}
    for name, value in {**counts, "fewest": fewest, "spread": spread, "repeats": repeats}.items():
        check_count(name, value, 1, MOST)
    if longest < shortest:
        raise ValueError(f"longest must be at least shortest ({shortest}), got {longest}.")
    check_count("longest", longest, 1, MOST)
    args = KVCacheArgs.of(kv_cache)
    if args is None:
        raise ValueError("benchmark_batches needs a cache, kv_cache 'none' has none: choose a strategy.")
    if device.threads is not None:
        torch.set_num_threads(device.threads)
    where = {"precision": device.precision, "accelerator": device.accelerator, "quantize": device.quantize}
    llm = LLM.load(checkpoint_dir, check_weights=device.check_weights, **where)
    g = torch.Generator().manual_seed(SamplingArgs(seed=seed).seed)
    ragged = torch.randint(shortest, longest + 1, (prompts,), generator=g).tolist()
    new = (fewest * spread ** torch.rand(answers, generator=g)).long().tolist()
    vocabulary = llm.model.config.vocab_size

    def requests(lengths: Sequence[int], new: Sequence[int]) -> list[Request]:
        ids = [torch.randint(vocabulary, (n,), generator=g) for n in lengths]
        return [Request(i, n, sampling=GREEDY) for i, n in zip(ids, new)]

    print(f"{checkpoint_dir}, {llm.fabric.device}, {args.strategy}, {rows} rows, best and median of {repeats}\n")
    methods = candidates(llm, requests(ragged, [new_tokens] * prompts), args, rows)
    _table(f"{prompts} prompts of {shortest} to {longest} tokens, {new_tokens} new ones each", methods, repeats)
    methods = candidates(llm, requests([shortest] * answers, new), args, rows)
    methods = [method for method in methods if method.name.endswith("min-length")]  # "full" does the same here
    _table(f"{answers:,} prompts of {shortest} tokens, {fewest} to {fewest * spread} new ones", methods, repeats)


def candidates(llm: LLM, requests: list[Request], args: KVCacheArgs, rows: int) -> list[Candidate]:
    """Return the methods to compare; all make the same number of tokens."""
    tokens = max(len(r.prompt) + r.max_new_tokens for r in requests)
    single, batch = (KVCache.build(llm.model, args, n, tokens) for n in (1, rows))

    def in_batches(cache: KVCache, prefill: str) -> Stats:
        """Answer the requests in batches whose rows start and end together; the last batch may be smaller."""
        total = Stats()
        for start in range(0, len(requests), cache.batch_size):
            part = requests[start : start + cache.batch_size]
            cache.reset()
            batch_cache = cache if len(part) == cache.batch_size else KVCache.build(llm.model, args, len(part), tokens)
            ids, new, stats = [r.prompt for r in part], [r.max_new_tokens for r in part], Stats()
            generate(llm.model, ids, batch_cache, max_new_tokens=new, sampling=GREEDY, prefill=prefill, stats=stats)
            total.prompt_tokens += stats.prompt_tokens
            total.new_tokens += stats.new_tokens
        return total

    def continuous(prefill: str) -> Stats:
        """Answer the requests in rows that take the next one when they end."""
        stats = Stats()
        batch.reset()
        for _ in serve(llm.model, requests, batch, prefill=prefill, stats=stats):
            pass
        return stats

    return [
        Candidate("one by one", lambda: in_batches(single, "full")),
        Candidate("waiting, min-length", lambda: in_batches(batch, "min-length")),
        Candidate("waiting, full", lambda: in_batches(batch, "full")),
        Candidate("rows come and go, min-length", lambda: continuous("min-length")),
        Candidate("rows come and go, full", lambda: continuous("full")),
    ]


def _table(title: str, methods: list[Candidate], repeats: int) -> None:
    """Run all methods `repeats` times, interleaved, and print a table."""
    order = [candidate for _ in range(repeats) for candidate in methods]
    for candidate in tqdm(order, disable=None, leave=False, file=sys.stderr):
        began = time.perf_counter()
        candidate.stats = candidate.run()
        candidate.seconds.append(time.perf_counter() - began)
    print(title)
    print(f"{'':30}{'new tokens/s':>18}{'all tokens/s':>14}{'seconds':>10}")
    for candidate in methods:
        best, median = min(candidate.seconds), statistics.median(candidate.seconds)
        new = candidate.stats.new_tokens
        speed = f"{new / best:,.0f} · {new / median:,.0f}"
        print(f"{candidate.name:30}{speed:>18}{(new + candidate.stats.prompt_tokens) / best:>14,.0f}{best:>10.2f}")
    print()
