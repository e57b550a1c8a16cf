"""Strategies, storages and attention kernels by name. Imports nothing of ours.

A name is registered by decorating its class; packages outside this one do it through the entry point
``litgpt_kv.strategies``, which is read the first time a name is looked up::

    # pyproject.toml of the other package
    [project.entry-points."litgpt_kv.strategies"]
    mine = "my_package.my_module"      # importing the module runs its @register
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

ENTRY_POINT = "litgpt_kv.strategies"
_KINDS: dict[str, dict[str, Any]] = {"strategy": {}, "storage": {}, "kernel": {}}

C = TypeVar("C", bound=type)


def register(kind: str, name: str) -> Callable[[C], C]:
    """Class decorator: make a class known as ``name`` among the things of one ``kind``.

    Args:
        kind: ``"strategy"`` (what is kept), ``"storage"`` (how it is stored) or ``"kernel"`` (decode attention).
        name: What users write on the command line and in YAML: lower case, no spaces.

    Raises:
        ValueError: For an unknown kind, a malformed name, or a name that another class holds.
    """
    table = _table(kind)
    if not name or name != name.lower() or any(c.isspace() for c in name):
        raise ValueError(f"A registered name is lower case without spaces, got {name!r}.")

    def enter(cls: C) -> C:
        known = table.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"The {kind} {name!r} is registered already, by {known.__module__}.{known.__qualname__}.")
        table[name] = cls
        return cls

    return enter


def names(kind: str) -> list[str]:
    """The sorted names of everything registered of one kind, other packages' included."""
    _load_entry_points()
    return sorted(_table(kind))


def get(kind: str, name: str) -> Any:
    """The class registered under a name.

    Raises:
        ValueError: For an unknown name; the message lists the known ones.
    """
    _load_entry_points()
    table = _table(kind)
    if name not in table:
        raise ValueError(f"Unknown {kind} {name!r}. Available: {', '.join(sorted(table))}.")
    return table[name]


def options(kind: str, name: str) -> list[str]:
    """The names of the options that the class registered under a name takes: the fields of a dataclass, or what a
    class says in `options`."""
    cls = get(kind, name)
    return (
        [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else [*getattr(cls, "options", ())]
    )


def build(kind: str, name: str, *args: Any, **given: Any) -> Any:
    """An instance of the class registered under a name, made with `args` and its own options.

    Raises:
        ValueError: For an unknown name, or for options that the class does not take.
    """
    known = options(kind, name)
    if unknown := sorted(set(given) - set(known)):
        takes = f"It takes {', '.join(sorted(known))}." if known else "It takes no options."
        raise ValueError(f"Unknown option {', '.join(map(repr, unknown))} for the {kind} {name!r}. {takes}")
    return get(kind, name)(*args, **given)


def _table(kind: str) -> dict[str, Any]:
    if kind not in _KINDS:
        raise ValueError(f"Unknown kind {kind!r}. Available: {', '.join(_KINDS)}.")
    return _KINDS[kind]


@functools.cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINT):
        try:
            point.load()
        except Exception as error:  # another package's code: say whose
            raise ValueError(f"The entry point {point.name} = {point.value} cannot be loaded: {error!r}") from error
