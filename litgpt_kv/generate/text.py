"""Text from tokens as they come. Floor 5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class TextStream:
    """Turns tokens into text piece by piece; a piece never ends inside a character of several bytes.

    Attributes:
        decode: From token ids to text.
        ids: All tokens so far; a prompt given here is context only and never returned.
    """

    decode: Callable[[Sequence[int]], str]
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = max(0, len(self.ids) - 8)  # a few tokens of context: some tokenizers glue words by what precedes
        self._shown = len(self.ids)

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that the new tokens complete; with `last`, whatever is left."""
        self.ids += tokens
        before = self.decode(self.ids[self._start : self._shown])
        text = self.decode(self.ids[self._start :])
        if text.endswith("\ufffd") and not last:
            return ""
        self._start, self._shown = max(self._start, self._shown - 8), len(self.ids)
        return text[len(before) :]
