"""A picture of the cost of a token against the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MARKERS = "osD^vPX*<>hp"
KINDS = ("png", "svg", "pdf")


def check_picture(path: str) -> Path:
    """Check where a picture is to be written, and that matplotlib is there.

    Raises:
        ValueError: If the name does not end in .png, .svg or .pdf, or matplotlib is not installed.
    """
    file = Path(path)
    if file.suffix.lower().lstrip(".") not in KINDS:
        raise ValueError(f"plot must be a file name that ends in .png, .svg or .pdf, got {path!r:.200}.")
    _pyplot()
    return file


def draw_costs(rows: list[dict[str, Any]], path: Path) -> Any:
    """Draw milliseconds a decoded token against the context, a line for each library and cache.

    Args:
        rows: Of a report of `compare_peers`; those of libraries that could not run are left out.
        path: Where the picture is written.

    Returns:
        The figure, closed.
    """
    plt = _pyplot()
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        if "problem" not in row:
            best, median = (ms / row["rows"] for ms in row["decode_ms"])
            lines.setdefault(f"{row['library']} {row['cache']}", []).append((row["context"], best, median))
    figure, axis = plt.subplots(figsize=(8.2, 5.2))
    for i, (name, points) in enumerate(lines.items()):
        contexts, best, median = zip(*sorted(points))
        own = name.startswith("litgpt_kv")
        style = {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "markersize": 6}
        axis.plot(contexts, best, label=name, linewidth=2.0 if own else 1.2, linestyle="-" if own else "--", **style)
        axis.fill_between(contexts, best, median, color=style["color"], alpha=0.1, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel="context in tokens", ylabel="decoding in ms a token, best and median")
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    _plain_numbers(axis.yaxis)
    axis.grid(alpha=0.3, axis="y", which="both")
    axis.grid(alpha=0.3, axis="x", which="major")
    figure.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", dpi=150)
    plt.close(figure)
    return figure


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
    return plt
