"""The communication between the processes that work on one model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class CollectiveTimer:
    """Measure the time in collectives, which includes waiting for other processes.

    Attributes:
        calls, bytes: The number of collectives, and the bytes that this process passed to them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls, self.bytes = device, 0, 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, x: Tensor) -> Iterator[None]:
        """Measure a collective of the tensor x."""
        self.calls, self.bytes = self.calls + 1, self.bytes + x.nbytes
        if self.device.type == "cuda":  # without synchronizing: the device records both times
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
        """Seconds so far; synchronize a GPU before."""
        return self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1e3


class Collectives:
    """The collectives of one process group, which may be a single process without a group.

    Attributes:
        rank, size: The number of this process, and the number of processes.
        timer: If set, it measures the collectives.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.timer: CollectiveTimer | None = None

    def all_reduce(self, x: Tensor, largest: bool = False) -> Tensor:
        """Return the sum (or the largest element) over all processes, bit-equal on each; `x` may be overwritten."""
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
        """Concatenate x (..., n) of all processes: (..., size * n), bit-equal on each."""
        if self.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        if self.timer is None:
            dist.all_gather(parts, x, group=self.group)
        else:
            with self.timer.measure(x):
                dist.all_gather(parts, x, group=self.group)
        return torch.cat(parts, dim=-1)

    def broadcast_object(self, value: Any) -> Any:
        """Return process 0's object on every process; it must be picklable."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the objects of all processes, by rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier(group=self.group)
