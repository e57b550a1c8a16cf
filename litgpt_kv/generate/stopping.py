"""Stop sequences, of tokens or of characters, found as their elements come."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


class StopMatcher:
    """Follows several stop sequences at once; the work is linear in what is pushed, however long they are.

    This is the algorithm of Knuth, Morris and Pratt. The table of a stop is made only as far as it was ever matched.

    Args:
        stops: The sequences, none of them empty: texts, or lists of tokens.
    """

    def __init__(self, stops: Iterable[Sequence[Hashable]]) -> None:
        self.stops = list(stops)
        # of each prefix of a stop, as far as needed: the length of the longest shorter prefix that it ends with
        self._borders: list[list[int]] = [[] for _ in self.stops]
        self._first: dict[Hashable, list[int]] = {}
        for i, stop in enumerate(self.stops):
            self._first.setdefault(stop[0], []).append(i)
        self._matched: dict[int, int] = {}  # stop: how many of its elements stand at the end of what was pushed

    def __bool__(self) -> bool:
        return bool(self.stops)

    @property
    def begun(self) -> int:
        """How many of the last elements may still turn out to begin a stop."""
        return max(self._matched.values(), default=0)

    def reset(self) -> None:
        """Forget what was pushed."""
        self._matched = {}

    def push(self, element: Hashable) -> list[int]:
        """The lengths of the stops that this element completes."""
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
    """The length of the longest prefix that ends with `element`, after one of `n` elements."""
    while n and stop[n] != element:
        n = borders[n - 1]
    return n + 1 if stop[n] == element else 0
