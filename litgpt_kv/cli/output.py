"""Where the words of a command go: text to standard output, everything else to standard error."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from litgpt_kv.llm.llm import LLM


@dataclass(frozen=True)
class Output:
    """Prints for a command.

    Attributes:
        shown: Whether anything is printed: of several processes that run one command, process 0 prints.
    """

    shown: bool = True

    @classmethod
    def of(cls, llm: LLM) -> Output:
        """That of the process that this model runs in."""
        return cls(shown=llm.fabric.is_global_zero)

    def text(self, text: str, end: str = "\n") -> None:
        """Prints a model's text."""
        if self.shown:
            print(text, end=end, flush=True)

    def note(self, text: str) -> None:
        """Tells the user something about the run."""
        if self.shown:
            print(text, file=sys.stderr, flush=True)
