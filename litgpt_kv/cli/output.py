"""Print for a command: text goes to standard output, everything else to standard error."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.generate import Stats
from litgpt_kv.llm.llm import LLM
from litgpt_kv.parallel import ParallelStrategy


@dataclass(frozen=True)
class Output:
    """Print for a command.

    Attributes:
        shown: Whether to print: if several processes run one command, only process 0 prints.
    """

    shown: bool = True

    @classmethod
    def of(cls, llm: LLM) -> Output:
        """Return the output of the process that runs this model."""
        return cls(shown=llm.fabric.is_global_zero)

    def text(self, text: str, end: str = "\n") -> None:
        """Print text of the model."""
        if self.shown:
            print(text, end=end, flush=True)

    def note(self, text: str) -> None:
        """Print a note about the run."""
        if self.shown:
            print(text, file=sys.stderr, flush=True)


def report(
    output: Output, stats: Stats, cache: KVCache | None, brief: bool = False, parallel: ParallelStrategy | None = None
) -> None:
    """Print token counts, speeds and the size of the cache of process 0; unless `brief`, also what each row keeps."""
    prefill = f"{stats.prefill_seconds:.2f} s ({_rate(stats.prefill_tokens, stats.prefill_seconds)})"
    if (later := stats.prompt_tokens - stats.prefill_tokens) > 0:
        prefill += f" and {later:,} beside decoding"
    decode = f"{stats.decode_seconds:.2f} s ({_rate(stats.decode_tokens, stats.decode_seconds)})"
    output.note(f"Read {stats.prompt_tokens:,} prompt tokens in {prefill}, made {stats.new_tokens:,} in {decode}.")
    if cache is not None:
        size, tokens = cache.allocated(), cache.tokens()
        kept = ", ".join(f"{k:,} of {s:,}" for k, s in zip(tokens["kept"], tokens["seen"]))
        names = cache.args.strategy if isinstance(cache.args.strategy, (list, tuple)) else [cache.args.strategy]
        budgets = sorted({slots.plan.slots for slots in cache.slots})
        parts = ", ".join(f"{what} {n:,}" for what, n in size.items() if n and what != "total")
        budget = " to ".join(f"{b:,}" for b in dict.fromkeys([budgets[0], budgets[-1]]))
        what = f"Cache {', '.join(dict.fromkeys(names))}: budget {budget} tokens, {size['total']:,} bytes ({parts})"
        if parallel is not None and parallel.collectives.size > 1:
            what += f" on process 0 of {parallel.collectives.size}"
        output.note(what + "." if brief else f"{what}; kept {kept} tokens seen.")


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 and tokens else "not measured"
