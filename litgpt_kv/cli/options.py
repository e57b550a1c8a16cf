"""Bring the command line and YAML files into the form that the parser takes.

`--kv-cache h2o --kv-cache.budget 256` and the YAML `kv_cache: h2o` or `kv_cache: {strategy: h2o, budget: 256}` all
become the fields of `KVCacheArgs`. Every other name belongs to the strategy, and goes to `options`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

import yaml

from litgpt_kv import config, registry
from litgpt_kv.cli.colour import paint
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.llm.safe_load import MAX_BYTES, load_options, read_text

PROG = "litgpt_kv"
FIELDS = [f.name for f in dataclasses.fields(KVCacheArgs)]
LISTED = ("--prompt", "--stop", "--against")  # each may be given several times; any value is text
NEED_VALUE = ("--import", "--config", "--kv_cache.help")
ALONE = ("--help", "--help_all", "--version", "--print_config")  # take no value
ALIASES = {"--for": "--strategy"}  # `for` cannot be the name of a parameter
PLAIN = ("--sys_prompt", "--out", "--checkpoint_dir")  # any value is text
LONGEST_ERROR = 1000  # characters
HINT = "YAML and JSON cannot import code: give --import {} on the command line, then use the strategy's name anywhere"


def fail(message: str) -> NoReturn:
    """Print the message on one line of standard error, and exit with code 2.

    A message may quote any file: control characters are escaped, and the middle of a long message is cut.
    """
    text = " ".join(message.split())
    if len(text) > LONGEST_ERROR:
        text = f"{text[: LONGEST_ERROR // 2]} ... {text[-LONGEST_ERROR // 2 :]}"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    print(f"{PROG}: {paint('error:', 'red', sys.stderr)} {text}", file=sys.stderr)
    raise SystemExit(2)


def normalise(
    args: list[str], flags: Collection[str] = (), lists: Collection[str] = ()
) -> tuple[list[str], str | None]:
    """Bring a command line into the parser's form.

    Dashes in option names become underscores, `--kv_cache X` becomes `--kv_cache.strategy X`, a strategy's own options
    `--kv_cache.X` become `--kv_cache.options.X`, several `--prompt`, `--stop` or `--against` become a list.
    `--import FILE` is executed at once.

    Args:
        args: What the user typed.
        flags: Options that mean "true" if they have no value.
        lists: Options whose value is a list: h2o,sink is written as [h2o,sink].

    Returns:
        The arguments, and the strategy of `--kv-cache.help`, or None.
    """
    out: list[str] = []
    texts: dict[str, list[str]] = {name: [] for name in LISTED}
    help_on: str | None = None
    rest = deque(args)
    while rest:
        token = rest.popleft()
        if token == "--":
            out += [token, *rest]
            break
        if not token.startswith("--"):
            out.append(token)
            continue
        option, equals, value = token.partition("=")
        name = "--" + option[2:].replace("-", "_")
        name = ALIASES.get(name, name)
        if name[2:] in flags and not equals:
            is_given = bool(rest) and rest[0] in ("true", "false")
            out.append(f"{name}={rest.popleft() if is_given else 'true'}")
            continue
        takes_any = name in LISTED or name in NEED_VALUE  # even one that looks like an option
        if not equals and rest and (takes_any or not (rest[0].startswith("--") or name in ALONE)):
            value = rest.popleft()
        elif not equals:
            if takes_any:
                fail(f"{option} needs a value.")
            out.append(name)
            continue
        if name in LISTED:
            if any("\ud800" <= c <= "\udfff" for c in value):
                fail(f"{option} is not valid text in this terminal's encoding.")
            texts[name].append(value)
        elif name == "--kv_cache.help":
            help_on = help_on or or_fail("", registry.import_named, value)
        elif name == "--import":
            or_fail("", registry.import_file, value)
        else:
            if name[2:] in lists and not value.lstrip().startswith("[") and value.strip() not in ("", "null"):
                value = f"[{value}]"
            out.append("=".join(_pair(option, name, value)))
    listed = [f"{name}={json.dumps(given, ensure_ascii=False)}" for name, given in texts.items() if given]
    end = out.index("--") if "--" in out else len(out)
    start = next((i + 1 for i, word in enumerate(out[:end]) if not word.startswith("--")), end)  # after the command
    own = sorted(out[start:end], key=lambda word: not word.startswith("--config="))  # so that the command line wins
    return [*out[:start], *own, *listed, *out[end:]], help_on


def _pair(option: str, name: str, value: str) -> tuple[str, str]:
    """Return an option and its value in the parser's form."""
    if name in ("--config", "--prompts"):
        value = shipped(value)
        if name == "--config":
            or_fail("", read_options, value)
        return name, value
    if name == "--kv_cache" and not value.lstrip().startswith("{"):
        return "--kv_cache.strategy", or_fail("", registry.import_named, value)
    if value.lstrip().startswith(("[", "{")) and name not in PLAIN:
        given = or_fail(f"{option}: ", load_options, value)
        if name == "--kv_cache":
            value = json.dumps(cache_fields(given))
    if name.startswith("--kv_cache."):
        field = name.partition(".")[2]
        if field.partition(".")[0] not in FIELDS:
            name = f"--kv_cache.options.{field}"
        elif field == "strategy":
            value = or_fail("", registry.import_named, value)
    return name, value


