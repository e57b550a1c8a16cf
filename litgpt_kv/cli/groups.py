"""The classes of arguments of a command, whose fields are its options; values of a strategy's own options get types."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from jsonargparse import ArgumentParser

from litgpt_kv import registry
from litgpt_kv.arguments import Without
from litgpt_kv.cli.refusals import describe
from litgpt_kv.config import KVCacheArgs, shown, split_name
from litgpt_kv.llm.safe_load import one_line

FLAT = ("SamplingArgs", "StoppingArgs", "RunArgs", "DeviceArgs", "ServeArgs")  # by name: a server's need torch
MOST_SHOWN = 3  # strategies whose options a message lists


@dataclass(frozen=True)
class Group:
    """A parameter of a command whose type is a class of arguments: each field of the class is an option."""

    parameter: str
    cls: type
    default: Any
    without: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        return "" if self.cls.__name__ in FLAT else f"{self.parameter}."

    @property
    def names(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self.cls) if f.name not in self.without]

    def build(self, given: Mapping[str, Any]) -> Any:
        """Return an instance with the values that the parser found; strategy `options` get the types of its fields."""
        value = given.get(self.parameter)
        if self.prefix and value is not None:
            raise ValueError(f"{self.parameter} must be a mapping of options, got {shown(value)}.")
        values = {name: given[self.prefix + name] for name in self.names if self.prefix + name in given}
        if self.cls is KVCacheArgs and values:
            check_names(values)
            if values["options"]:
                values["options"] = typed_options(compared(given, values["strategy"]), values["options"])
        return dataclasses.replace(self.default, **values)


def groups_of(command: Callable[..., Any]) -> list[Group]:
    """Return the parameters of a command whose types are classes of arguments."""
    found = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        cls, without = parameter.annotation, ()
        if get_origin(cls) is Annotated:
            cls, *markers = get_args(cls)
            without = next((marker.names for marker in markers if isinstance(marker, Without)), ())
        if dataclasses.is_dataclass(cls):
            default = cls() if parameter.default is inspect.Parameter.empty else parameter.default
            found.append(Group(name, cls, default, without))
    return found


def check_names(values: Mapping[str, Any]) -> None:
    """Look up strategies, storages and the attention kernel by name, before a model is loaded.

    Raises:
        ValueError: For an unknown name.
    """
    for kind, field in (("strategy", "strategy"), ("storage", "storage"), ("kernel", "attention")):
        value = values.get(field)
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(name, str) and (kind, name) != ("strategy", "none"):
                registry.get(kind, name)


def compared(given: Mapping[str, Any], strategy: str | list[str]) -> list[str]:
    """Return the strategies that may take a cache's options: where a command compares some, these.

    Args:
        given: The values of all options.
        strategy: The strategy of `--kv-cache`, or one for each layer.

    Raises:
        ValueError: If the file of a strategy cannot be imported.
    """
    own = list(dict.fromkeys([strategy] if isinstance(strategy, str) else strategy))
    if "strategies" not in given:
        return own
    if given["strategies"] is None:  # all of them, or the one of --kv-cache
        return list(dict.fromkeys([*own, *registry.names("strategy")]))
    return [split_name(spec.split()[0])[0] for spec in given["strategies"] if spec.split()] or own


def typed_options(strategy: str | list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the strategies' own options to the types of their fields.

    Raises:
        ValueError: For an unknown strategy or option, or a value of the wrong type.
    """
    names = [strategy] if isinstance(strategy, str) else list(strategy)
    if "none" in names or not options:
        return dict(options)
    takes = {name: registry.options("strategy", name) for name in names}
    if unknown := [key for key in options if not any(key in own for own in takes.values())]:
        raise ValueError(f"Unknown kv_cache option {', '.join(map(shown, unknown))}. {_known(unknown[0], takes)}")
    out = dict(options)
    for name, own in takes.items():
        out |= _typed(name, {key: value for key, value in options.items() if key in own})
    return out


def _known(unknown: str, takes: Mapping[str, list[str]]) -> str:
    """Return what a message says after an unknown option: the options of some strategies, and who has the unknown."""
    fields = [f.name for f in dataclasses.fields(KVCacheArgs) if f.name not in ("strategy", "options")]
    if len(takes) > MOST_SHOWN:
        own = "--kv-cache.help NAME shows those of one strategy"
    else:
        own = "; ".join(f"{name!r} {'also ' + ', '.join(t) if t else 'has no options'}" for name, t in takes.items())
    hint = registry.did_you_mean(unknown, [*fields, *(key for keys in takes.values() for key in keys)])
    others = [name for name in registry.names("strategy") if unknown in registry.options("strategy", name)]
    if others:
        hint = f" {unknown!r} is an option of {', '.join(others)}: choose one with --kv-cache NAME."
    return f"Every strategy takes {', '.join(fields)}; {own}.{hint}"


def _typed(strategy: str, options: dict[str, Any]) -> dict[str, Any]:
    if not options:
        return {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(registry.get("strategy", strategy))
    if opened := [name for name in options if is_open(parser, name)]:
        raise ValueError(f"kv_cache {strategy!r}: {opened[0]} is not a number or text; it can be given in Python only.")
    try:
        return {k: v for k, v in parser.parse_object(options).as_dict().items() if k in options}
    except Exception as error:  # argparse's and jsonargparse's error types differ between versions
        found = re.search(r'[Kk]ey "([^"]+)"', str(error))
        if found is None or found[1] not in options:
            raise ValueError(f"kv_cache {strategy!r}: {one_line(error)}") from error
        words = describe(_hint(parser, found[1]))
        expected = f": it must be {words}" if words else ""
        value = shown(options[found[1]])
        raise ValueError(f"The option {found[1]} of {strategy!r} cannot be {value}{expected}.") from error


def is_open(parser: ArgumentParser, name: str) -> bool:
    """Return whether jsonargparse may import code for an option: for all types but plain values and their lists."""
    return not is_plain(_hint(parser, name) or str)


def _hint(parser: ArgumentParser, name: str) -> Any:
    """Return the type of an option, None if it is not known."""
    action = next((action for action in parser._actions if action.dest == name), None)
    return getattr(action, "_typehint", None) or getattr(action, "type", None)


def is_plain(hint: Any) -> bool:
    """Return whether a type has only plain values: numbers, texts, and lists and mappings of these."""
    if hint in (bool, int, float, str, None, type(None)) or hint is Ellipsis:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if getattr(origin, "__name__", "") == "Literal":
        return True
    return bool(inner) and origin is not type and not _is_callable(origin) and all(map(is_plain, inner))


def _is_callable(origin: Any) -> bool:
    return getattr(origin, "__name__", "") == "Callable"
