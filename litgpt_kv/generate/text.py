"""Text from tokens as they come, and stop strings in it. Floor 5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class TextStream:
    """Turns tokens into text piece by piece; a piece never ends inside a character of several bytes.

    Attributes:
        decode: From token ids to text.
        ids: All tokens so far; a prompt given here is context only and never returned.
        stops: Texts that end the stream. The first one to be complete counts; neither it nor what follows is returned,
            and what may begin one is held back until it is certain.
        stopped: Whether one of them was found.
    """

    decode: Callable[[Sequence[int]], str]
    ids: list[int] = field(default_factory=list)
    stops: Sequence[str] = ()
    stopped: bool = False
    _held: str = ""

    def __post_init__(self) -> None:
        self._start = max(0, len(self.ids) - 8)  # a few tokens of context: some tokenizers glue words by what precedes
        self._shown = len(self.ids)

    def push(self, tokens: Sequence[int], last: bool = False, watch: bool = True) -> str:
        """The text that the new tokens make certain; with `last`, whatever is left.

        Without `watch` no stop is looked for in the text of these tokens.
        """
        piece = self._decoded(tokens, last)
        if not self.stops:
            return piece
        if not watch:
            text, self._held = self._held + piece, ""
            return text
        text = self._held + piece
        ends = [(at + len(stop), -len(stop)) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            end, length = min(ends)
            self.stopped, self._held = True, ""
            return text[: end + length]
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        keep = 0 if last else max(begun, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decoded(self, tokens: Sequence[int], last: bool) -> str:
        self.ids += tokens
        before = self.decode(self.ids[self._start : self._shown])
        text = self.decode(self.ids[self._start :])
        if text.endswith("\ufffd") and not last:
            return ""
        self._start, self._shown = max(self._start, self._shown - 8), len(self.ids)
        return text[len(before) :]


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """Stop texts as a list; an empty one would end every text at once."""
    texts = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop must be a text of at least one character, or several, got {stop!r}.")
    return texts
