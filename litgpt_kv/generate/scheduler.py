"""Which sequence has which row, which ones wait, and whose prompt is read next."""

from __future__ import annotations

from collections import abc, deque

from litgpt_kv.generate.request import Sequence


class Scheduler:
    """Gives free rows to waiting sequences, first come, first served.

    Attributes:
        rows: The sequence of each row, None for a free one.
        waiting: Sequences without a row, in the order in which they came.
        reading: Sequences with a row whose prompt is still read in pieces, in the order in which they got it.
    """

    def __init__(self, rows: int) -> None:
        self.rows: list[Sequence | None] = [None] * rows
        self.waiting: deque[Sequence] = deque()
        self.reading: list[Sequence] = []

    @property
    def free(self) -> int:
        """Rows that are neither taken nor waited for."""
        return max(0, self.rows.count(None) - len(self.waiting))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give free rows to waiting sequences; one that continues a row waits for that row."""
        if not self.waiting:
            return []
        free = [row for row, sequence in enumerate(self.rows) if sequence is None]
        admitted, later = [], []
        while free and self.waiting:
            sequence = self.waiting.popleft()
            row = sequence.row if sequence.continues else free[0]
            if row not in free:
                later.append(sequence)
                continue
            free.remove(row)
            sequence.row, self.rows[row] = row, sequence
            self.reading.append(sequence)
            admitted.append(sequence)
        self.waiting.extendleft(reversed(later))
        return admitted

    def next_to_read(self, together: bool, size: abc.Callable[[Sequence], int]) -> list[Sequence]:
        """Whose next piece to read: the first sequence, or with `together` also neighbours with a like piece."""
        group = self.reading[:1]
        if not together or not group:
            return group

        def kind(sequence: Sequence) -> tuple[int, int, bool]:
            return size(sequence), sequence.read, sequence.past > 0

        by_row = {sequence.row: sequence for sequence in self.reading}
        while (after := by_row.get(group[-1].row + 1)) is not None and kind(after) == kind(group[0]):
            group.append(after)
        return group

    def finish_reading(self, sequence: Sequence) -> None:
        """From now on a sequence takes part in decode steps."""
        self.reading.remove(sequence)

    def running(self) -> list[Sequence]:
        """The sequences that take part in a decode step, by row."""
        return [s for s in self.rows if s is not None and s not in self.reading]

    def remove(self, sequence: Sequence) -> None:
        """Free the row of a sequence, or take it out of those that wait."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        self.rows[sequence.row] = None
        if sequence in self.reading:
            self.reading.remove(sequence)
