"""Register strategies, storages, attention kernels and libraries to compare with, by name.

This module imports nothing of litgpt_kv.

A class decorated with `register` is known by its name. When a name is first looked up, the modules with this package's
own classes are imported (`OWN`), and those that other packages name in the entry point ``litgpt_kv.strategies``::

    # pyproject.toml of the other package
    [project.entry-points."litgpt_kv.strategies"]
    my_package = "my_package.my_module"      # importing the module runs its @register
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

ENTRY_POINT = "litgpt_kv.strategies"
OWN = {  # where the classes of this package are
    "strategy": "litgpt_kv.cache.strategies",
    "storage": "litgpt_kv.cache.storage",
    "kernel": "litgpt_kv.attention.kernels",
    "peer": "litgpt_kv.benchmark.peers",
}
_KINDS: dict[str, dict[str, Any]] = {kind: {} for kind in OWN}

IMPORTED: dict[str, str] = {}  # path of each user file that was run: digest of its content

C = TypeVar("C", bound=type)


def register(kind: str, name: str) -> Callable[[C], C]:
    """Register a class under a name; to be used as a class decorator.

    Args:
        kind: ``"strategy"`` (which tokens are kept), ``"storage"`` (how they are stored), ``"kernel"`` (decode
            attention) or ``"peer"`` (another library, for the benchmark).
        name: The name on the command line and in YAML: lower case, no spaces.

    Raises:
        ValueError: For an unknown kind, an invalid name, or a name that another class has.
    """
    table = _table(kind)
    if not name or name != name.lower() or any(c.isspace() for c in name):
        raise ValueError(f"A registered name must be lower case without spaces, got {name!r}.")

    def add(cls: C) -> C:
        if not cls.__module__.startswith("litgpt_kv."):
            _load_own(kind)  # else this class could take the name of one that comes later
        known = table.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"The {kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}.")
        table[name] = cls
        return cls

    return add


def names(kind: str) -> list[str]:
    """Return the sorted names of all registered classes of one kind, those of other packages included.

    Names that begin with an underscore are for internal use and not listed.
    """
    table = _table(kind)
    _load(kind)
    return sorted(name for name in table if not name.startswith("_"))


def get(kind: str, name: str) -> Any:
    """Return the class that is registered under a name.

    Raises:
        ValueError: For an unknown name; the message lists the known ones, and a similar one.
    """
    table = _table(kind)
    _load(kind)
    if name not in table:
        hint = did_you_mean(name, names(kind))
        raise ValueError(f"Unknown {kind} {name!r:.80}. Available: {', '.join(names(kind))}.{hint}")
    return table[name]


def options(kind: str, name: str) -> list[str]:
    """Return the names of a registered class's options: the fields of a dataclass, else its attribute `options`."""
    cls = get(kind, name)
    return (
        [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else [*getattr(cls, "options", ())]
    )


def build(kind: str, name: str, *args: Any, **given: Any) -> Any:
    """Build an instance of a registered class from `args` and its own options.

    Raises:
        ValueError: For an unknown name, or for options that the class does not take.
    """
    known = options(kind, name)
    if unknown := sorted(set(given) - set(known)):
        takes = f"It takes {', '.join(sorted(known))}." if known else "It takes no options."
        takes = f"{takes}{did_you_mean(unknown[0], known)}"
        raise ValueError(f"Unknown option {', '.join(map(repr, unknown))} for the {kind} {name!r}. {takes}")
    return get(kind, name)(*args, **given)


def did_you_mean(given: Any, known: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean 'NAME'?" with the most similar of some names, "" if none is similar.

    Args:
        given: What a user wrote.
        known: The names that exist.
        prefix: Is written before the name, such as the dashes of an option.
    """
    if not isinstance(given, str):
        return ""
    names_by_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given.lower()[:100], list(names_by_case), n=1, cutoff=0.6)
    return f" Did you mean {prefix + names_by_case[close[0]]!r}?" if close else ""


def _table(kind: str) -> dict[str, Any]:
    if kind not in _KINDS:
        raise ValueError(f"Unknown kind {kind!r}. Available: {', '.join(_KINDS)}.")
    return _KINDS[kind]


def import_file(path: str) -> ModuleType:
    """Import a Python file, whose classes register themselves.

    Args:
        path: The file, `my_file.py`. A file that was imported before is not run again.

    Returns:
        The module.

    Raises:
        ValueError: If the file does not exist, or raises an error.
    """
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"There is no Python file {path!r} to import.")
    name = f"litgpt_kv_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks up its module while the file is run
    IMPORTED[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything: name the file
        del sys.modules[name], IMPORTED[str(file)]
        raise ValueError(f"{path} cannot be imported: {error!r}") from error
    return module


def is_file_name(name: str) -> bool:
    """Return whether a name is `my_file.py:MyStrategy`, or only `my_file.py`."""
    return name.partition(":")[0].endswith(".py")


def import_named(name: str) -> str:
    """Return the registered name of a strategy; import it first if it is given as `my_file.py:MyStrategy`.

    A class that has not registered itself is registered under its class name in lower case.

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
    _load_own("strategy")
    for known, registered in _KINDS["strategy"].items():
        if registered is cls:
            return known
    register("strategy", attribute.lower())(cls)
    return attribute.lower()


def _load(kind: str) -> None:
    """Import all modules whose classes register themselves."""
    _load_own(kind)
    _load_entry_points()


@functools.cache
def _load_own(kind: str) -> None:
    importlib.import_module(OWN[kind])


@functools.cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINT):
        try:
            point.load()
        except Exception as error:  # the other package may raise anything: name it
            raise ValueError(f"The entry point {point.name} = {point.value} cannot be loaded: {error!r}") from error
