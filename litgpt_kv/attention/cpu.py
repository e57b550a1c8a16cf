"""How many threads products use on this CPU, and which library is fastest."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")  # on Linux


@torch.compiler.assume_constant_result
def thread_count() -> int:
    """The number of threads that torch runs an operator with."""
    return torch.get_num_threads()


@lru_cache
def prefers_onednn() -> bool:
    """Return whether oneDNN multiplies float32 faster than MKL here, as measured: on AMD's processors with AVX-512."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    text = CPUINFO.read_text(errors="replace") if CPUINFO.is_file() else os.environ.get("PROCESSOR_IDENTIFIER", "")
    return "AuthenticAMD" in text


def products(x: Tensor, y: Tensor) -> Tensor:
    """x (B, G, M, D) times y (B, G, N, D), of many rows each: (B, G, M, N), without gradients.

    On an AMD EPYC with AVX-512, two threads and 3 times 512 × 65 by 1,024 × 65, MKL takes 1.24 ms, oneDNN 0.44.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled() or not prefers_onednn():
        return x @ y.mT
    pairs = zip(x.flatten(0, 1), y.flatten(0, 1))
    made = [torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "") for a, b in pairs]
    return torch.stack(made).unflatten(0, x.shape[:2])
