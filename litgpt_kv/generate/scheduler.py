"""Decide which sequence has which row, which ones wait, and whose prompt is read next."""

from __future__ import annotations

from collections import abc, deque

from litgpt_kv.generate.request import Sequence


class Scheduler:
    """Give free rows to waiting sequences, first come, first served.

    Attributes:
        rows: The sequence of each row, None for a free one.
        waiting: The sequences without a row, in the order of `add`.
        reading: The sequences whose prompts are still read in pieces, in the order in which they got their rows.
        following: The sequences that have rows and wait until another one has read their prompt.
    """

    def __init__(self, rows: int) -> None:
        self.rows: list[Sequence | None] = [None] * rows
        self.waiting: deque[Sequence] = deque()
        self.reading: list[Sequence] = []
        self.following: list[Sequence] = []

    @property
    def free(self) -> int:
        """The number of free rows that no waiting sequence will get."""
        return max(0, self.rows.count(None) - len(self.waiting))

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give free rows to waiting sequences, and return these. A sequence that continues a row waits for that row."""
        if not self.waiting:
            return []
        free = [row for row, sequence in enumerate(self.rows) if sequence is None]
        admitted, blocked = [], []
        while free and self.waiting:
            sequence = self.waiting.popleft()
            row = sequence.row if sequence.continues else free[0]
            if row not in free:
                blocked.append(sequence)
                continue
            free.remove(row)
            sequence.row, self.rows[row] = row, sequence
            self.reading.append(sequence)
            admitted.append(sequence)
        self.waiting.extendleft(reversed(blocked))
        return admitted

    def next_to_read(self, together: bool, size: abc.Callable[[Sequence], int]) -> list[Sequence]:
        """Return the sequences to read next: the first one; with `together`, also neighbours with an equal piece.

        `size` gives the tokens of a sequence's next piece.
        """
        group = self.reading[:1]
        if not together or not group:
            return group

        def piece(sequence: Sequence) -> tuple[int, int, bool]:
            return size(sequence), sequence.read, sequence.past > 0

        by_row = {sequence.row: sequence for sequence in self.reading}
        while (after := by_row.get(group[-1].row + 1)) is not None and piece(after) == piece(group[0]):
            group.append(after)
        return group

    def finish_reading(self, sequence: Sequence) -> None:
        """Let a sequence take part in decode steps."""
        self.reading.remove(sequence)

    def follow(self, sequence: Sequence) -> None:
        """Let an admitted sequence wait until the leader of its group has read their prompt."""
        self.reading.remove(sequence)
        self.following.append(sequence)

    def read_alone(self, sequence: Sequence) -> None:
        """Let a sequence that followed read its prompt."""
        self.following.remove(sequence)
        self.reading.append(sequence)

    def finish_following(self, sequence: Sequence) -> None:
        """Let a sequence whose row has its prompt take part in decode steps."""
        self.following.remove(sequence)

    def running(self) -> list[Sequence]:
        """Return the sequences that take part in a decode step, in the order of their rows."""
        return [s for s in self.rows if s is not None and s not in self.reading and s not in self.following]

    def remove(self, sequence: Sequence) -> None:
        """Free the row of a sequence, or remove it from the queue."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        self.rows[sequence.row] = None
        for waiting in (self.reading, self.following):
            if sequence in waiting:
                waiting.remove(sequence)
