"""Find stop sequences, of tokens or of characters, in a stream."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


class StopMatcher:
    """Match several stop sequences at once, in time that is linear in the length of the stream.

    This is the algorithm of Knuth, Morris and Pratt. The table of a stop sequence grows only as far as it was matched.

    Args:
        stops: The sequences, none of them empty: texts, or lists of tokens.
    """

    def __init__(self, stops: Iterable[Sequence[Hashable]]) -> None:
        self.stops = list(stops)
        # for each prefix of a stop: the length of its longest proper prefix that is also its suffix
        self._borders: list[list[int]] = [[] for _ in self.stops]
        self._first: dict[Hashable, list[int]] = {}
        for i, stop in enumerate(self.stops):
            self._first.setdefault(stop[0], []).append(i)
        self._matched: dict[int, int] = {}  # index of a stop: how many of its elements match the end of the stream

    def __bool__(self) -> bool:
        return bool(self.stops)

    @property
    def partial(self) -> int:
        """The number of last elements that may be the start of a stop."""
        return max(self._matched.values(), default=0)

    def reset(self) -> None:
        """Forget the stream so far."""
        self._matched = {}

    def push(self, element: Hashable) -> list[int]:
        """Add an element; return the lengths of the stops that it completes."""
        starts = self._first.get(element, ())
        if not self._matched and not starts:
            return []
        complete, matched = [], {}
        for i in dict.fromkeys((*self._matched, *starts)):
            stop, borders = self.stops[i], self._borders[i]
            n = _longer(stop, borders, self._matched.get(i, 0), element)
            if n > len(borders):
                borders.append(_longer(stop, borders, borders[-1], element) if borders else 0)
            if n == len(stop):
                complete.append(n)
                n = borders[-1]
            if n:
                matched[i] = n
        self._matched = matched
        return complete


def _longer(stop: Sequence[Hashable], borders: list[int], n: int, element: Hashable) -> int:
    """Return the length of the longest matching prefix after `element`, if `n` elements matched before it."""
    while n and stop[n] != element:
        n = borders[n - 1]
    return n + 1 if stop[n] == element else 0
