"""Sphinx extension: a section for each registered strategy, notebooks, and links to files outside of docs/.

`docs/strategies.md` ends with a comment. Before Sphinx reads the page, it is replaced by what `sections` returns. That
comes from each strategy's class, from `strategy_notes.yaml`, and from `results/smollm2-135m.json`, if it is there. A
comment `<!-- picture: FILE | TEXT -->` becomes a picture if the file is there.
"""

from __future__ import annotations

import html
import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from litgpt_kv import registry
from litgpt_kv.cli.strategies import looks_at, summary

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "results" / "smollm2-135m.json"
MARK = re.compile(r"^<!-- strategies:.*-->$", re.MULTILINE)
DRAWING = re.compile(r"^<!-- picture: (\S+) \| (.*) -->$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")
PAGES = {  # files outside of docs/ that a page includes
    "CONTRIBUTING.md": "contributing.md",
    "litgpt_kv/cache/README.md": "one_step.md",
    "tests/semantics/README.md": "exactness.md",
}
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
Cell = dict[str, Any]


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", on_page)
    app.connect("include-read", on_include)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def on_page(app: Any, name: str, source: list[str]) -> None:
    """Change a page's source before Sphinx reads it."""
    text = markdown(json.loads(source[0])) if app.env.doc2path(name).suffix == ".ipynb" else source[0]
    text = MARK.sub(lambda _: sections(), text) if name == "strategies" else text
    text = DRAWING.sub(lambda found: f"![{found[2]}]({found[1]})" if (DOCS / found[1]).exists() else "", text)
    source[0] = with_links(text, (DOCS / name).parent, (DOCS / name).parent)


def on_include(app: Any, path: Path, name: str, source: list[str]) -> None:
    """Change the source of a file that a page includes: its links start at its own folder."""
    source[0] = with_links(source[0], (DOCS / path).resolve().parent, (DOCS / name).parent)


