"""The command line's grammar: a command is a function, and its signature is its options.

A parameter whose type is a dataclass of arguments stands for all of its fields: as flat options (`--temperature`) for
the classes in `FLAT`, with the parameter's name before them (`--kv-cache.budget`) for others. A new field of such a
class is a new option, YAML key and line of help in every command that takes the class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, get_args, get_origin

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
    set_loader,
    set_parsing_settings,
)

from litgpt_kv import __version__, registry
from litgpt_kv.arguments import DeviceArgs, RunArgs, StoppingArgs, Without
from litgpt_kv.cli.options import PROG, fail, load_yaml, normalise
from litgpt_kv.config import KVCacheArgs, SamplingArgs, shown
from litgpt_kv.llm.safe_load import one_line
from litgpt_kv.parallel import end_worker
from litgpt_kv.serve.settings import ServeArgs

FLAT = (SamplingArgs, StoppingArgs, RunArgs, DeviceArgs, ServeArgs)


@dataclass(frozen=True)
class Group:
    """A parameter of a command that stands for the fields of a class of arguments."""

    parameter: str
    cls: type
    default: Any
    without: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        return "" if self.cls in FLAT else f"{self.parameter}."

    @property
    def names(self) -> list[str]:
        return [f.name for f in dataclasses.fields(self.cls) if f.name not in self.without]

    def build(self, given: Mapping[str, Any]) -> Any:
        """The arguments that the parser found; `options` of a strategy get the types of its fields."""
        whole = given.get(self.parameter)
        if self.prefix and whole is not None:
            raise ValueError(f"{self.parameter} must be options by name, got {shown(whole)}.")
        values = {name: given[self.prefix + name] for name in self.names if self.prefix + name in given}
        if self.cls is KVCacheArgs and values:
            values["options"] = typed_options(values["strategy"], values["options"])
        return dataclasses.replace(self.default, **values)


def groups_of(command: Callable[..., Any]) -> list[Group]:
    """The parameters of a command that are classes of arguments."""
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


class _Help(DefaultHelpFormatter):
    """Keeps the line breaks of descriptions, which show examples, and writes options with dashes."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _format_action(self, action: Any) -> str:
        return re.sub(r"--[a-z_.]+", lambda option: option[0].replace("_", "-"), super()._format_action(action))

    def _format_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None) -> str:
        text = super()._format_usage(usage, actions, groups, prefix)
        return re.sub(r"--[a-z_.]+", lambda option: option[0].replace("_", "-"), text)


class Parser(ArgumentParser):
    """jsonargparse's parser with options in dashes in its help, and errors on one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "formatter_class": _Help})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split())
        if found := re.search(r'[Kk]ey "([^"]+)".*Expected .*G(?:iven|ot) value: (.*)$', message):
            name, value = found.groups()
            message = f"--{name.replace('_', '-')} cannot be {value[:200]}; --help says what it takes."
        fail(message[:900])


def add_command(parser: ArgumentParser, command: Callable[..., Any]) -> None:
    """Give a parser the options of a command."""
    groups = groups_of(command)
    parser.add_argument("--config", action=ActionConfigFile, help="Options from a YAML file.")
    skip = {group.parameter for group in groups}
    parser.add_function_arguments(command, as_group=False, as_positional=True, fail_untyped=True, skip=skip)
    for group in groups:
        nested = group.prefix.removesuffix(".") or None
        parser.add_class_arguments(group.cls, nested, skip=set(group.without), instantiate=False)
        parser.set_defaults({group.prefix + name: getattr(group.default, name) for name in group.names})


def call(command: Callable[..., Any], found: Namespace) -> Any:
    """Call a command with what its parser found."""
    given = {name: value for name, value in found.items() if name != "config"}  # nested names with dots
    groups = groups_of(command)
    arguments = {group.parameter: group.build(given) for group in groups}
    for name in inspect.signature(command).parameters:
        if name not in arguments:
            arguments[name] = found[name]
    return command(**arguments)


def typed_options(strategy: str | list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The own options of strategies, with the types of their fields.

    Raises:
        ValueError: For an unknown strategy or option, or a value of the wrong type.
    """
    names = strategy if isinstance(strategy, (list, tuple)) else [strategy]
    if strategy == "none" or not options:
        return dict(options)
    takes = {name: registry.options("strategy", name) for name in names}
    if unknown := [key for key in options if not any(key in own for own in takes.values())]:
        fields = [f.name for f in dataclasses.fields(KVCacheArgs) if f.name not in ("strategy", "options")]
        own = "; ".join(f"{name!r} {'also ' + ', '.join(t) if t else 'has no options'}" for name, t in takes.items())
        every = f"Every strategy takes {', '.join(fields)}; {own}."
        raise ValueError(f"Unknown kv_cache option {', '.join(map(shown, unknown))}. {every}")
    out = dict(options)
    for name, own in takes.items():
        out |= _typed(name, {key: value for key, value in options.items() if key in own})
    return out


