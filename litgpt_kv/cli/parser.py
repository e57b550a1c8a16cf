"""The command line's grammar: litgpt's argument names, dashes or underscores, strategies and YAML. Floor 6.

`--kv-cache h2o --kv-cache.budget 256` and the YAML `kv_cache: h2o` or `kv_cache: {strategy: h2o, budget: 256}` all
become one mapping, whose keys are `KVCacheArgs`' fields and the strategy's own options.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import CLI, ArgumentParser, DefaultHelpFormatter, set_loader, set_parsing_settings

from litgpt_kv import __version__, registry
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.parallel import end_worker

PROG = "litgpt_kv"
_FIELDS = [f.name for f in dataclasses.fields(KVCacheArgs) if f.name != "options"]


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
        fail(message)


def fail(message: str) -> NoReturn:
    """One clear line on standard error and exit code 2."""
    print(f"{PROG}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def normalise(args: list[str], flags: Collection[str] = ()) -> list[str]:
    """Dashes in option names to underscores, `--kv_cache X` to `.strategy X`, several `--prompt` or `--stop` to a list.

    Those of `flags` that stand without a value get "true".
    """
    out: list[str] = []
    texts: dict[str, list[str]] = {"--prompt": [], "--stop": []}
    rest = deque(args)
    while rest:
        token = rest.popleft()
        if token == "--":
            return [*out, token, *rest]
        if not token.startswith("--"):
            out.append(token)
            continue
        name, equals, value = token.partition("=")
        name = "--" + name[2:].replace("-", "_")
        if name in ("--kv_cache.help", *texts) and not equals:
            if not rest:
                fail(f"{token} needs a value.")
            value = rest.popleft()
        if name == "--kv_cache.help":
            show_strategy(value)
        elif name in texts:
            if any("\ud800" <= c <= "\udfff" for c in value):
                fail(f"{token} is no valid text in this terminal's encoding.")
            texts[name].append(value)
        elif name[2:] in flags and not equals and (not rest or rest[0] not in ("true", "false")):
            out.append(name + "=true")
        elif name in ("--config", "--prompts"):
            out.append(f"{name}={shipped(value if equals else rest.popleft() if rest else '')}")
        elif name == "--kv_cache" and not (value or (rest[0] if rest and not equals else "")).startswith("{"):
            out.append("--kv_cache.strategy" + equals + value)
        else:
            out.append(name + equals + value)
    return [*out, *(f"{name}={json.dumps(given, ensure_ascii=False)}" for name, given in texts.items() if given)]


def shipped(path: str) -> str:
    """A file's path; what starts with `config_hub/` is found beside the package from anywhere."""
    if path.startswith("config_hub/") and not Path(path).exists():
        package = Path(__file__).parents[1]  # a wheel has config_hub inside of the package, a checkout beside it
        path = next((str(p) for p in (package / path, package.parent / path) if p.exists()), path)
    return path


def load_yaml(text: str) -> Any:
    """YAML as jsonargparse reads it, with `kv_cache: h2o` brought to the form that command-line options can add to."""
    value = yaml.safe_load(text)
    for level in (value, *(v for v in value.values() if isinstance(v, dict))) if isinstance(value, dict) else ():
        if isinstance(level.get("kv_cache"), str):
            level["kv_cache"] = {"strategy": level["kv_cache"]}
    return value


def cache_args(value: str | dict[str, Any]) -> KVCacheArgs | None:
    """`KVCacheArgs` from what the parser gathered; None for "none", which computes the whole text at every step.

    Raises:
        ValueError: For an unknown strategy or option, or a value of the wrong type.
    """
    given = {"strategy": value} if isinstance(value, str) else dict(value)
    given = {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in given.items()}
    options = {**given.pop("options", {}), **{k: given.pop(k) for k in list(given) if k not in _FIELDS}}
    strategy = given.get("strategy") or "dense"
    if strategy == "none":
        if options or len(given) > 1:
            raise ValueError("kv_cache 'none' takes no options.")
        return None
    names = strategy if isinstance(strategy, list) else [strategy]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"kv_cache needs a strategy's name, got {strategy!r}.")
    takes = {name: registry.options("strategy", name) for name in names}
    if unknown := [k for k in options if not any(k in own for own in takes.values())]:
        every = f"Every strategy takes {', '.join(_FIELDS[1:])}"
        own = "; ".join(f"{name!r} {'also ' + ', '.join(t) if t else 'has no options'}" for name, t in takes.items())
        raise ValueError(f"Unknown kv_cache option {', '.join(map(repr, unknown))}. {every}; {own}.")
    for name, own in takes.items():
        options |= _typed(name, {k: v for k, v in options.items() if k in own})
    return KVCacheArgs(**{**given, "strategy": strategy}, options=options)


def _typed(strategy: str, options: dict[str, Any]) -> dict[str, Any]:
    """A strategy's own options with the types of its fields."""
    if not options:
        return {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(registry.get("strategy", strategy))
    try:
        return {k: v for k, v in parser.parse_object(options).as_dict().items() if k in options}
    except Exception as error:  # argparse's and jsonargparse's error types differ between versions
        raise ValueError(f"kv_cache {strategy!r}: {' '.join(str(error).split())}") from error


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


def run(commands: dict[str, Callable[..., Any]], description: str, args: list[str] | None = None) -> Any:
    """Parses the command line and calls the command; what the user did wrong ends in one line and exit code 2."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parameters = [
        p for command in commands.values() for p in inspect.signature(command, eval_str=True).parameters.values()
    ]
    flags = {p.name for p in parameters if p.annotation is bool}
    args = sys.argv[1:] if args is None else args
    if args == ["--version"]:
        print(f"{PROG} {__version__}")
        raise SystemExit(0)
    args = normalise(args, flags) or ["--help"]
    set_loader("litgpt_kv", load_yaml, exceptions=(yaml.YAMLError,))
    options = dict(prog=PROG, description=description, parser_class=Parser, parser_mode="litgpt_kv")
    try:
        try:
            return CLI(commands, args=args, **options)
        except BaseException as error:
            end_worker(error)  # in a run of several processes the launcher prints the error, once
            raise
    except BrokenPipeError:  # the reader went away, as `| head` does
        sys.stderr.close()
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print(file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        fail(str(error))
