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
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

ENTRY_POINT = "litgpt_kv.strategies"
_KINDS: dict[str, dict[str, Any]] = {"strategy": {}, "storage": {}, "kernel": {}}

IMPORTED: dict[str, str] = {}  # users' files that were run, with a digest of each

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
    """The sorted names of everything registered of one kind, other packages' included.

    Names that begin with an underscore are for internal use and not listed.
    """
    _load_entry_points()
    return sorted(name for name in _table(kind) if not name.startswith("_"))


def get(kind: str, name: str) -> Any:
    """The class registered under a name.

    Raises:
        ValueError: For an unknown name; the message lists the known ones.
    """
    _load_entry_points()
    table = _table(kind)
    if name not in table:
        raise ValueError(f"Unknown {kind} {name!r:.80}. Available: {', '.join(names(kind))}.")
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


def import_file(path: str) -> ModuleType:
    """Run a Python file, whose classes register themselves, as a package's entry point would.

    Args:
        path: The file, `my_file.py`. One that was run already is not run again.

    Raises:
        ValueError: If there is no such file, or running it fails.
    """
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"There is no Python file {path!r} to import.")
    name = f"litgpt_kv_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is run
    IMPORTED[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code: say whose
        del sys.modules[name], IMPORTED[str(file)]
        raise ValueError(f"{path} cannot be imported: {error!r}") from error
    return module


def is_file_name(name: str) -> bool:
    """Whether a strategy is given as `my_file.py:MyStrategy` (or as the file alone)."""
    return name.partition(":")[0].endswith(".py")


def import_named(name: str) -> str:
    """The registered name of a strategy; one that is given as `my_file.py:MyStrategy` is imported first.

    A class that has not registered itself is registered under its own name in lower case.

    Raises:
        ValueError: If the file cannot be imported, or has no such class.
    """
    if not is_file_name(name):
        return name
    path, _, attribute = name.rpartition(":")
    if not path:
        raise ValueError(f"{name!r} needs the name of its strategy's class: {name}:MyStrategy.")
    cls = getattr(import_file(path), attribute, None)
    if not isinstance(cls, type):
        raise ValueError(f"{path} has no class {attribute!r}.")
    for known, registered in _KINDS["strategy"].items():
        if registered is cls:
            return known
    register("strategy", attribute.lower())(cls)
    return attribute.lower()


@functools.cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINT):
        try:
            point.load()
        except Exception as error:  # another package's code: say whose
            raise ValueError(f"The entry point {point.name} = {point.value} cannot be loaded: {error!r}") from error