def markdown(notebook: Mapping[str, Any]) -> str:
    """Return a notebook as Markdown, with the outputs that are stored in it."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            if image := output.get("data", {}).get("image/png"):
                data = "".join(image).replace("\n", "")
                parts.append(f'```{{raw}} html\n<img alt="" src="data:image/png;base64,{data}"/>\n```')
            elif output["output_type"] == "stream":
                parts.append("```text\n" + "".join(output["text"]).rstrip() + "\n```")
    return "\n\n".join(parts)


def with_links(text: str, folder: Path, page: Path) -> str:
    """Return Markdown whose links, which start at `folder`, start at a page's folder.

    A link to a file that a page includes leads to that page. Of other files outside of docs/ the path is shown.
    """

    def moved(link: re.Match) -> str:
        title, target, anchor = link[1], (folder / link[2]).resolve(), link[3] or ""
        path = os.path.relpath(target, DOCS.parent)
        if not target.exists():
            return link[0]
        if path in PAGES:
            target, anchor = DOCS / PAGES[path], ""
        if not target.is_relative_to(DOCS):
            return f"{title} (`{path}`)" if title.strip("`") != path else title
        return f"[{title}]({os.path.relpath(target, page)}{anchor})"

    return LINK.sub(moved, text)


def sections() -> str:
    """Return Markdown: a section for each strategy of this package, in the order of `strategy_notes.yaml`."""
    notes: dict[str, dict[str, str]] = yaml.safe_load((DOCS / "strategy_notes.yaml").read_text(encoding="utf-8"))
    cells = measured()
    return "\n\n".join(section(name, note, cells) for name, note in notes.items())


def section(name: str, note: Mapping[str, str], cells: list[Cell]) -> str:
    """Return the section of one strategy."""
    cls = registry.get("strategy", name)
    strategy = cls()
    detail, _, options = (inspect.getdoc(cls) or "").partition("\n")[2].partition("Args:\n")
    rows = {
        "score": f"`{note['formula']}`",
        "reads": looks_at(strategy),
        "protects": protects(strategy),
        "costs": cost(strategy),
        "positions · select": f"{strategy.positions} · {strategy.select}",
        "latent attention": "yes" if strategy.latent else "no",
        "source": ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", cls.paper) or "none",
    }
    lines = [f"## {name}", summary(cls), f"**When to use it:** {note['use']}", "| | |\n|---|---|"]
    lines[-1] += "".join(f"\n| {key} | {value} |" for key, value in rows.items())
    if detail.strip():
        lines.append(detail.strip())
    if options.strip():
        defaults = {f.name: f.default for f in fields(cls)}
        found = re.findall(r"^    (\w+): (.*(?:\n      +.*)*)", options, re.MULTILINE)
        lines.append("\n".join(f"- `{n}` ({defaults[n]}): {' '.join(text.split())}" for n, text in found))
    lines += curve(name, cells)
    return "\n\n".join(lines)


def protects(strategy: Any) -> str:
    """Return the tokens that a strategy protects by default."""
    parts = []
    for what, at_100, at_200 in zip(("first", "last"), strategy.protected(100), strategy.protected(200)):
        if at_100:
            share = f"{at_100}% of the budget" if at_200 == 2 * at_100 else "token" if at_100 == 1 else f"{at_100}"
            parts.append(f"the {what} {share}")
    return " and ".join(parts) or "nothing but the newest token"


def cost(strategy: Any) -> str:
    """Return what a strategy costs, in memory beside keys and values, and in time."""
    if not strategy.evicts or strategy.recency:
        return "nothing: the score is the position" if strategy.evicts else "memory for every token"
    parts = []
    if strategy.statistics:
        parts.append(f"{4 * len(strategy.statistics)} bytes for each kept token and head")
    if "queries" in strategy.needs:
        parts.append(f"the last {strategy.window} queries of each row, kept")
    if strategy.rereads:
        parts.append("a compressed prompt is read twice")
    if {"mass", "last"} & set(strategy.statistics):
        parts.append("attention weights must be added up, those of prompts, too")
    if strategy.needs:
        parts.append("a full row reads what it keeps, layer by layer; `interval` makes that rare")
    else:
        parts.append("all layers are scored at once")
    return "; ".join(parts)


# -- what was measured -------------------------------------------------------------------------------------------------


def measured() -> list[Cell]:
    """Return the answered questions of the measurement on a real model, of the length that all caches share.

    Caches with a storage of their own are left out. None if there is no file.
    """
    if not RESULTS.exists():
        return []
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if "score" in cell and "@" not in cell["cache"]]
    shortest = min((cell["tokens"] for cell in cells), default=0)
    return [cell for cell in cells if cell["tokens"] == shortest]


def mean(cells: list[Cell]) -> float | None:
    """Return the share of answers found, in percent; None for no cells."""
    return 100 * sum(cell["score"] for cell in cells) / len(cells) if cells else None


def points(cells: list[Cell], cache: str, question: str) -> list[tuple[float, float]]:
    """Return bytes and the share of answers found of a cache, at each budget."""
    by_budget: dict[Any, list[Cell]] = {}
    for cell in cells:
        if (cell["cache"], cell["question"]) == (cache, question):
            by_budget.setdefault(cell["budget"], []).append(cell)
    return sorted((max(c["bytes"] for c in group), mean(group) or 0.0) for group in by_budget.values())


def curve(name: str, cells: list[Cell]) -> list[str]:
    """Return a picture and a table of what was measured of a strategy; nothing if it was not."""
    own = [cell for cell in cells if re.split("[: ]", cell["cache"])[0] == name]
    if not own:
        return []
    caches = dict.fromkeys(cell["cache"] for cell in cells)
    drawn = {cache: points(cells, cache, "unseen") for cache in caches}
    text = (
        f"**Measured** on SmolLM2-135M-Instruct, {own[0]['tokens']} tokens (`results/smollm2-135m.json`): answers found"
    )
    parts = [f"{text}, with the question seen or not seen while the text was compressed. The curve is for not seen."]
    if any(drawn[cell["cache"]] for cell in own):
        parts.append(picture(drawn, {cell["cache"] for cell in own}))
    rows = ["| cache | budget | bytes of a row | not seen | seen |\n|---|---|---|---|---|"]
    for cache, budget in dict.fromkeys((c["cache"], c["budget"]) for c in own):
        group = [c for c in own if (c["cache"], c["budget"]) == (cache, budget)]
        found = [mean([c for c in group if c["question"] == question]) for question in ("unseen", "seen")]
        shown = " | ".join("" if share is None else f"{share:.0f}%" for share in found)
        size = max(c["bytes"] for c in group)
        rows.append(f"| `{cache}` | {'all' if budget is None else budget} | {size:,} | {shown} |")
    return [*parts, "\n".join(rows)]


def picture(drawn: Mapping[str, list[tuple[float, float]]], marked: set[str]) -> str:
    """Return an SVG: answers found against bytes, this strategy in colour, the others in grey."""
    width, height, left, top, plot_w, plot_h = 520, 240, 48, 14, 452, 180
    largest = max(x for line in drawn.values() for x, _ in line)

    def place(x: float, y: float) -> str:
        return f"{left + plot_w * x / largest:.1f},{top + plot_h * (1 - y / 100):.1f}"

    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif">']
    out.append(f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>')
    for y in (0, 50, 100):
        at = top + plot_h * (1 - y / 100)
        out.append(f'<line x1="{left}" y1="{at}" x2="{left + plot_w}" y2="{at}" stroke="#dddddd"/>')
        out.append(f'<text x="{left - 6}" y="{at + 4}" font-size="11" text-anchor="end" fill="#444444">{y}%</text>')
    for cache, line in sorted(drawn.items(), key=lambda item: item[0] in marked):
        colour, thick = ("#1f6fb5", 2.2) if cache in marked else ("#c8c8c8", 1)
        where = " ".join(place(*point) for point in line)
        out.append(f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="{thick}"/>')
        if cache in marked:
            dots = [place(*point).split(",") for point in line]
            out += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in dots]
            if dots:
                x, y = map(float, dots[0])
                label = html.escape(cache)
                out.append(f'<text x="{x + 6}" y="{y - 7}" font-size="12" fill="{colour}">{label}</text>')
    for _, y in drawn.get("dense", [])[:1]:
        at = top + plot_h * (1 - y / 100)
        dash = 'stroke="#777777" stroke-dasharray="4 3"'
        out.append(f'<line x1="{left}" y1="{at:.1f}" x2="{left + plot_w}" y2="{at:.1f}" {dash}/>')
        out.append(f'<text x="{left + 4}" y="{at + 13:.1f}" font-size="11" fill="#777777">dense</text>')
    foot = f"bytes of a row, to {largest / 1e6:.1f} MB; answers found; other caches in grey"
    out.append(f'<text x="{left}" y="{height - 14}" font-size="11" fill="#444444">{foot}</text></svg>')
    return "```{raw} html\n" + "\n".join(out) + "\n```"
