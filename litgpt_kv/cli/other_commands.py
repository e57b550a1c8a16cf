"""Let a command use a file of options that another command has written: what only that one has is left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from litgpt_kv.cli.groups import groups_of
from litgpt_kv.cli.options import FIELDS, load_yaml
from litgpt_kv.cli.refusals import Configs
from litgpt_kv.config import shown


def others_defaults(
    command: str, known: Collection[str], commands: Mapping[str, Callable[..., Any]], configs: Configs
) -> dict[str, Any]:
    """Return the keys in files of options that only other commands have, with their defaults there.

    `generate --print-config` writes all of its options; `chat` leaves out those that it does not have.

    Args:
        command: The command.
        known: The names of its options.
        commands: All commands.
        configs: Path and content of each file.

    Raises:
        ValueError: If such a key has another value than null and the default of the command that has it.
    """
    found: dict[str, Any] = {}
    for path, data in configs:
        own = [*known, *commands, *(FIELDS if "kv_cache" in known else ())]
        foreign = [key for key in data if key not in own] if isinstance(data, dict) else []
        for name in (name for name in commands if name != command and _is_ours(name, commands)):
            if not foreign:
                break  # a command is imported only if it is needed
            try:
                defaults = _defaults(commands[name])
            except ImportError:  # an extra that is not installed
                continue
            for key in [key for key in foreign if key in defaults]:
                if data[key] is not None and data[key] != defaults[key]:
                    has = f"{command} has no option {key!r}, which {name} has"
                    raise ValueError(f"{path}: {has}: take it out, its value is {shown(data[key])}.")
                found[key] = defaults[key]
                foreign.remove(key)
    return found


def _defaults(command: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a command's options that have no prefix, by name."""
    groups = groups_of(command)
    found = {name: getattr(group.default, name) for group in groups if not group.prefix for name in group.names}
    members = {group.parameter for group in groups}
    parameters = inspect.signature(command).parameters.items()
    return found | {name: p.default for name, p in parameters if name not in members and p.default is not p.empty}


def _is_ours(name: str, commands: Mapping[str, Any]) -> bool:
    """Return whether a command is not litgpt's own, which has other names for its options."""
    entries = getattr(commands, "entries", {})
    return name not in entries or entries[name].function.startswith("litgpt_kv.")


def loader_without(without: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a loader of YAML that leaves out some keys where they are null or have these values."""

    def load(text: str) -> Any:
        value = load_yaml(text)
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if not (k in without and v in (None, without[k]))}

    return load
