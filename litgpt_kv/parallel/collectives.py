"""The processes that work on one model, and all that they say to each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class CollectiveTimer:
    """Time spent in collectives, waiting for the others included.

    Attributes:
        calls, bytes: How many collectives, and what this process handed to them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls, self.bytes = device, 0, 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, x: Tensor) -> Iterator[None]:
        self.calls, self.bytes = self.calls + 1, self.bytes + x.nbytes
        if self.device.type == "cuda":  # no waiting here: the device notes when it comes by
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """Time so far; on a GPU it must have been synchronised."""
        return self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1e3


class Collectives:
    """The processes of a run: their number, this one's rank, and the collectives, all through one process group.

    Attributes:
        rank, size: This process' number, and how many there are.
        timer: Measures the collectives if it is set.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.timer: CollectiveTimer | None = None

    def all_reduce(self, x: Tensor, largest: bool = False) -> Tensor:
        """The sum (or the largest element) over all processes, the same to the bit on each; `x` may be overwritten."""
        if self.size == 1:
            return x
        x = x.contiguous()
        op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        if self.timer is None:
            dist.all_reduce(x, op, group=self.group)
        else:
            with self.timer.measure(x):
                dist.all_reduce(x, op, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """(..., n) of each process side by side, (..., size * n), the same to the bit on each."""
        if self.size == 1:
            return x
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(self.size)]
        if self.timer is None:
            dist.all_gather(every, x, group=self.group)
        else:
            with self.timer.measure(x):
                dist.all_gather(every, x, group=self.group)
        return torch.cat(every, dim=-1)

    def broadcast_object(self, value: Any) -> Any:
        """What process 0 has, on every process; any object that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every process' object, by rank, on every process."""
        if self.size == 1:
            return [value]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self.group)
        return every

    def barrier(self) -> None:
        """Waits until all processes have come here."""
        if self.size > 1:
            dist.barrier(group=self.group)
