"""Decode tokens in a stream, and find stop texts."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence

from litgpt_kv.config import shown
from litgpt_kv.generate.stopping import StopMatcher

CONTEXT = 8  # earlier tokens that are decoded with a new one, because its text may depend on them
WINDOW = 32  # the most tokens decoded at once; then only the last CONTEXT tokens are kept
INCOMPLETE = 3  # so many replacement characters at the end may be the first bytes of a 4-byte character


class TextStream:
    """Turn tokens into text piece by piece. A piece never ends inside a multi-byte character.

    Args:
        decode: A function from token ids to text.
        ids: Tokens before the text, usually the prompt; their text is not returned.
        stops: Stop texts. The stream ends before the first one that is complete. Text that may be the start of one is
            held back.

    Attributes:
        stopped: Whether a stop text was found.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], ids: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self.decode, self.stopped = decode, False
        self._stops = StopMatcher(stops)
        self._ids = list(ids[-CONTEXT:])  # the context of the next token
        self._shown: int | None = None  # characters of `_ids`' text that were returned, or belong to the context
        self._size = 0  # characters of all new tokens
        self._ends: list[int] = []  # where each new token's text ends, in characters; only with stops
        self._held: deque[str] = deque()  # text that may be the start of a stop, and its length
        self._held_size = 0

    def push(self, tokens: Sequence[int], last: bool = False, match_stops: bool = True) -> str:
        """Add tokens; return the text that is now certain, or with `last` all remaining text.

        With `match_stops` False, stop texts are ignored in the text of these tokens.
        """
        if not self._stops:
            return self._next(tokens, last)
        pieces = [self._next([token], False) for token in tokens] + ([self._next([], True)] if last else [])
        piece = "".join(pieces)
        if not match_stops:
            self._stops.reset()
            return self._release("", 0) + piece
        for length, character in enumerate(piece, 1):
            if complete := self._stops.push(character):
                self.stopped = True
                return self._release(piece[:length], max(complete))
        return self._release(piece, 0 if last else self._stops.partial)

    def tokens_within(self, size: int) -> int:
        """Return how many of the new tokens have all their text in the first `size` characters; needs stops."""
        return bisect_right(self._ends, size)

    def _release(self, piece: str, keep: int) -> str:
        """Add a piece to the held text; return all of it except the last `keep` characters."""
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
        """Decode the next tokens; leave out a character that is not complete yet."""
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
    """Return stop texts as a list; refuse an empty one, which would end every text at once."""
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop must be a text of at least one character, or several, got {shown(stop)}.")
    return list(texts)
