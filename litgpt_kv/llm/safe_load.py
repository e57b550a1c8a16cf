"""Read YAML and JSON files from untrusted sources: plain data only, with limits on size, depth and expansion.

PyYAML's safe loader builds plain data, but a kilobyte of aliases can expand to a terabyte, and integers may have any
length. All option files, and all YAML and JSON files of a checkpoint, are read with this module.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from litgpt_kv.config import shown

MAX_BYTES = 1_000_000  # of a YAML file
MAX_JSON_BYTES = 32_000_000  # tokenizer_config.json lists thousands of tokens: Gemma 3's has 1.2 MB
MAX_VALUES = 100_000  # values of a YAML text with its aliases expanded
MAX_DEPTH = 40
MAX_DIGITS = 100  # of a number
CODE_KEYS = ("class_path", "init_args", "dict_kwargs", "__path__")  # with these, jsonargparse imports and calls classes


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits; dates stay text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values, self._depth = 0, 0
        self._sizes: dict[int, int] = {}  # id of a node: its number of values, with aliases expanded

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than the limit of {MAX_DEPTH} levels")
        before, alias = self._values, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias:
            if id(node) not in self._sizes:  # an alias inside its own anchor
                raise ValueError("it contains itself: an alias is inside its own anchor")
            self._values += self._sizes[id(node)]
        else:
            self._values += 1
            self._sizes[id(node)] = self._values - before
        if self._values > MAX_VALUES:
            raise ValueError(f"it has more than the limit of {MAX_VALUES:,} values")
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        number = node.tag.endswith((":int", ":float"))
        if number and len(node.value) > MAX_DIGITS:
            raise ValueError(f"it has a number of {len(node.value):,} digits, over the limit of {MAX_DIGITS}")
        return super().construct_object(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Parse a YAML text into plain data: None, bool, int, float, str, lists, and dicts with text as keys.

    Raises:
        ValueError: If it is not YAML, is over a limit, or has other values than plain data.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is larger than the limit of {MAX_BYTES:,} bytes")
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, TypeError, OverflowError, AttributeError, LookupError) as error:
        raise ValueError(one_line(error).replace(' in "<unicode string>",', " at")) from error
    check_data(data)
    return data


def check_data(data: Any) -> None:
    """Check that data are plain: no `!!binary`, `!!set` or `!!timestamp`, and only text as keys.

    Raises:
        ValueError: With the kind of the value that was found.
    """
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                raise ValueError(f"its keys must be text, got {shown(key)}")
            check_data(value)
    elif isinstance(data, list):
        for value in data:
            check_data(value)
    elif not (data is None or isinstance(data, (bool, int, float, str))):
        raise ValueError(f"it may have numbers, texts, lists and mappings, got a {type(data).__name__}")


def load_options(text: str) -> Any:
    """Parse a YAML text with `parse_yaml`, and check it with `check_options`.

    Raises:
        ValueError: If one of them raises it.
    """
    data = parse_yaml(text)
    check_options(data)
    return data


def check_options(data: Any) -> None:
    """Check that options are scalars, lists of scalars, or mappings of these, and that no key names code.

    jsonargparse imports and calls a `class_path` if the type of an option allows any value.

    Raises:
        ValueError: With the key or value that was found.
    """
    if isinstance(data, dict):
        for key, value in data.items():
            if found := next((name for name in CODE_KEYS if name in key.split(".")), None):
                raise ValueError(f"{found!r} names code to run; options are numbers, texts and lists of these only")
            check_options(value)
    elif isinstance(data, list):
        for value in data:
            if isinstance(value, (dict, list)):
                raise ValueError(f"a list of options may have only numbers and texts, got {shown(value)}")


def read_yaml(path: Path) -> Any:
    """Read a YAML file with `parse_yaml`.

    Raises:
        ValueError: If the file cannot be read or `parse_yaml` refuses it; the message names the file.
    """
    text = read_text(path, MAX_BYTES)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If the file cannot be read or is not JSON; the message names the file.
    """
    text = read_text(path, MAX_JSON_BYTES)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}.") from error


def read_text(path: Path, most: int) -> str:
    """Read a regular UTF-8 file of at most `most` bytes.

    Raises:
        ValueError: If it is not a regular file, is larger, or is not UTF-8; the message names the file.
    """
    try:
        if not path.is_file():  # a device or a pipe may never end
            raise ValueError(f"{path} is not a file." if path.exists() else f"There is no file {path}.")
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ValueError(f"{path} is larger than the limit of {most:,} bytes.")
        return data.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: it is not UTF-8 text.") from error


def one_line(error: BaseException, most: int = 200) -> str:
    """Return an error's message on one line, with at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."
