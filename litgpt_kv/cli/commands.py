"""The commands of the program: where their functions are, and what the list of commands says of them.

A command's module is imported when the command is used: the list of commands needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from litgpt_kv.cli.interrupts import QuietInterrupts


@dataclass(frozen=True)
class Entry:
    """One command.

    Attributes:
        function: Its module and its name there, "package.module:name".
        summary: One line for the list of commands.
        group: The heading under which the list has it.
    """

    function: str
    summary: str
    group: str = "Run"


class Commands(Mapping[str, Callable[..., Any]]):
    """Map names to the functions of commands; a function is imported when it is looked up.

    Attributes:
        entries: The commands by name.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        module, _, function = self.entries[name].function.partition(":")
        with QuietInterrupts():
            return getattr(importlib.import_module(module), function)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


def table(entries: Mapping[str, Entry]) -> str:
    """Return the list of commands under the headings of their groups."""
    width = max(map(len, entries), default=0)
    lines: list[str] = []
    for group in dict.fromkeys(entry.group for entry in entries.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<{width}}  {e.summary}" for name, e in entries.items() if e.group == group]
    return "\n".join(lines).strip("\n")
