"""Pictures of results as PNG and SVG: answers found, quality against bytes, storages, and perplexity along a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

Cells = list[dict[str, Any]]
MARKERS = "osD^vPX*<>hp"
COLOURS = [f"C{i}" for i in range(10) if i != 7]  # 7 is the grey of `random`
FIXED = {"random": ("0.5", "x"), "dense": ("black", "s")}


def draw(cells: Cells, folder: Path, name: str = "quality") -> list[Path]:
    """Draw the share of answers found against bytes, one line a cache, a panel for each kind of question.

    Args:
        cells: Of all kinds. folder: Where the files go. name: Of the files.

    Returns:
        The files written, PNG and SVG; none if no question was asked.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    answered = [cell for cell in cells if "score" in cell]
    if not answered:
        return []
    plt = _pyplot()
    panels = sorted({cell["question"] for cell in answered}, reverse=True)
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 5.2), sharey=True, squeeze=False)
    names = _best_first(answered)
    styles = {cache: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, cache in enumerate(names)} | FIXED
    for axis, question in zip(axes[0], panels):
        for cache in names:
            points = _points([c for c in answered if c["cache"] == cache and c["question"] == question])
            if not points:
                continue
            sizes, scores, errors = zip(*points)
            colour, marker = styles[cache]
            line = {"color": colour, "marker": marker, "linewidth": 1.4, "markersize": 6, "label": cache}
            axis.errorbar([s / 1e6 for s in sizes], scores, errors, capsize=2, elinewidth=0.6, **line)
        axis.set(title=f"question {question} while compressing", xlabel="cache of a row in MB", ylim=(-5, 105))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("answers found in %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, folder / name)


def draw_text(cells: Cells, folder: Path, name: str = "text") -> list[Path]:
    """Draw how far the next token's distribution is from the full cache's, against bytes: a line a cache.

    Args:
        cells: Of all kinds. folder: Where the files go. name: Of the files.

    Returns:
        The files written, PNG and SVG; none if no text was read beside a full cache.
    """
    read = [cell for cell in cells if (cell.get("kl") or 0) > 0 and "text" in cell]
    if not read:
        return []
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8.2, 5.2))
    names = sorted({c["cache"] for c in read}, key=lambda cache: min(c["kl"] for c in read if c["cache"] == cache))
    for i, cache in enumerate(names):
        points = sorted((c for c in read if c["cache"] == cache), key=lambda c: c["bytes"])
        colour, marker = FIXED.get(cache, (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]))
        line = {"color": colour, "marker": marker, "linewidth": 1.4, "markersize": 6, "label": cache}
        axis.plot([c["bytes"] / 1e6 for c in points], [c["kl"] for c in points], **line)
        for c in points:
            if c["budget"] is not None:
                axis.annotate(str(c["budget"]), (c["bytes"] / 1e6, c["kl"]), xytext=(5, 4), textcoords="offset points",
                              fontsize=8, color=colour)  # fmt: skip
    axis.set(yscale="log", xlabel="cache of a row in MB", ylabel="KL divergence from the full cache in nats a token")
    axis.set_title(f"a text of {read[0]['text']:,} tokens; lower is nearer to the full cache")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, folder / name)


def draw_ranking(cells: Cells, path: Path) -> list[Path]:
    """Draw a row for each cache, best first, and in it a dot for each budget; a panel for each kind of question.

    Args:
        cells: Of one task and length. path: Of the files, without PNG and SVG.
    """
    plt = _pyplot()
    panels = sorted({cell["question"] for cell in cells}, reverse=True)
    budgets = [b for b in dict.fromkeys(cell["budget"] for cell in cells) if b is not None]
    names = _best_first(cells)
    size = (4.6 * len(panels) + 1.6, 0.27 * len(names) + 1.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, question in zip(axes[0], panels):
        for i, budget in enumerate([None, *budgets]):
            found = [c for c in cells if c["question"] == question and c["budget"] == budget]
            if not found:
                continue
            label = "all tokens kept" if budget is None else f"{budget} kept"
            colour = "black" if budget is None else f"C{i - 1}"
            where = [
                names.index(c["cache"]) + (0 if budget is None else 0.16 * (2 * i - 1 - len(budgets))) for c in found
            ]
            scores, errors = ([100 * c[k] for c in found] for k in ("score", "standard_error"))
            marker = "s" if budget is None else "osD^v"[(i - 1) % 5]
            dot = {"fmt": marker, "color": colour, "markersize": 5.5, "elinewidth": 1, "label": label}
            axis.errorbar(scores, where, xerr=errors, **dot)
        axis.set(title=f"question {question} while compressing", xlabel="answers found in %", xlim=(-4, 104))
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(labels), frameon=False)
    return _save(figure, path)


