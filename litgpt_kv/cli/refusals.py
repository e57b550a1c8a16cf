"""Say in plain words what is wrong with a command line or a file of options; jsonargparse's own words name types."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from litgpt_kv import registry
from litgpt_kv.config import shown
from litgpt_kv.registry import did_you_mean

if TYPE_CHECKING:
    from argparse import Action

Configs = Sequence[tuple[str, Any]]  # path and content of each file of options
PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a mapping"}
ONE_DEVICE = ("devices", "num_nodes", "generate_strategy")  # options that some commands do not have
MANY = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts", dict: "mappings"}


class Refused(SystemExit):
    """What a parser cannot use. `message` has its reason, in the parser's words."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


def explain(
    message: str, command: str | None, known: Mapping[str, Action], args: Sequence[str], configs: Configs
) -> str:
    """Return a parser's error in plain words.

    Args:
        message: The parser's.
        command: The name of the command; None if none was given.
        known: The command's options by name.
        args: The command line, in the parser's form.
        configs: The files of options.
    """
    text = " ".join(message.split())
    who = command or "The program"
    if found := re.search(r'[Kk]ey "([^"]+)" is required', text):
        missing = _missing(known, args, configs) or [found[1].removeprefix(f"{command}.")]
        return f"{who} needs {' and '.join(_spelled(name, known) for name in missing)}.{_see(command)}"
    if found := re.match(r"Unrecognized arguments: ?(.*)", text):
        return f"{_unknown(found[1].split(), who, known)}{_see(command)}"
    if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", text):
        hint = did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
        return f"There is no command {shown(found[1])}.{hint} litgpt_kv --help lists all."
    if found := re.search(r"does not accept nested key '([^']+)'", text):
        key = found[1]
        where = next((path for path, data in configs if _has(data, key)), None)
        hint = did_you_mean(key.rpartition(".")[2], [name.rpartition(".")[2] for name in known])
        if (own := _cache_option(key, known)) is not None:
            hint = f" Did you mean 'kv_cache: {{{own}: ...}}'?"
        return f"{where + ': ' if where else ''}{who} has no option {key!r}.{hint}{_see(command)}"
    if found := re.match(r"Unexpected config: ?(.*)", text):
        where = configs[-1][0] if configs else "The file of options"
        return f"{where} must have options by name, as in 'max_new_tokens: 9', got {shown(found[1])} (--config)."
    if found := re.search(r'[Kk]ey "([^"]+)".*?(?:Expected|Unable|Does not).*', text):
        name = found[1].removeprefix(f"{command}.")
        given = re.search(r"(?:Got|Given) value: (.*)$", text)
        return _wrong_value(name, given[1] if given else "", known, args, configs)
    return text.replace("Problems parsing config: ", "")[:900]


def _unknown(arguments: Sequence[str], who: str, known: Mapping[str, Action]) -> str:
    first = next((a for a in arguments if a.startswith("-")), arguments[0] if arguments else "")
    option = first.partition("=")[0]
    if not option.startswith("-"):
        return f"{who} does not take {shown(first)}: {_positionals(known)}."
    if option.lstrip("-").replace("-", "_") in ONE_DEVICE and "accelerator" in known:
        instead = ": start one server a device, see docs/serve.md" if who == "serve" else ""
        return f"{who} runs on one device and has no option {option.replace('_', '-')}{instead}."
    names = [name for name in known if name not in ("help", "print_config")]
    hint = did_you_mean(option.lstrip("-"), names, "--").replace("_", "-")
    if (own := _cache_option(option.lstrip("-").replace("-", "_"), known)) is not None:
        hint = f" Did you mean '--kv-cache.{own.replace('_', '-')}'?"
    return f"{who} has no option {option.replace('_', '-')}.{hint}"


def _cache_option(name: str, known: Mapping[str, Action]) -> str | None:
    """Return a name if it is an option of the cache or of a strategy, and the command has a cache; else None."""
    if "kv_cache.options" not in known:
        return None
    of_strategies = (option for one in registry.names("strategy") for option in registry.options("strategy", one))
    return name if f"kv_cache.{name}" in known or name in of_strategies else None


