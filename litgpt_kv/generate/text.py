"""Text from tokens as they come, and stop texts in it."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence

from litgpt_kv.config import shown
from litgpt_kv.generate.stopping import StopMatcher

CONTEXT = 8  # tokens decoded before a new one: some tokenizers join words by what precedes them
WINDOW = 32  # tokens decoded at once; a longer window begins anew with its last CONTEXT tokens
INCOMPLETE = 3  # replacement characters at the end of a text that may still become one character of up to 4 bytes


class TextStream:
    """Turns tokens into text piece by piece. A piece never ends inside a character of several bytes.

    Args:
        decode: From token ids to text.
        ids: Tokens before the text, usually the prompt: context only, never returned.
        stops: Texts that end the stream. The first to be complete counts; neither it nor what follows is returned, and
            what may begin one is held back until it is certain.

    Attributes:
        stopped: Whether one of them was found.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], ids: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self.decode, self.stopped = decode, False
        self._stops = StopMatcher(stops)
        self._ids = list(ids[-CONTEXT:])  # decoded together with what comes
        self._shown: int | None = None  # characters of the text of `_ids` that were returned or are context
        self._size = 0  # characters made of the new tokens
        self._ends: list[int] = []  # where the text of each new token ends; kept only if there are stops
        self._held: deque[str] = deque()  # text that may begin a stop, and its length
        self._held_size = 0

    def push(self, tokens: Sequence[int], last: bool = False, watch: bool = True) -> str:
        """The text that the new tokens make certain; with `last`, whatever is left.

        Without `watch` no stop is looked for in the text of these tokens.
        """
        if not self._stops:
            return self._next(tokens, last)
        pieces = [self._next([token], False) for token in tokens] + ([self._next([], True)] if last else [])
        piece = "".join(pieces)
        if not watch:
            self._stops.reset()
            return self._release("", 0) + piece
        for at, character in enumerate(piece, 1):
            if complete := self._stops.push(character):
                self.stopped = True
                return self._release(piece[:at], max(complete))
        return self._release(piece, 0 if last else self._stops.begun)

    def tokens_within(self, size: int) -> int:
        """How many of the new tokens have their whole text in the first `size` characters; needs stops."""
        return bisect_right(self._ends, size)

    def _release(self, piece: str, keep: int) -> str:
        """What was held back and one more piece, but for the last `keep` characters."""
        self._held.append(piece)
        self._held_size += len(piece)
        out, count = [], self._held_size - keep
        self._held_size = keep
        while count > 0:
            piece = self._held.popleft()
            if len(piece) > count:
                self._held.appendleft(piece[count:])
            out.append(piece[:count])
            count -= len(piece)
        return "".join(out)

    def _next(self, tokens: Sequence[int], last: bool) -> str:
        """The text of the next tokens, without a character that is not complete yet."""
        if self._shown is None:
            self._shown = len(self.decode(self._ids)) if self._ids else 0
        self._ids += tokens
        text = self.decode(self._ids)
        open_end = 0 if last else min(INCOMPLETE, len(text) - len(text.rstrip("\ufffd")))
        piece = text[self._shown : len(text) - open_end]
        self._shown += len(piece)
        self._size += len(piece)
        left = max(0, len(text) - self._shown)
        if self._stops:
            self._ends += [self._size + (left > 0)] * len(tokens)
        if len(self._ids) > WINDOW:
            self._ids = self._ids[-CONTEXT:]
            self._shown = len(self.decode(self._ids)) - left
        return piece


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """Stop texts as a list; an empty one would end every text at once."""
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop must be a text of at least one character, or several, got {shown(stop)}.")
    return list(texts)