def draw_storages(cells: Cells, path: Path) -> list[Path]:
    """Draw the divergence from the full cache against bytes a token: colours for storages, markers for what is kept."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8.2, 5.2))
    cells = [c for c in cells if c["kl"] > 0]
    storages = list(dict.fromkeys(c["cache"].partition("@")[2] or "plain" for c in cells))
    colours = {"plain": "black"} | {
        name: COLOURS[i % len(COLOURS)] for i, name in enumerate(storages) if name != "plain"
    }
    kept = list(dict.fromkeys((c["cache"].partition("@")[0], c["budget"]) for c in cells))
    for c in cells:
        family, _, storage = c["cache"].partition("@")
        marker = MARKERS[kept.index((family, c["budget"])) % len(MARKERS)]
        point = {"color": colours[storage or "plain"], "marker": marker, "s": 55, "zorder": 2}
        axis.scatter(c["bytes"] / c["text"], c["kl"], **point)
    axis.set(xscale="log", yscale="log", xlabel="bytes of the cache for each token of the text")
    axis.set_ylabel("KL divergence from the full cache in nats a token")
    _plain_numbers(axis.xaxis)
    axis.grid(alpha=0.3, which="both")
    dots = [plt.Line2D([], [], color=colours[name], marker="o", linestyle="", label=name) for name in storages]
    shapes = [
        plt.Line2D([], [], color="0.4", marker=MARKERS[i % len(MARKERS)], linestyle="", label=_with_budget(*key))
        for i, key in enumerate(kept)
    ]
    side = {"loc": "center left", "frameon": False}
    figure.legend(handles=dots, title="storage", bbox_to_anchor=(1.0, 0.72), **side)
    figure.legend(handles=shapes, title="tokens kept", bbox_to_anchor=(1.0, 0.3), **side)
    return _save(figure, path)


def _with_budget(name: str, budget: Any) -> str:
    return name if budget is None else f"{name} {budget}"


def draw_streams(cells: Cells, path: Path, size: int, start: int, context: int) -> list[Path]:
    """Draw perplexity along a text, a line for each cache.

    Args:
        cells: With `nll`, the means of `size` tokens each. start: Position of the first of them.
        context: Of the model, a vertical line.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8.2, 4.4))
    for i, c in enumerate(cells):
        at = [start + size * (n + 0.5) for n in range(len(c["nll"]))]
        name = c["cache"] if c["budget"] is None else f"{c['cache']}, {c['budget']:,} tokens"
        colour = "black" if c["cache"].startswith("dense") else f"C{i}"
        line = {"color": colour, "label": f"{name}: {c['bytes'] / 1e6:.0f} MB", "linewidth": 1.3}
        axis.plot(at, [math.exp(min(x, 50)) for x in c["nll"]], **line)
    axis.axvline(context, color="0.4", linestyle=":", linewidth=1.2)
    axis.annotate("trained context", (context, 0.97), xycoords=("data", "axes fraction"), xytext=(5, 0),
                  textcoords="offset points", va="top", fontsize=9, color="0.3")  # fmt: skip
    axis.set(yscale="log", xlabel="position in the text in tokens", ylabel=f"perplexity, {size} tokens at a time")
    _plain_numbers(axis.yaxis)
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    return _save(figure, path)


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with numbers as 2,000."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError('The picture needs matplotlib: pip install "litgpt_kv[evaluate]".') from error
    plt.rcParams["svg.hashsalt"] = "litgpt_kv"  # the same file for the same results
    return plt


def _save(figure: Any, path: Path) -> list[Path]:
    figure.tight_layout()
    files = [path.parent / f"{path.name}.{kind}" for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, bbox_inches="tight", dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    _pyplot().close(figure)
    return files


def _best_first(cells: Cells) -> list[str]:
    scores: dict[str, list[float]] = {}
    for cell in cells:
        scores.setdefault(cell["cache"], []).append(cell["score"])
    return sorted(scores, key=lambda name: -sum(scores[name]) / len(scores[name]))


def _points(cells: Cells) -> list[tuple[float, float, float]]:
    """For each budget the bytes, and the mean of all tasks in percent with its standard error."""
    by_budget: dict[Any, Cells] = {}
    for cell in cells:
        by_budget.setdefault(cell["budget"], []).append(cell)
    points = []
    for group in by_budget.values():
        error = sum(cell["standard_error"] ** 2 for cell in group) ** 0.5 / len(group)
        score = sum(cell["score"] for cell in group) / len(group)
        points.append((max(cell["bytes"] for cell in group), 100 * score, 100 * error))
    return sorted(points)