def _typed(strategy: str, options: dict[str, Any]) -> dict[str, Any]:
    if not options:
        return {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(registry.get("strategy", strategy))
    if opened := [name for name in options if is_open(parser, name)]:
        raise ValueError(f"kv_cache {strategy!r}: {opened[0]} is no number or text; it can be given in Python only.")
    try:
        return {k: v for k, v in parser.parse_object(options).as_dict().items() if k in options}
    except Exception as error:  # argparse's and jsonargparse's error types differ between versions
        raise ValueError(f"kv_cache {strategy!r}: {one_line(error)}") from error


def is_open(parser: ArgumentParser, name: str) -> bool:
    """Whether an option's type may make jsonargparse import code: anything but plain values and lists of them."""
    action = next((action for action in parser._actions if action.dest == name), None)
    return not is_plain(getattr(action, "_typehint", None) or getattr(action, "type", None) or str)


def is_plain(hint: Any) -> bool:
    """Whether a type has only plain values: numbers, texts, and lists and mappings of these."""
    if hint in (bool, int, float, str, None, type(None)) or hint is Ellipsis:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if getattr(origin, "__name__", "") == "Literal":
        return True
    return bool(inner) and origin is not type and not _is_callable(origin) and all(map(is_plain, inner))


def _is_callable(origin: Any) -> bool:
    return getattr(origin, "__name__", "") == "Callable"


def describe(name: str) -> str:
    """A strategy on a few lines: what it keeps, its parameters with defaults, its paper."""
    cls = registry.get("strategy", name)
    line = (inspect.getdoc(cls) or "").partition("\n")[0]
    fields = [f"{f.name}={f.default!r}" for f in dataclasses.fields(cls)]
    protects = []
    with contextlib.suppress(TypeError):  # options without defaults: what it protects may hang on them
        for what, at_100, at_200 in zip(("sinks", "recent"), cls().protected(100), cls().protected(200)):
            protects += [f"{what}={at_100}%" if at_200 == 2 * at_100 else f"{what}={at_100}"] if at_100 else []
    parameters = ", ".join([*protects, f"positions={cls.positions}", *fields])
    return "\n".join([f"{name}: {line}", f"    {parameters}", *([f"    {cls.paper}"] if cls.paper else [])])


def show_strategy(name: str) -> NoReturn:
    """`--kv-cache.help h2o`."""
    try:
        cls = registry.get("strategy", name)
    except ValueError as error:
        fail(str(error))
    print(describe(name))
    print("\n" + (inspect.getdoc(cls) or "").partition("\n")[2].strip())
    print("\nWhat every strategy takes, as --kv-cache.budget and so on:\n")
    print((inspect.getdoc(KVCacheArgs) or "").partition("Args:\n")[2])
    raise SystemExit(0)


def flags_of(commands: Mapping[str, Callable[..., Any]]) -> set[str]:
    """The options of all commands that may stand without a value: those that are true or false."""
    found = set()
    for command in commands.values():
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            found |= {parameter.name} if parameter.annotation is bool else set()
        for group in groups_of(command):
            found |= {group.prefix + f.name for f in dataclasses.fields(group.cls) if f.type in ("bool", bool)}
    return found


def build_parser(
    commands: Mapping[str, Callable[..., Any]], description: str, only: str | None = None
) -> ArgumentParser:
    """The parser of the whole program, a subcommand for each command; with `only`, the others have no options yet."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("litgpt_kv", load_yaml, exceptions=(yaml.YAMLError,))
    parser = Parser(prog=PROG, description=description, parser_mode="litgpt_kv", default_meta=False)
    parser.add_argument("--config", action=ActionConfigFile, help="Options of a command from a YAML file.")
    subcommands = parser.add_subcommands(required=True)
    for name, command in commands.items():
        help_text = (inspect.getdoc(command) or "").partition("\n\n")[0]
        subparser = Parser(description=help_text, parser_mode="litgpt_kv", default_meta=False)
        if only in (None, name):  # types and docstrings take a tenth of a second to read for all of them
            add_command(subparser, command)
        subcommands.add_subcommand(name, subparser, help=help_text)
    return parser


def run(commands: dict[str, Callable[..., Any]], description: str, args: list[str] | None = None) -> Any:
    """Parse the command line and call the command; what the user did wrong ends in one line and exit code 2."""
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"{PROG} {__version__}")
        raise SystemExit(0)
    with _ends_well():
        args, shown_strategy = normalise(args, flags_of(commands))
        if shown_strategy is not None:
            show_strategy(shown_strategy)
        args = args or ["--help"]
        only = args[0] if args[0] in commands else None
        try:
            found = build_parser(commands, description, only).parse_args(args)
        except OverflowError as error:  # jsonargparse makes a float of an integer that is too large for one
            raise ValueError(f"A number of the command line or the config file is too large: {error}.") from error
        return call(commands[found.subcommand], found[found.subcommand])


@contextlib.contextmanager
def _ends_well() -> Iterator[None]:
    try:
        try:
            yield
        except BaseException as error:
            end_worker(error)  # in a run of several processes the launcher prints the error, once
            raise
    except BrokenPipeError:  # the reader went away, as `| head` does
        sys.stderr.close()
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print(file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except MemoryError:
        fail("There is not enough memory for this.")
    except (ValueError, OSError) as error:
        fail(str(error))