def _positionals(known: Mapping[str, Action]) -> str:
    names = [name for name, action in known.items() if not action.option_strings]
    taken = " and ".join(names)
    follow = "values follow an option" + (", as a text follows --prompt" if "prompt" in known else "")
    return f"beside {taken}, {follow}" if names else "it has options only"


def _missing(known: Mapping[str, Action], args: Sequence[str], configs: Configs) -> list[str]:
    """Return the options that must be given and are not; [] if it is a positional argument that is missing."""
    needed = [name for name, action in known.items() if action.option_strings and getattr(action, "_required", False)]
    given = {arg.partition("=")[0].removeprefix("--") for arg in args}
    return [name for name in needed if name not in given and not any(_has(data, name) for _, data in configs)]


def _spelled(name: str, known: Mapping[str, Action]) -> str:
    action = known.get(name)
    if action is not None and not action.option_strings:
        text = (action.help or "").split(". ")[0].rstrip(".")
        return name + (f" ({text})" if text else "")
    return f"--{name.replace('_', '-')}"


def _wrong_value(name: str, value: str, known: Mapping[str, Action], args: Sequence[str], configs: Configs) -> str:
    action = known.get(name)
    typed = next((arg.partition("=")[2] for arg in args if arg.partition("=")[0] == f"--{name}"), None)
    where, read = next(
        ((f"{path}: ", found[0]) for path, data in reversed(configs) if (found := _in(data, name))), ("", None)
    )
    if where and (typed is None or value.startswith(str(read))):  # the parser's own text may have its words behind it
        value = str(read)
    elif typed is not None:
        where, value = "", typed
    words = describe(getattr(action, "_typehint", None) or getattr(action, "type", None))
    expected = f": it must be {words}" if words else ""
    value = value if len(value) <= 200 else f"{value[:200]}..."
    return f"{where}--{name.replace('_', '-')} cannot be {value or 'empty'}{expected}; see --help."


def file_of(name: str, args: Sequence[str], configs: Configs) -> str:
    """Return "PATH: " of the file of options that gives a value, "" if the command line gives it."""
    if any(arg.partition("=")[0] == f"--{name}" for arg in args):
        return ""
    return next((f"{path}: " for path, data in reversed(configs) if _has(data, name)), "")


def _has(data: Any, name: str) -> bool:
    """Return whether a file of options has a key, in any mapping; `kv_cache.budget` is `budget` in `kv_cache`."""
    return bool(_in(data, name))


def _in(data: Any, name: str) -> list[Any]:
    """Return the values of a key in a file of options, in any mapping, as `_has` finds it."""
    first, _, rest = name.partition(".")
    if not isinstance(data, dict):
        return []
    if first in data:
        return _in(data[first], rest) if rest else [data[first]]
    return [found for value in data.values() for found in _in(value, name)]


def _see(command: str | None) -> str:
    return f" See litgpt_kv {command} --help." if command else " See litgpt_kv --help."


def describe(hint: Any) -> str:
    """Return the values of a type in words: `int | None` is "a whole number or null"; "" if that is not known."""
    parts = [part for part in _flat(hint) if part is not type(None)]
    words = [word for word in dict.fromkeys(map(_words, parts)) if word]
    words = [word for word in words if not (word == PLAIN[int] and PLAIN[float] in words)]
    words.sort(key=lambda word: word.startswith("a list"))  # `typing` keeps one order for unions that are equal
    if len(words) < len(set(map(str, parts))) and not words:
        return ""
    if type(None) in _flat(hint):
        words.append("null")
    text = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return text.replace(",,", ",").removesuffix(",")


def _flat(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [part for arg in get_args(hint) for part in _flat(arg)]
    return [hint]


def _words(hint: Any) -> str:
    origin = get_origin(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if getattr(origin, "__name__", "") == "Literal":
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin is dict:
        return "a mapping"
    if origin is not None and getattr(origin, "__name__", "") in ("list", "Sequence", "tuple"):
        kinds = _flat(get_args(hint)[0])
        inner = [MANY[kind] for kind in kinds if kind in MANY and not (kind is int and float in kinds)]
        return f"a list of {' or '.join(inner)}, [a, b]," if inner else "a list"
    return ""
