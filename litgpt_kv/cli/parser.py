"""Parse the command line: a command is a function, and the parameters of the function are its options.

If the type of a parameter is a dataclass of arguments, every field of the class is an option: without a prefix
(`--temperature`) for the classes in `groups.FLAT`, with the parameter's name as prefix (`--kv-cache.budget`) for
others. A new field of such a class is a new option, YAML key and line of help in every command that takes the class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_loader, set_parsing_settings

from litgpt_kv import __version__, registry
from litgpt_kv.cli.commands import Entry, table
from litgpt_kv.cli.groups import groups_of
from litgpt_kv.cli.help import command_help, description_of, overview
from litgpt_kv.cli.options import PROG, fail, load_yaml, normalise, or_fail, read_options
from litgpt_kv.cli.other_commands import loader_without, others_defaults
from litgpt_kv.cli.refusals import Refused, explain, file_of
from litgpt_kv.config import shown

LOADER_ERRORS = (yaml.YAMLError,)


class Parser(ArgumentParser):
    """jsonargparse's parser; an error raises `Refused`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise Refused(message)


def add_command(parser: ArgumentParser, command: Callable[..., Any]) -> None:
    """Add the options of a command to a parser."""
    groups = groups_of(command)
    parser.add_argument("--config", action=ActionConfigFile, help="Options from a YAML file.")
    skip = {group.parameter for group in groups}
    parser.add_function_arguments(command, as_group=False, as_positional=True, fail_untyped=True, skip=skip)
    for group in groups:
        nested = group.prefix.removesuffix(".") or None
        parser.add_class_arguments(group.cls, nested, skip=set(group.without), instantiate=False)
        parser.set_defaults({group.prefix + name: getattr(group.default, name) for name in group.names})


def arguments_of(command: Callable[..., Any], found: Namespace) -> dict[str, Any]:
    """Return the arguments of a command by name, from the values that its parser found."""
    given = {name: value for name, value in found.items() if name != "config"}  # nested names with dots
    groups = groups_of(command)
    arguments = {group.parameter: group.build(given) for group in groups}
    for name in inspect.signature(command).parameters:
        if name not in arguments:
            arguments[name] = found[name]
    return arguments


def flags_of(commands: Mapping[str, Callable[..., Any]]) -> set[str]:
    """Return the options of all commands that need no value: those that are true or false."""
    found = set()
    for command in commands.values():
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            found |= {parameter.name} if parameter.annotation is bool else set()
        for group in groups_of(command):
            found |= {group.prefix + f.name for f in dataclasses.fields(group.cls) if f.type in ("bool", bool)}
    return found


def lists_of(commands: Mapping[str, Callable[..., Any]]) -> set[str]:
    """Return the options of all commands whose value is always a list."""
    found = set()
    for command in commands.values():
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kinds = set(get_args(parameter.annotation) or [parameter.annotation]) - {type(None)}
            found |= {parameter.name} if kinds and all(get_origin(kind) is list for kind in kinds) else set()
    return found


