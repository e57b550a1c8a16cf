"""`litgpt_kv strategies`, and `--kv-cache.help NAME`, which shows one strategy; both read the strategies' classes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from litgpt_kv import registry
from litgpt_kv.cli.options import fail
from litgpt_kv.config import KVCacheArgs

if TYPE_CHECKING:
    from litgpt_kv.cache.strategies.base import Strategy

HEADER = ("strategy", "scores by", "evicts", "latent", "select, positions")


def strategies() -> None:
    """List every registered strategy in a table; `litgpt_kv strategies NAME` shows all about one.

    The columns: what its score is computed from; when it evicts; whether it supports multi-head latent attention; the
    defaults of `--kv-cache.select` and `--kv-cache.positions`. Below each line: what it keeps, and its source.
    """
    print(table(registry.names("strategy")))


def table(names: Sequence[str]) -> str:
    """Return a table: a line with columns for each strategy, and below it what it keeps and its source."""
    rows = [HEADER, *(columns(name) for name in names)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(x.ljust(width) for x, width in zip(row, widths)).rstrip() for row in rows]
    out = [lines[0], "-" * len(max(lines, key=len))]
    for name, line in zip(names, lines[1:]):
        cls = registry.get("strategy", name)
        out += [line, *(f"    {text}" for text in (summary(cls), cls.paper) if text)]
    return "\n".join(out)


def columns(name: str) -> tuple[str, ...]:
    """Return the columns of `HEADER` for a strategy with its default options."""
    cls = registry.get("strategy", name)
    try:
        strategy = cls()
    except TypeError:  # options without defaults
        return name, "?", "yes" if cls.evicts else "never", "?", f"{cls.select}, {cls.positions}"
    evicts = "prompt and decode" if strategy.evicts else "never"
    return (
        name,
        looks_at(strategy),
        evicts,
        "yes" if strategy.latent else "no",
        f"{strategy.select}, {strategy.positions}",
    )


def looks_at(strategy: Strategy) -> str:
    """Return what a strategy's score is computed from: attention (of which queries) and other data."""
    if strategy.recency:
        return "position"
    kinds = {"mass": "attention of all queries", "last": "attention of the newest query"}
    parts = [text for kind, text in kinds.items() if kind in strategy.statistics]
    parts += ["a second reading"] if strategy.rereads else []
    if "queries" in strategy.needs:
        parts.append(f"last {strategy.window} queries")  # type: ignore[attr-defined]
    others = {"keys": "keys", "values": "values", "output_weight": "output weights", "calibration": "calibration file"}
    parts += [text for need, text in others.items() if need in strategy.needs]
    return ", ".join(parts) or "chance"


def summary(cls: type) -> str:
    """Return the first line of a class' docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def describe(name: str) -> str:
    """A strategy on a few lines: what it keeps, its parameters with defaults, its paper."""
    cls = registry.get("strategy", name)
    fields = [f"{f.name}={f.default!r}" for f in dataclasses.fields(cls)]
    protects, select, positions = [], cls.select, cls.positions
    with contextlib.suppress(TypeError):  # an option has no default, so it cannot be built here
        strategy = cls()
        select, positions = strategy.select, strategy.positions
        for what, small, large in zip(("sinks", "recent"), strategy.protected(10_000), strategy.protected(20_000)):
            protects += [f"{what}={small // 100}%" if large == 2 * small else f"{what}={small}"] if small else []
    chosen = [f"select={select}"] if select != "head" else []
    parameters = ", ".join([*protects, f"positions={positions}", *chosen, *fields])
    return "\n".join([f"{name}: {summary(cls)}", f"    {parameters}", *([f"    {cls.paper}"] if cls.paper else [])])


def show_strategy(name: str) -> NoReturn:
    """Print all about one strategy, and end the program: `strategies h2o`, or `--kv-cache.help h2o`."""
    try:
        cls = registry.get("strategy", name)
    except ValueError as error:
        fail(str(error))
    print(describe(name))
    if more := (inspect.getdoc(cls) or "").partition("\n")[2].strip():
        print("\n" + more.replace("Args:\n", "Its own options, as --kv-cache.NAME:\n"))
    print("\nWhat every strategy takes, as --kv-cache.budget and so on:\n")
    print((inspect.getdoc(KVCacheArgs) or "").partition("Args:\n")[2])
    raise SystemExit(0)
