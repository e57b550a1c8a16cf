"""The help of the program and of a command: the most used options first, in groups; examples at the end.

`--help` shows the first sentence of the options in `COMMON` and of the command's own; it names the others.
`--help-all` shows the whole text of all options.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import textwrap
from argparse import Action
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from litgpt_kv.cli.colour import paint
from litgpt_kv.cli.commands import Entry
from litgpt_kv.cli.examples import EXAMPLES
from litgpt_kv.cli.groups import Group

PROG = "litgpt_kv"
COMMON = {  # the options of classes that the short help shows
    *("max_new_tokens", "stop", "temperature", "top_k", "top_p", "seed"),
    *("kv_cache.strategy", "kv_cache.budget", "kv_cache.storage"),
    *("batch_size", "prefill", "precision", "accelerator", "devices", "quantize", "compile"),
    *("host", "port", "rows", "max_tokens", "api_key"),
}
TITLES = {  # in this order
    "KVCacheArgs": "What the cache keeps",
    "ServeArgs": "How the server answers",
    "StoppingArgs": "When a text ends",
    "SamplingArgs": "How tokens are chosen",
    "RunArgs": "How prompts are read",
    "DeviceArgs": "Where it runs",
    "Shape": "The shape of a random model",
}
SHOWN = {"generate": 4, "chat": 1, "serve": 1, "strategies": 2, "plan": 1, "evaluate": 1, "download": 1}  # examples
COLUMN = 28  # where the text of an option begins
WIDEST = 100  # characters of a line; fewer on a narrower terminal
METAVARS = {int: "N", float: "X", str: "TEXT", dict: "MAPPING"}
NAMES = {  # options whose text is not free
    **{"strategy": "NAME", "storage": "NAME", "attention": "NAME", "precision": "NAME", "accelerator": "NAME"},
    **{"quantize": "NAME", "generate_strategy": "NAME", "prefill": "NAME", "select": "NAME", "positions": "NAME"},
    **{"budget_pattern": "NAME", "prompts": "FILE", "out": "FILE", "text": "FILE", "config": "FILE"},
    **{"budget": "N|%", "devices": "N"},
}


def overview(entries: Mapping[str, Entry], description: str, table: str) -> str:
    """Return the help of the program: its commands and examples."""
    examples = [example for name in entries for example in EXAMPLES.get(name, ())[: SHOWN.get(name, 0)]]
    lines = [f"usage: {PROG} COMMAND [arguments] [--options]", "", description, "", _bold_heads(table), ""]
    lines += [_head("Options"), *_rows([("--help", "This list; after a command, its options."), *PROGRAM_OPTIONS])]
    return "\n".join([*lines, "", *_examples(examples)])


PROGRAM_OPTIONS = [
    ("COMMAND --help-all", "All options of a command with their whole text."),
    ("COMMAND --config FILE", "Options from a YAML file; COMMAND --print-config writes one."),
    ("COMMAND --import FILE", "Run a Python file first, which registers your own strategy."),
    ("--version", "The version."),
    ("--print-completion SHELL", "A script that completes commands and options in bash, zsh, fish or tcsh."),
]


def command_help(
    name: str, command: Callable[..., Any], actions: Sequence[Action], groups: Sequence[Group], full: bool
) -> str:
    """Return the help of a command.

    Args:
        name: Its name.
        command: Its function, whose docstring describes it.
        actions: The options of its parser.
        groups: Its classes of arguments.
        full: Whether to show all options with their whole text.
    """
    by_name = {action.dest: action for action in actions}
    grouped = {group.prefix + field for group in groups for field in group.names}
    parameters = [name for name in inspect.signature(command).parameters if name not in {g.parameter for g in groups}]
    own = [by_name[name] for name in parameters if name in by_name]
    positional = [action for action in own if not action.option_strings]
    usage = " ".join([f"usage: {PROG} {name}", *(action.dest for action in positional), "[--options]"])
    lines = [usage, "", *_paragraphs(description_of(command))]
    sections = [("Options", own, True)]
    order = list(TITLES)
    for group in sorted(groups, key=lambda g: order.index(g.cls.__name__) if g.cls.__name__ in order else len(order)):
        found = [by_name[group.prefix + field] for field in group.names if group.prefix + field in by_name]
        sections.append((TITLES.get(group.cls.__name__, (group.cls.__doc__ or "").partition("\n")[0]), found, False))
    for title, members, is_own in sections:
        shown = [a for a in members if full or is_own or a.dest in COMMON]
        rest = [a for a in members if a not in shown]
        if not members:
            continue
        lines += ["", _head(title), *_rows([(_option(a), _says(a, full)) for a in shown])]
        lines += _rows([("also" if shown else "options", ", ".join(spelled(a) for a in rest))]) if rest else []
    lines += ["", _head("Help and files"), *_rows(_common_options(name, any("." in dest for dest in grouped), full))]
    if examples := EXAMPLES.get(name):
        lines += ["", *_examples(examples)]
    return "\n".join(lines)


def description_of(command: Callable[..., Any]) -> str:
    """Return the docstring of a command without its arguments and what follows them."""
    return re.split(r"\n\s*(?:Args|Arguments|Raises|Returns):", inspect.getdoc(command) or "")[0].strip()


def _common_options(name: str, has_cache: bool, full: bool) -> list[tuple[str, str]]:
    rows = [("--config FILE", "Options from a YAML file; the command line wins over it.")]
    rows += [("--print-config", "Print all options as such a file, and end.")]
    rows += [("--kv-cache.help NAME", "All about one strategy, and its own options.")] if has_cache else []
    return rows if full else [*rows, ("--help-all", "All options with their whole text.")]


def _option(action: Action) -> str:
    """Return an option and what it takes, as `--budget N`."""
    if not action.option_strings:
        return action.dest
    metavar = _metavar(action)
    return f"{spelled(action)} {metavar}".strip()


def spelled(action: Action) -> str:
    """Return the name of an option as users write it, such as --kv-cache.budget; --kv-cache is the strategy."""
    name = max((name for name in action.option_strings if not name.endswith("+")), key=len).replace("_", "-")
    return "--kv-cache" if name == "--kv-cache.strategy" else name


def _metavar(action: Action) -> str:
    hint = getattr(action, "_typehint", None) or getattr(action, "type", None)
    if hint is bool or getattr(action, "const", None) is True:
        return ""
    name = action.dest.rpartition(".")[2]
    if name in NAMES:
        return NAMES[name]
    parts = [part for part in get_args(hint) if part is not type(None)] or [hint]
    if parts == [bool]:
        return ""
    for part in parts:
        if (get_origin(part) or part) in METAVARS:
            return METAVARS[get_origin(part) or part]
    inner = next((a for part in parts for a in get_args(part) if a in METAVARS), str)
    return f"[{METAVARS[inner]}, ...]" if any(get_origin(part) is list for part in parts) else METAVARS[inner]


def _says(action: Action, full: bool) -> str:
    """Return the text of an option with its default; unless `full`, only the first sentence."""
    text = (action.help or "").replace("%%", "%").strip()
    if not full:
        text = re.split(r"(?<=\.)\s", text)[0]
    default = action.default
    if not action.option_strings or "default" in text or default in (None, "==SUPPRESS==", "", False) or default == {}:
        return text
    shown = default if isinstance(default, str) else repr(default)
    return f"{text} (default: {shown})"


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return lines with options on the left and their wrapped text on the right."""
    lines: list[str] = []
    for option, text in rows:
        wrapped = textwrap.wrap(text, _width() - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
        if len(option) + 3 > COLUMN:
            lines.append(f"  {option}")
            option = ""
        lines.append(f"  {option:<{COLUMN - 2}}{wrapped[0]}".rstrip())
        lines += [" " * COLUMN + line for line in wrapped[1:]]
    return lines


def _paragraphs(text: str) -> list[str]:
    paragraphs = [textwrap.wrap(" ".join(part.split()), _width()) for part in text.split("\n\n")]
    return [line for number, part in enumerate(paragraphs) for line in ([""] if number else []) + part]


def _examples(examples: Iterable[tuple[str, str]]) -> list[str]:
    lines = [_head("Examples")]
    for command, says in examples:
        lines += [f"  {paint('# ' + says, 'dim', sys.stdout)}", f"  {PROG} {command}"]
    return lines


def _head(title: str) -> str:
    return paint(f"{title}:", "bold", sys.stdout)


def _bold_heads(table: str) -> str:
    return "\n".join(line if line.startswith(" ") else paint(line, "bold", sys.stdout) for line in table.split("\n"))


def _width() -> int:
    return max(60, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))
