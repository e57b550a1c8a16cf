"""When a row ends: stop sequences of one or several tokens, and the most tokens it may make. Floor 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """One row's output: holds back tokens that may turn out to begin a stop sequence, which itself is never shown.

    Attributes:
        tokens: All tokens released so far.
        reason: Why the row ended, "stop" or "length"; None while it runs.
    """

    stop: list[list[int]]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    _held: list[int] = field(default_factory=list)

    def push(self, token: int) -> list[int]:
        """Takes the next token; returns those that are now certain to belong to the output."""
        held = [*self._held, token]
        if ended := [len(stop) for stop in self.stop if held[-len(stop) :] == stop]:
            self.reason = "stop"
            return self._release(held[: -max(ended)], [])
        # a match may restart inside a partial one: of all begun stops, the longest is held back
        begun = [n for stop in self.stop for n in range(1, len(stop)) if held[-n:] == stop[:n]]
        keep = max(begun, default=0)
        if len(self.tokens) + len(held) >= self.max_new_tokens:
            self.reason = "length"
            keep = 0
        cut = len(held) - keep
        return self._release(held[:cut], held[cut:])

    def _release(self, out: list[int], held: list[int]) -> list[int]:
        self.tokens += out
        self._held = held
        return out


def check_stops(stop: Sequence[Sequence[int]]) -> list[list[int]]:
    """Stop sequences as lists; an empty one would end every row at once."""
    if any(not isinstance(one, Sequence) or not one for one in stop):
        raise ValueError(f"stop must be a list of stop sequences of at least one token, [[2], [5, 7]], got {stop}.")
    return [list(one) for one in stop]
