"""`litgpt_kv benchmark --peers`: the run over all contexts, its table and its report."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litgpt_kv import registry
from litgpt_kv.benchmark.peers.base import Job
from litgpt_kv.benchmark.peers.run import LONG, Measured, collect, measure, row_lengths
from litgpt_kv.benchmark.processor import bandwidth, processor
from litgpt_kv.compat.input_pos import GPT

LAYOUT = "{:<38}{:<10}{:>17}{:>14}{:>18}{:>14}{:>10}{:>9}{:>7}"
HEADS = ["library and cache", "weights", "prefill tokens/s", "times slower", "decode ms a step", "times slower"]
HEADS += ["tokens/s", "of limit", "same"]


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        peers: Names of libraries. strategies: Ours. budget: Of strategies that evict.
        chunk: Tokens of a block in which these read prompts; None: one pass.
        rows: Of a batch. ragged: Whether their lengths differ.
        steps: Of a round. repeats: Rounds. prefills: Times that prompts are read; None: as often as there are rounds,
            once if they are long.
        compiled: Whether compiled steps are measured too. gguf: See `Job`.
    """

    peers: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ("dense",)
    budget: int | str = "25%"
    chunk: int | None = None
    rows: int = 1
    ragged: bool = False
    steps: int = 16
    repeats: int = 5
    prefills: int | None = None
    compiled: bool = False
    gguf: tuple[str, ...] = ()

    @property
    def new_tokens(self) -> int:
        """The tokens that a row decodes: the first round warms up."""
        return self.steps * (self.repeats + 1)

    def times_read(self, context: int) -> int:
        """How often prompts of so many tokens are read."""
        return self.prefills or (1 if context > LONG else self.repeats)


def compare_peers(model: GPT, contexts: Sequence[int], settings: Settings) -> dict[str, Any]:
    """Measure at several contexts, print a table for each, and return the report.

    Args:
        model: Ours. contexts: Tokens of the longest row. settings: What is compared.

    Returns:
        "machine", "versions", "model" and "rows", one for each variant and context; the row of a library that cannot
        run has "problem".
    """
    versions = dict.fromkeys(v for name in settings.peers for v in registry.build("peer", name).versions())
    report: dict[str, Any] = {
        "machine": processor(),
        "versions": list(versions),
        "model": model.config.name,
        "rows": [],
    }
    print(report["machine"])
    if versions:
        print(", ".join(versions))
    with tempfile.TemporaryDirectory() as folder:
        for context in contexts:
            report["rows"] += _at(model, context, settings, Path(folder))
    return report


def _at(model: GPT, context: int, settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """Measure at one context, and print the table."""
    if settings.compiled:
        torch.compiler.reset()  # graphs of earlier contexts are of no use
    lengths = row_lengths(context, settings.rows, settings.ragged)
    vocabulary, device = model.config.vocab_size, model.lm_head.weight.device
    limit = bandwidth(device)
    g = torch.Generator().manual_seed(context)
    job = Job(model, lengths, settings.new_tokens, settings.compiled, settings.budget, settings.gguf, folder)
    sizes = [length + settings.new_tokens for length in lengths]
    tokens = [torch.randint(vocabulary, (size,), generator=g).to(device) for size in sizes]
    entries = collect(job, settings.peers, settings.strategies, settings.chunk)
    try:
        measure(entries, tokens, job, settings.steps, settings.repeats, settings.times_read(context))
        limit = max(limit, bandwidth(device))  # something else may have disturbed the first measurement
        rows = [_row(entry, entries[0], job, context, settings.steps, limit) for entry in entries]
    finally:
        for entry in entries:
            entry.close()
    _print(rows, settings, lengths, limit)
    return rows


def _row(entry: Measured, first: Measured, job: Job, context: int, steps: int, limit: float) -> dict[str, Any]:
    """The row of the report; lists have best and median."""
    row: dict[str, Any] = {"library": entry.library, "context": context, "rows": job.rows, "ragged": job.ragged}
    if entry.variant is None:
        return {**row, "problem": entry.problem}
    rounds = len(entry.step_seconds)
    lengths = [length + steps * (rounds + 2) // 2 for length in job.lengths]  # in the middle of the run
    both = _both(entry.step_seconds)
    row |= {
        "cache": entry.variant.name,
        "weights": entry.variant.weights,
        "prefill_seconds": _both(entry.prefill_seconds),
        "decode_ms": [1e3 * seconds for seconds in both],
        "decode_tokens_per_s": [job.rows / seconds for seconds in both],
        "decode_ratio": [own / ours for own, ours in zip(both, _both(first.step_seconds))],
        "read_GB_per_s": limit / 1e9,
        "of_limit": entry.variant.read_bytes(lengths) / both[0] / limit,
        "same_tokens": entry.agreement(first),
    }
    if entry.prefill_seconds:
        row["prefill_tokens_per_s"] = [sum(job.lengths) / seconds for seconds in row["prefill_seconds"]]
        row["prefill_ratio"] = [own / ours for own, ours in zip(row["prefill_seconds"], _both(first.prefill_seconds))]
    return row


def _both(seconds: list[float]) -> list[float]:
    """Best and median; nothing of nothing."""
    return [min(seconds), statistics.median(seconds)] if seconds else []


def _print(rows: list[dict[str, Any]], settings: Settings, lengths: tuple[int, ...], limit: float) -> None:
    context, times = max(lengths), settings.times_read(max(lengths))
    batch = "1 row" if len(lengths) == 1 else f"{len(lengths)} rows"
    spread = f"{min(lengths):,} to {context:,}" if min(lengths) < context else f"{context:,}"
    run = f"best and median of {settings.repeats}, of prefill {times}; memory reads {limit / 1e9:.1f} GB/s"
    print(f"\n{spread} tokens of context, {batch}; {run}")
    print(LAYOUT.format(*HEADS).rstrip())
    for row in rows:
        if "problem" in row:
            print(f"{row['library']:<38}{row['problem']}")
            continue
        prefill = "prefill_ratio" in row
        same = row["same_tokens"]
        print(
            LAYOUT.format(
                f"{row['library']} {row['cache']}",
                row["weights"],
                "{:,.0f} {:,.0f}".format(*row["prefill_tokens_per_s"]) if prefill else "as above",
                "{:.2f} {:.2f}".format(*row["prefill_ratio"]) if prefill else "",
                "{:.2f} {:.2f}".format(*row["decode_ms"]),
                "{:.2f} {:.2f}".format(*row["decode_ratio"]),
                f"{row['decode_tokens_per_s'][0]:,.1f}",
                f"{row['of_limit']:.0%}",
                "-" if same is None else f"{same:.0%}",
            )
        )
