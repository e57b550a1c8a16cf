"""`litgpt_kv strategies`, and `--kv-cache.help NAME`, which shows one strategy."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from typing import NoReturn

from litgpt_kv import registry
from litgpt_kv.cli.options import fail
from litgpt_kv.config import KVCacheArgs


def strategies() -> None:
    """List every registered strategy: what it keeps, its parameters and defaults, its paper."""
    for name in registry.names("strategy"):
        print(describe(name))


def describe(name: str) -> str:
    """Return a few lines about a strategy: what it keeps, its parameters with defaults, its paper."""
    cls = registry.get("strategy", name)
    line = (inspect.getdoc(cls) or "").partition("\n")[0]
    fields = [f"{f.name}={f.default!r}" for f in dataclasses.fields(cls)]
    protects = []
    with contextlib.suppress(TypeError):  # an option has no default, so it cannot be built here
        for what, at_100, at_200 in zip(("sinks", "recent"), cls().protected(100), cls().protected(200)):
            protects += [f"{what}={at_100}%" if at_200 == 2 * at_100 else f"{what}={at_100}"] if at_100 else []
    parameters = ", ".join([*protects, f"positions={cls.positions}", *fields])
    return "\n".join([f"{name}: {line}", f"    {parameters}", *([f"    {cls.paper}"] if cls.paper else [])])


def show_strategy(name: str) -> NoReturn:
    """Print all about one strategy, and end the program: `--kv-cache.help h2o`."""
    try:
        cls = registry.get("strategy", name)
    except ValueError as error:
        fail(str(error))
    print(describe(name))
    print("\n" + (inspect.getdoc(cls) or "").partition("\n")[2].strip())
    print("\nWhat every strategy takes, as --kv-cache.budget and so on:\n")
    print((inspect.getdoc(KVCacheArgs) or "").partition("Args:\n")[2])
    raise SystemExit(0)