def build_parser(
    commands: Mapping[str, Callable[..., Any]], description: str, only: str | None = None
) -> ArgumentParser:
    """Build the parser of the program, with a subcommand for each command.

    With `only`, just that command gets its options: reading types and docstrings of all takes a tenth of a second.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("litgpt_kv", load_yaml, LOADER_ERRORS)
    parser = Parser(prog=PROG, description=description, parser_mode="litgpt_kv", default_meta=False)
    parser.add_argument("--config", action=ActionConfigFile, help="Options of a command from a YAML file.")
    subcommands = parser.add_subcommands(required=True)
    for name in commands:
        subparser = Parser(parser_mode="litgpt_kv", default_meta=False)
        if only in (None, name):
            add_command(subparser, commands[name])
        subcommands.add_subcommand(name, subparser)
    return parser


def parse(
    commands: Mapping[str, Callable[..., Any]], description: str, args: list[str] | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the command that the command line names, and its arguments. Call this inside `one_line_errors`."""
    args = sys.argv[1:] if args is None else args
    args = [*args[1:], "--help"] if args[:1] == ["help"] and "help" not in commands else args
    if not args or args[0] in ("--help", "-h", "--version", "--print-completion", "--print_completion"):
        _print(_about_the_program(commands, description, args))
    if (args[0] == "-" or not args[0].startswith("-")) and args[0] not in commands:
        hint = registry.did_you_mean(args[0], commands)
        fail(f"There is no command {shown(args[0])}.{hint} {PROG} --help lists all.")
    only = _command_of(args, commands)
    asked_for = {only: commands[only]} if only else commands
    args, help_on = normalise(args, flags_of(asked_for), lists_of(asked_for))
    if only == "strategies" and len(args) == 2 and not args[1].startswith("-"):
        help_on = or_fail("", registry.import_named, args[1])
    if help_on is not None:
        from litgpt_kv.cli.strategies import show_strategy  # needs torch

        show_strategy(help_on)
    parser = build_parser(commands, description, only)
    if only is not None and any(arg.startswith("--config=") for arg in args):
        known = {action.dest.partition(".")[0] for action in options_of(parser, only)}
        set_loader("litgpt_kv", loader_without(others_defaults(only, known, commands, _configs(args))), LOADER_ERRORS)
    if asked := [arg for arg in args if arg in ("--help", "-h", "--help_all")]:
        if only is None:
            _print(_about_the_program(commands, description, []))
        is_full = "--help_all" in asked or args[args.index(asked[0]) + 1 :][:1] == ["all"]
        _print(command_help(only, commands[only], options_of(parser, only), groups_of(commands[only]), is_full))
    try:
        found = parser.parse_args(args)
    except Refused as error:
        known = {} if only is None else {action.dest: action for action in options_of(parser, only)}
        fail(explain(error.message, only, known, args, _configs(args)))
    except OverflowError as error:  # jsonargparse makes a float of an integer that is too large for one
        raise ValueError(f"A number of the command line or the config file is too large: {error}.") from error
    command = commands[found.subcommand]
    try:
        return command, arguments_of(command, found[found.subcommand])
    except ValueError as error:  # name the file that has the value, if it is not on the command line
        name = str(error).partition(" ")[0]
        where = file_of(name, args, _configs(args)) or file_of(f"kv_cache.{name}", args, _configs(args))
        raise ValueError(f"{where}{error}") from error


def _command_of(args: list[str], commands: Mapping[str, Any]) -> str | None:
    """Return the command of a command line, which may have `--config FILE` before it; None if there is none."""
    rest = list(args)
    while rest and rest[0].partition("=")[0] == "--config":
        rest = rest[1 if "=" in rest[0] else 2 :]
    return rest[0] if rest and rest[0] in commands else None


def _configs(args: list[str]) -> list[tuple[str, Any]]:
    """Return path and content of each file of options."""
    paths = [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    return [(path, read_options(path)) for path in paths]


def options_of(parser: ArgumentParser, command: str) -> list[Any]:
    """Return the options of a command from the parser of the program."""
    return parser._subcommands_action._name_parser_map[command]._actions


def _about_the_program(commands: Mapping[str, Callable[..., Any]], description: str, args: list[str]) -> str:
    """Return what an option of the program itself prints: help, version, or a completion script."""
    if args[:1] == ["--version"]:
        return f"{PROG} {__version__}"
    if args and args[0].startswith("--print"):
        from litgpt_kv.cli.completion import completion

        options = {name: options_of(build_parser(commands, "", name), name) for name in commands}
        summaries = {name: entry.summary for name, entry in getattr(commands, "entries", {}).items()}
        return completion(options, summaries, args[1] if len(args) > 1 else "")
    entries = getattr(commands, "entries", None)
    if entries is None:
        entries = {name: Entry("", description_of(command).partition("\n")[0]) for name, command in commands.items()}
    return overview(entries, description, table(entries))


def _print(text: str) -> NoReturn:
    print(text)
    raise SystemExit(0)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Run a program: ValueError, OSError and MemoryError end it with one line on standard error and exit code 2."""
    try:
        try:
            yield
        except BaseException as error:
            if (parallel := sys.modules.get("litgpt_kv.parallel")) is not None:
                parallel.end_worker(error)  # with several processes, the launcher prints the error once
            raise
    except BrokenPipeError:  # nobody reads standard output any more, as after `| head`
        sys.stderr.close()
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print(file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except MemoryError:
        fail("There is not enough memory for this.")
    except (ValueError, OSError) as error:
        fail(_plain(error))


def _plain(error: ValueError | OSError) -> str:
    """Return an error's message; that of a file as "PATH: reason"."""
    name, why = getattr(error, "filename", None), getattr(error, "strerror", None)
    return f"{name}: {why}." if name and why else str(error)
