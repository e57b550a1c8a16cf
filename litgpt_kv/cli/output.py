"""Print for a command: text goes to standard output, everything else to standard error."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.generate import Stats
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.llm.llm import LLM
from litgpt_kv.llm.text_model import TextModel


@dataclass
class Output:
    """Print for a command. A note that comes while a text is printed gets a line of its own.

    Attributes:
        shown: Whether to print: if several processes run one command, only process 0 prints.
        in_line: Whether the text ends in the middle of a line so far.
    """

    shown: bool = True
    in_line: bool = False

    @classmethod
    def of(cls, llm: LLM) -> Output:
        """Return the output of the process that runs this model."""
        return cls(shown=llm.fabric.is_global_zero)

    def text(self, text: str, end: str = "\n") -> None:
        """Print text of the model."""
        if self.shown:
            print(text, end=end, flush=True)
            self.in_line = not (text + end).endswith("\n") if text + end else self.in_line

    def note(self, text: str) -> None:
        """Print a note about the run."""
        if self.shown:
            apart = self.in_line and sys.stdout.isatty() == sys.stderr.isatty()  # else they are not seen together
            print("\n" * apart + text, file=sys.stderr, flush=True)
            self.in_line = self.in_line and not apart

    def take_notes(self, llm: LLM) -> None:
        """Let the notes about compiled steps come through this output, which knows what text it has printed."""
        if isinstance(llm.decoder, CompiledDecoder):
            llm.decoder.note = self.note


def report(output: Output, llm: LLM, stats: Stats, cache: KVCache | None, brief: bool = False) -> None:
    """Print token counts, speeds and the size of the cache of process 0; unless `brief`, also what each row keeps."""
    prefill = f"{stats.prefill_seconds:.2f} s ({_rate(stats.prefill_tokens, stats.prefill_seconds)})"
    if (later := stats.prompt_tokens - stats.prefill_tokens) > 0:
        prefill += f" and {later:,} beside decoding"
    decode = f"{stats.decode_seconds:.2f} s ({_rate(stats.decode_tokens, stats.decode_seconds)})"
    compiled = f"; compiling took {stats.compile_seconds:.1f} s more" if stats.compile_seconds else ""
    made = f"made {stats.new_tokens:,} in {decode}{compiled}"
    output.note(f"Read {stats.prompt_tokens:,} prompt tokens in {prefill}, {made}.")
    if cache is not None:
        size, tokens = cache.allocated(), cache.tokens()
        kept = ", ".join(f"{k:,} of {s:,}" for k, s in zip(tokens["kept"], tokens["seen"]))
        budgets = budgets_of(cache)
        parts = ", ".join(f"{what} {n:,}" for what, n in size.items() if n and what != "total")
        budget = " to ".join(f"{b:,}" for b in dict.fromkeys([budgets[0], budgets[-1]]))
        what = f"Cache {', '.join(strategies_of(cache))}: budget {budget} tokens, {size['total']:,} bytes ({parts})"
        if llm.parallel is not None and llm.parallel.collectives.size > 1:
            what += f" on process 0 of {llm.parallel.collectives.size}"
        most = "a head kept up to" if heads_differ(cache) else "kept"
        output.note(what + "." if brief else f"{what}; {most} {kept} tokens seen.")
        dense = dense_bytes(llm, cache)
        if dense is not None and dense > size["total"]:
            output.note(f"A dense cache takes {dense:,} bytes: {dense / size['total']:.2g} times as many.")


def statistics(llm: LLM, stats: Stats, cache: KVCache | None) -> dict[str, Any]:
    """Return what `report` says as JSON: "stats" has tokens, seconds and rates, "cache" sizes in bytes and tokens."""
    numbers = {name: value for name, value in asdict(stats).items() if name not in ("reasons", "logprobs")}
    for part in ("prefill", "decode"):
        tokens, seconds = numbers[f"{part}_tokens"], numbers[f"{part}_seconds"]
        numbers[f"{part}_tokens_per_second"] = tokens / seconds if tokens and seconds else None
    if cache is None:
        return {"stats": numbers, "cache": None}
    about = {"strategy": strategies_of(cache), "budget": budgets_of(cache), "bytes": cache.allocated()}
    return {"stats": numbers, "cache": {**about, "dense_bytes": dense_bytes(llm, cache), **cache.tokens()}}


def strategies_of(cache: KVCache) -> list[str]:
    """Return the names of a cache's strategies, each once."""
    names = cache.args.strategy if isinstance(cache.args.strategy, (list, tuple)) else [cache.args.strategy]
    return list(dict.fromkeys(names))


def heads_differ(cache: KVCache) -> bool:
    """Return whether heads may keep different numbers of tokens: in pools, or because layers have other budgets."""
    return len(budgets_of(cache)) > 1 or any(slots.owner is not None for slots in cache.slots)


def budgets_of(cache: KVCache) -> list[int]:
    """Return the budgets of a cache's layers in tokens, each once, the smallest first."""
    return sorted({slots.plan.slots for slots in cache.slots})


def dense_bytes(llm: TextModel, cache: KVCache, tokens: int | None = None) -> int | None:
    """Return the bytes of a dense cache for the same rows; None if one process has not all of it, or it cannot be.

    Args:
        llm: The model.
        cache: The cache.
        tokens: The tokens of a row; None: as many as `cache` has room for.
    """
    if llm.parallel is not None or (cache.max_tokens if tokens is None else tokens) > cache.context:
        return None
    if tokens is None:
        tokens = max(cache.seen) if cache.static else cache.max_tokens  # a compiled cache has room for more
    return KVCache.nbytes(llm.config, KVCacheArgs(), cache.batch_size, max(1, tokens), cache.dtype)["total"]


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 and tokens else "not measured"
