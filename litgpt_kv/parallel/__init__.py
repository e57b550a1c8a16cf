"""Run a model on several devices with Lightning Fabric; the parallel strategies have litgpt's names.

Read `base.py` (the interface) first, then one of `tensor.py`, `sequential.py` and `data.py`. `launch.py` starts and
ends the processes, with `launcher.py` and `heartbeat.py`. `collectives.py` has the communication, `memory.py` computes
the memory of each device. A new strategy is a class with the methods of `ParallelStrategy` and a line in
`PARALLEL_STRATEGIES`.
"""

from __future__ import annotations

from litgpt_kv.parallel.base import DeviceRequest, ParallelStrategy
from litgpt_kv.parallel.data import DataParallel
from litgpt_kv.parallel.launch import end_worker
from litgpt_kv.parallel.sequential import Sequential
from litgpt_kv.parallel.tensor import TensorParallel

__all__ = ["PARALLEL_STRATEGIES", "DeviceRequest", "ParallelStrategy", "end_worker", "find_parallel_strategy"]

PARALLEL_STRATEGIES: dict[str, type[ParallelStrategy]] = {
    "tensor_parallel": TensorParallel,
    "sequential": Sequential,
    "data_parallel": DataParallel,
}


def find_parallel_strategy(name: str | None) -> type[ParallelStrategy]:
    """Return the parallel strategy with this name; raise ValueError with all names if it is unknown or None."""
    if name is None:
        raise ValueError(f"Several devices need a generate_strategy: {', '.join(PARALLEL_STRATEGIES)}.")
    if name not in PARALLEL_STRATEGIES:
        raise ValueError(f"generate_strategy must be one of {', '.join(PARALLEL_STRATEGIES)}, got {name!r}.")
    return PARALLEL_STRATEGIES[name]
