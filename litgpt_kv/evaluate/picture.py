"""Quality against memory, one line a cache, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MARKERS = "osD^vPX*<>hp"


def draw(cells: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw the share of answers found against bytes, a panel for each kind of question; return the files written.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    answered = [cell for cell in cells if "score" in cell]
    if not answered:
        return []
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError('The picture needs matplotlib: pip install "litgpt_kv[evaluate]".') from error
    panels = list(dict.fromkeys(cell["question"] for cell in answered))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.8), sharey=True, squeeze=False)
    names = list(dict.fromkeys(cell["cache"] for cell in answered))
    styles = {name: (f"C{i % 10}", MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    styles |= {"random": ("0.5", "x"), "dense": ("black", "s")}
    for axis, question in zip(axes[0], panels):
        for name in names:
            points = _points([c for c in answered if c["cache"] == name and c["question"] == question])
            if not points:
                continue
            sizes, scores, errors = zip(*points)
            colour, marker = styles[name]
            line = {"color": colour, "marker": marker, "linewidth": 1.4, "markersize": 6, "label": name}
            axis.errorbar([s / 1e6 for s in sizes], scores, errors, capsize=2, **line)
        axis.set(title=f"question {question} while compressing", xlabel="cache of a row in MB", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("answers found in %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    files = [folder / f"quality.{kind}" for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, bbox_inches="tight", dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
    return files


def _points(cells: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """For each budget the bytes, and the mean of all tasks in percent with its standard error."""
    by_budget: dict[Any, list[dict[str, Any]]] = {}
    for cell in cells:
        by_budget.setdefault(cell["budget"], []).append(cell)
    points = []
    for group in by_budget.values():
        error = sum(cell["standard_error"] ** 2 for cell in group) ** 0.5 / len(group)
        score = sum(cell["score"] for cell in group) / len(group)
        points.append((max(cell["bytes"] for cell in group), 100 * score, 100 * error))
    return sorted(points)
