"""The report on one model in Markdown: tables, pictures, and how the order differs from the published one."""

from __future__ import annotations

import math
import statistics
from itertools import combinations
from typing import Any

from litgpt_kv.evaluate.results import Cell, Results, table

PUBLISHED = {  # percent of RULER with 4,096 tokens, half of the cache removed before the question is seen
    "KVzip": (("kvzip:model floor=0", "kvzip:pool floor=0", "kvzip"), 95),
    "AdaKV + expected attention": (("expected_attention:pool epsilon=0.01", "expected_attention:pool"), 92),
    "KeyDiff": (("keydiff",), 85),
    "TOVA": (("tova",), 75),
    "SnapKV": (("snapkv",), 67),
    "StreamingLLM": (("sink",), 60),
    "H2O": (("h2o",), 51),
    "Knorm": (("knorm",), 50),
    "random": (("random",), 8),
}
CLEAR = 2  # standard errors


def report(results: Results, name: str) -> str:
    """The whole report.

    Args:
        results: With cells of the tasks "needle", "text" and "stream". name: Of the pictures' files, in front.
    """
    whole = results.as_dict()
    versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
    needles = [c for c in results.cells if c["task"] == "needle" and "score" in c]
    short = min((c["tokens"] for c in needles), default=0)
    parts = [
        f"# What a cache costs in quality: {results.settings['checkpoint']}",
        f"Made by `make results` on {whole['date']} ({whole['machine']}; {versions}). "
        f"[README.md](README.md) says what each figure means; all numbers are in [{name}.json]({name}.json).",
        *_needles([c for c in needles if c["tokens"] == short], short, name),
        *_order([c for c in needles if c["tokens"] == short]),
        *_lengths([c for c in needles if c["cache"] == "dense"]),
        *_storages([c for c in results.cells if c["task"] == "text" and c.get("kl") is not None], name),
        *_streams([c for c in results.cells if c["task"] == "stream" and "nll" in c], name),
    ]
    failed = dict.fromkeys(f"- {c['cache']}: {c['error']}" for c in results.cells if "error" in c)
    if failed:
        parts += ["## Not run", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _needles(cells: list[Cell], tokens: int, name: str) -> list[str]:
    if not cells:
        return []
    rows: dict[tuple[str, Any], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell["cache"], cell["budget"]), {})[cell["question"]] = cell

    def mean(row: dict[str, Cell]) -> float:
        return statistics.fmean(c["score"] for c in row.values())

    lines = [
        (cache, _kept(budget), f"{max(c['bytes'] for c in row.values()):,}", *(_percent(row.get(q)) for q in QUESTIONS))
        for (cache, budget), row in sorted(rows.items(), key=lambda item: -mean(item[1]))
    ]
    count = min(c["examples"] for c in cells), max(c["examples"] for c in cells)
    asked = f"{count[0]}" if count[0] == count[1] else f"{count[0]} to {count[1]}"
    return [
        f"## One needle in {tokens:,} tokens",
        f"Percent of numbers of seven digits that were found, ± the standard error; {asked} questions a cell, the same "
        f"ones for all. Unseen: the text is compressed before the question is read.\n\n"
        f"![answers found by every cache]({name}-needles.png)",
        table(("cache", "kept", "bytes a row", "question unseen", "question seen"), lines),
        *_chance(cells),
        f"Against bytes, a line a cache:\n\n![answers found against bytes]({name}-bytes.png)",
    ]


QUESTIONS = ("unseen", "seen")


def _chance(cells: list[Cell]) -> list[str]:
    """Which strategies beat random choice by 30 points."""
    found = {(c["cache"], c["budget"]): c["score"] for c in cells if c["question"] == "unseen"}
    if ("random", "50%") not in found:
        return []
    floor = found["random", "50%"]
    names = [c for (c, budget), score in found.items() if budget == "50%" and ":" not in c and score >= floor + 0.3]
    return [
        f"With half of the tokens kept and the question unseen, `random` finds {100 * floor:.0f}%; {len(names)} "
        f"strategies are at least 30 points above it" + (f": {', '.join(sorted(names))}." if names else ".")
    ]


