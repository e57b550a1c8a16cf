"""What a processor can do, for the head of a table of timings; the clock, and the limit of what memory gives."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")  # on Linux
CAPABILITIES = {  # names of Linux's flags, and how they are written
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "amx_tile": "AMX",
    "asimd": "NEON",
    "i8mm": "I8MM",
    "bf16": "BF16",
}


def processor() -> str:
    """Return the processor's name, its instructions for products, and the versions of the libraries that use them."""
    text = CPUINFO.read_text(errors="replace") if CPUINFO.is_file() else ""
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    found = set(flags.group(1).split()) if flags else set()
    able = [label for flag, label in CAPABILITIES.items() if flag in found]
    name = named.group(1) if named else platform.processor() or platform.machine()
    onednn = re.search(r"MKL-DNN\) v([\d.]+)", torch.__config__.show())
    versions = f"torch {torch.__version__}" + (f", oneDNN {onednn.group(1)}" if onednn else "")
    return f"{name} ({', '.join(able) or 'instructions unknown'}), {torch.get_num_threads()} threads, {versions}"


def bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that this device reads, in a sum over 256 MB: the limit of a decode step."""
    x = torch.ones(64 * 2**20, device=device)
    times = []
    for _ in range(6):
        began = now(device)
        x.sum()
        times.append(now(device) - began)
    return x.numel() * x.element_size() / min(times)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
