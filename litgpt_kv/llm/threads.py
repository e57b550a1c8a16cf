"""How many CPU threads a model runs with: a small one is fastest on one, most of all on a busy machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

SMALL_MODEL = 20_000_000  # a model with fewer weights runs fastest on one CPU thread


def best_threads(model: nn.Module | None, device: torch.device) -> int | None:
    """Return 1 for a small model on a CPU; None, torch's own number, for others or if OMP_NUM_THREADS is set."""
    if model is None or device.type != "cpu" or os.environ.get("OMP_NUM_THREADS"):
        return None
    return 1 if sum(p.numel() for p in model.parameters()) < SMALL_MODEL else None


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run with `count` CPU threads, and with as many as before afterwards; None changes nothing."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