def or_fail(prefix: str, action: Callable[..., Any], *args: Any) -> Any:
    """Return `action(*args)`; if it raises ValueError, `fail` with the prefix and the message."""
    try:
        return action(*args)
    except ValueError as error:
        fail(f"{prefix}{error}")


def shipped(path: str) -> str:
    """Return a path; one that starts with `config_hub/` is found from any folder."""
    if path.startswith("config_hub/") and not Path(path).exists():
        package = Path(__file__).parents[1]  # a wheel has config_hub inside the package, a checkout next to it
        path = next((str(p) for p in (package / path, package.parent / path) if p.exists()), path)
    return path


def read_options(path: str) -> Any:
    """Read a file of options, with `kv_cache` in the parser's form.

    Raises:
        ValueError: If the file cannot be read or used; the message names it.
    """
    text = read_text(Path(path), MAX_BYTES)
    try:
        return parsed_options(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {' '.join(str(error).split())}") from error


def load_yaml(text: str) -> Any:
    """Read YAML for jsonargparse, as `parsed_options` does.

    Raises:
        yaml.YAMLError: If the text cannot be used. jsonargparse expects this error of a loader.
    """
    try:
        return parsed_options(text)
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error


def parsed_options(text: str) -> Any:
    """Parse options in YAML, with `kv_cache: h2o` and the strategy's own options in the parser's form.

    Raises:
        ValueError: If the text is not YAML, is too large, or has other values than numbers, texts, lists and mappings.
    """
    value = load_options(text)
    for level in (value, *(v for v in value.values() if isinstance(v, dict))) if isinstance(value, dict) else ():
        if isinstance(level.get("kv_cache"), (str, dict)):
            level["kv_cache"] = cache_fields(level["kv_cache"])
        if "import" in level:
            raise ValueError(HINT.format(level["import"]))
        if isinstance(level.get("strategies"), list):
            _refuse_files(level["strategies"])
    return value


def cache_fields(given: str | dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `KVCacheArgs` for the `kv_cache` of a YAML file.

    Raises:
        ValueError: If a strategy is a user's file: YAML cannot import code.
    """
    given = {"strategy": given} if isinstance(given, str) else given
    _refuse_files(given["strategy"] if isinstance(given.get("strategy"), list) else [given.get("strategy")])
    return config.cache_fields(given)


def _refuse_files(names: list[Any]) -> None:
    for name in names:
        if isinstance(name, str) and registry.is_file_name(name):
            raise ValueError(HINT.format(name.partition(":")[0]))
