"""How far each row is: counters on the device, and the same on the host so that no step waits for the device.

B rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class HostRows:
    """What the host knows of all rows of a cache; every view of some rows shares it.

    Attributes:
        seen: Tokens each row has seen. alive: False for retired rows. prompt: Length of each row's prompt.
        interrupted: Rows in the middle of a step: set when it begins, cleared when it ends well.
        fill: Of each group of layers, the tokens that a set of each row holds; of a `Table` the budget less the free
            slots of a head.
        sizes: Of each group of layers, for each row the slots that each layer of a `Table` has; None: all the same.
        static: Whether shapes and branches of a step never depend on the counters, for a compiled model: a step counts
            on the device alone, and the host reads the counters from there when it is asked.
        moves: How often the buffers were replaced, as `cache.to(...)` does: views then take the new ones.
    """

    seen: list[int]
    alive: list[bool]
    prompt: list[int]
    interrupted: list[bool]
    fill: list[list[int]] = field(default_factory=list)
    sizes: list[list[tuple[int, ...] | None]] = field(default_factory=list)
    moves: int = 0
    static: bool = False

    @classmethod
    def empty(cls, rows: int, groups: int) -> HostRows:
        """Rows that have seen nothing, of a cache with so many groups of layers."""
        fill, sizes = [[0] * rows for _ in range(groups)], [[None] * rows for _ in range(groups)]
        return cls([0] * rows, [True] * rows, [0] * rows, [False] * rows, fill, sizes)

    def repeated(self, rows: range, count: int) -> HostRows:
        """Some rows, each so many times, side by side."""

        def many(values: list) -> list:
            return [values[b] for b in rows for _ in range(count)]

        lists = (self.seen, self.alive, self.prompt, self.interrupted)
        fill, sizes = ([many(x) for x in group] for group in (self.fill, self.sizes))
        return HostRows(*map(many, lists), fill=fill, sizes=sizes, static=self.static)


class RowClock(nn.Module):
    """Counters of a batch of rows.

    Attributes:
        pos: (B,) int64, the tokens each row has seen, which is its next position.
        live: (B,) bool, False for a retired row, which stays behind while the others decode.
        prompt_length: (B,) int64, the length of each row's prompt.
        rows: The numbers of these rows in the whole cache.
        host: What the host knows of all rows.
    """

    row_dim: ClassVar[int] = 0
    pos: Tensor
    live: Tensor
    prompt_length: Tensor

    def __init__(self, batch_size: int, groups: int, device: torch.device, static: bool) -> None:
        super().__init__()
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.register_buffer("pos", zeros, persistent=False)
        self.register_buffer("live", torch.ones_like(zeros, dtype=torch.bool), persistent=False)
        self.register_buffer("prompt_length", zeros.clone(), persistent=False)
        self.rows = range(batch_size)
        self.host = HostRows.empty(batch_size, groups)
        self.host.static = static

    @property
    def static(self) -> bool:
        """See `HostRows`."""
        return self.host.static

    @property
    def seen(self) -> list[int]:
        """The tokens each row has seen; in static mode a copy from the device."""
        if self.static:
            return self.pos.tolist()
        return [self.host.seen[b] for b in self.rows]

    @property
    def alive(self) -> list[bool]:
        """Whether each row is live."""
        return [self.host.alive[b] for b in self.rows]

    @property
    def interrupted(self) -> list[bool]:
        """Whether each row is in the middle of a step that failed or was interrupted."""
        return [self.host.interrupted[b] for b in self.rows]

    def fill(self, group: int) -> list[int]:
        """The tokens that a set of a group of layers holds, of each row."""
        fill = self.host.fill[group]
        return [fill[b] for b in self.rows]

    def sizes(self, group: int, row: int) -> tuple[int, ...] | None:
        """The slots of each layer of a group that is a `Table`, of one row; None: all the same."""
        return self.host.sizes[group][self.rows[row]]

    def set_sizes(self, group: int, row: int, sizes: tuple[int, ...] | None) -> None:
        """Note how a row's slots were dealt out."""
        self.host.sizes[group][self.rows[row]] = sizes

    def index(self, rows: Iterable[int]) -> Tensor:
        """Row numbers on the device."""
        return torch.tensor(list(rows), dtype=torch.int64, device=self.pos.device)

    def reset(self, rows: Sequence[int]) -> None:
        """Empty rows; they are live again, and no longer interrupted."""
        index = self.index(rows)
        self.pos[index], self.live[index], self.prompt_length[index] = 0, True, 0
        for b in (self.rows[row] for row in rows):
            self.host.seen[b], self.host.alive[b], self.host.prompt[b], self.host.interrupted[b] = 0, True, 0, False
            for fill, sizes in zip(self.host.fill, self.host.sizes):
                fill[b], sizes[b] = 0, None

    def set_live(self, rows: Sequence[int], live: bool) -> None:
        """Retire rows, or let them go on."""
        self.live[self.index(rows)] = live
        for row in rows:
            self.host.alive[self.rows[row]] = live

    def set_prompt_lengths(self, lengths: dict[int, int]) -> None:
        """Note the whole length of rows' prompts."""
        values = torch.tensor(list(lengths.values()), dtype=torch.int64, device=self.pos.device)
        self.prompt_length[self.index(lengths)] = values
        for row, length in lengths.items():
            self.host.prompt[self.rows[row]] = length

    def prompt(self, row: int) -> int:
        """The length of a row's prompt, 0 if it has none yet."""
        return self.host.prompt[self.rows[row]]

    def check_whole(self, what: str, rows: Iterable[int] | None = None) -> None:
        """Refuse rows (None: all) that a step left half-way.

        Raises:
            ValueError: With the rows' numbers.
        """
        rows = range(len(self.rows)) if rows is None else rows
        if bad := [row for row in rows if self.host.interrupted[self.rows[row]]]:
            which = f"Row {bad[0]} is" if len(bad) == 1 else f"Rows {', '.join(map(str, bad))} are"
            raise ValueError(
                f"{what} cannot go on: {which} in the middle of a step that failed or was interrupted. "
                "Call reset() for them, or load a saved cache."
            )

    def begin(self, rows: Iterable[int]) -> None:
        """Mark rows as in the middle of a step."""
        for row in rows:
            self.host.interrupted[self.rows[row]] = True

    def end(self, seen: Mapping[int, int], fills: Sequence[Sequence[int]]) -> None:
        """Note on the host what rows have seen after a step that went well, and how full the groups of layers are."""
        for row, tokens in seen.items():
            b = self.rows[row]
            self.host.seen[b], self.host.interrupted[b] = tokens, False
            for fill, now in zip(self.host.fill, fills):
                fill[b] = now[row]

    def recount(self, fills: Sequence[Sequence[int]]) -> None:
        """Read the counters off the device, after these were written from outside."""
        seen, alive, prompt = self.pos.tolist(), self.live.tolist(), self.prompt_length.tolist()
        self.end(dict(enumerate(seen)), fills)
        for row, b in enumerate(self.rows):
            self.host.alive[b], self.host.prompt[b] = alive[row], prompt[row]