def _order(cells: list[Cell]) -> list[str]:
    """Our order and the published one, and the pairs in which they differ."""
    half = {c["cache"]: c for c in cells if c["budget"] == "50%" and c["question"] == "unseen"}
    ours: dict[str, Cell] = {}
    for method, (specs, _) in PUBLISHED.items():
        spec = next((s for s in specs if s in half), None)
        if spec is not None:
            ours[method] = half[spec]
    if len(ours) < 2:
        return []
    ranked = sorted(ours, key=lambda m: -ours[m]["score"])
    lines = [
        (method, f"`{ours[method]['cache']}`", PUBLISHED[method][1], f"{rank + 1}, {_percent(ours[method])}")
        for method in ours
        for rank in [ranked.index(method)]
    ]
    same = equal = other = 0
    clear = []
    for better, worse in combinations(ours, 2):  # in the published order
        gain, error = paired(ours[worse]["scores"], ours[better]["scores"])
        same, equal, other = same + (gain < 0), equal + (gain == 0), other + (gain > 0)
        if gain > CLEAR * error:
            clear.append(f"{worse} is {100 * gain:.0f} points above {better}")
    verdict = (
        f"Of {same + equal + other} pairs, {same} have the published order, {equal} are equal here, and {other} "
        f"have the other order"
    )
    verdict += (
        f", {len(clear)} of them by more than {CLEAR} standard errors of the difference: {'; '.join(clear)}."
        if clear
        else f", none of them by more than {CLEAR} standard errors of the difference."
    )
    return [
        "## The published order and ours",
        "Published: all tasks of RULER at 4,096 tokens with a model of 8 billion weights, half of the cache removed. "
        "Ours: one task, short texts and a model of 135 million weights, so the order matters here, not the numbers.",
        table(("method", "here", "published %", "rank and % here"), lines),
        verdict,
    ]


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """The mean of a - b over the examples that both have, and its standard error."""
    gains = [x - y for x, y in zip(a, b)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    return statistics.fmean(gains), error


def _lengths(cells: list[Cell]) -> list[str]:
    unseen = [c for c in cells if c["question"] == "unseen"]
    if len({c["tokens"] for c in unseen}) < 2:
        return []
    lines = [(f"{c['tokens']:,}", c["examples"], _percent(c)) for c in sorted(unseen, key=lambda c: c["tokens"])]
    return ["## Longer texts, nothing removed", table(("tokens", "questions", "`dense` finds %"), lines)]


def _storages(cells: list[Cell], name: str) -> list[str]:
    if not cells:
        return []
    plain = next((c["bytes"] for c in cells if c["cache"] == "dense"), None)
    lines = [
        (
            f"{c['cache']}, {_kept(c['budget'])}",
            f"{c['bytes'] / c['text']:,.0f}" + (f" ({100 * c['bytes'] / plain:.0f}%)" if plain else ""),
            f"{c['kl']:.5f} ± {c['kl_standard_error']:.5f}",
            f"{100 * c['top1']:.1f}%",
            f"{c['perplexity']:.3f}",
        )
        for c in sorted(cells, key=lambda c: c["bytes"])
    ]
    return [
        "## Fewer tokens or fewer bits",
        f"{cells[0]['tokens']:,} tokens of prose, decoded one by one after prompts of 500 tokens, beside a full cache "
        "in float32. What is not quantised is in bfloat16. Sorted by bytes: neighbours cost the same memory.\n\n"
        f"![divergence against bytes]({name}-storages.png)",
        table(("cache, kept", "bytes a token", "KL to full", "same top token", "perplexity"), lines),
        *_equal_bytes(cells),
    ]


def _equal_bytes(cells: list[Cell]) -> list[str]:
    """For caches of about the same size, the better one."""

    def label(c: Cell) -> str:
        return f"`{c['cache']}`" if c["budget"] is None else f"`{c['cache']}` with {c['budget']}"

    said = []
    for a, b in combinations(sorted(cells, key=lambda c: c["kl"]), 2):
        ratio = a["bytes"] / b["bytes"]
        if (a["budget"] is None) != (b["budget"] is None) and 0.85 <= ratio <= 1.18:
            said.append(f"- {label(a)} ({a['kl']:.4f}) is nearer to the full cache than {label(b)} ({b['kl']:.4f})")
    return ["At about equal bytes (KL in brackets):\n\n" + "\n".join(said)] if said else []


def _streams(cells: list[Cell], name: str) -> list[str]:
    if not cells:
        return []
    context = 8192
    lines = []
    for c in cells:
        points, size = c["nll"], 250
        before = [x for i, x in enumerate(points) if c["text"] - c["tokens"] + size * (i + 1) <= context]
        after = points[len(before) + 1 :]

        def perplexity(of: list[float]) -> str:
            return f"{math.exp(statistics.fmean(of)):,.1f}" if of else "-"

        lines.append((c["cache"], _kept(c["budget"]), f"{c['bytes']:,}", perplexity(before), perplexity(after)))
    return [
        "## Past the trained context",
        f"Perplexity of a text of {max(c['text'] for c in cells):,} tokens, inside the trained context ({context:,}) "
        f"and after it.\n\n![perplexity along the text]({name}-stream.png)",
        table(("cache", "tokens kept", "bytes", "inside", "after"), lines),
    ]


def _kept(budget: Any) -> str:
    return "all" if budget is None else f"{budget:,}" if isinstance(budget, int) else str(budget)


def _percent(cell: Cell | None) -> str:
    return "" if cell is None else f"{100 * cell['score']:.0f} ± {100 * cell['standard_error']:.0f}"
