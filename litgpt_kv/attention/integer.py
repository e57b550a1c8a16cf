"""Products of a few float rows with many int8 rows, without making floats of the int8 rows.

The float rows are cut into int8 parts, a coarse one and finer ones; processors multiply int8 several times as fast as
they read floats (`torch._int_mm`, oneDNN). The sum over the parts is as exact as float32 products.

N matrices · M float rows of each · K width · S int8 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

FINER = 254  # of a part's unit, the next part's: what rounding leaves, half a unit at most, is at most 127 of them
FEWEST = 2048  # int8 rows: for fewer, making floats of them is faster than a call a matrix
FAST = torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
MOST = 2**31 // 127**2  # products of two int8 numbers that an int32 sum holds


def parts_for(dtype: torch.dtype) -> int:
    """How many int8 parts hold a number of a dtype: an error of 2**-24 of the row's largest for three, 2**-16 for
    two."""
    return 3 if dtype == torch.float32 else 2


def has_fast_products(device: torch.device) -> bool:
    """Whether the device multiplies int8 numbers faster than floats."""
    return FAST and device.type == "cpu"


def split(x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Cut float rows into int8 parts.

    Args:
        x: (N, M, K) float32. parts: How many.

    Returns:
        (N, parts * M, K) int8, the coarse part of all rows first, and the unit of the coarse part (N, M, 1) float32.
        A row with a number that is not finite has a unit that is not finite.
    """
    unit = x.abs().amax(dim=-1, keepdim=True) / 127
    rest = x / torch.where(unit == 0, 1.0, unit)
    found = []
    for part in range(parts):
        whole = rest.round()
        found.append(whole.to(torch.int8))
        if part + 1 < parts:
            rest = rest.sub_(whole).mul_(FINER)
    return torch.cat(found, dim=1), unit


def join(products: Tensor, unit: Tensor) -> Tensor:
    """Add up the products (parts * M, .) int32 of the parts of M rows with the units (M, 1), as float32 (M, .)."""
    coarse, *finer = products.to(unit.dtype).split(unit.size(0))
    for part, product in enumerate(finer, 1):
        coarse = coarse.add(product, alpha=float(FINER) ** -part)
    return coarse * unit


def products(x: Tensor, codes: Tensor, parts: int) -> Tensor:
    """Products of rows with rows: x (N, M, K) float32 and codes (N, S, K) int8 give (N, M, S) float32."""
    if codes.size(1) < FEWEST or not 1 < codes.size(2) <= MOST or not has_fast_products(x.device):
        return x @ codes.to(x.dtype).mT  # torch 2.13's _int_mm is wrong for a width of 1
    cut, unit = split(x, parts)
    found = [join(torch._int_mm(a, b.T), u) for a, b, u in zip(cut.unbind(), codes.unbind(), unit.unbind())]
    return torch.stack(found)


def sums(p: Tensor, codes: Tensor, parts: int) -> Tensor:
    """Weighted sums of rows: weights p (N, M, S) float32 and codes (N, S, K) int8 give (N, M, K) float32."""
    if codes.size(1) < FEWEST or not has_fast_products(p.device):
        return p @ codes.to(p.dtype)
    if codes.size(1) > MOST:
        pairs = zip(p.split(MOST, dim=2), codes.split(MOST, dim=1))
        return torch.stack([sums(a, b, parts) for a, b in pairs]).sum(0)
    cut, unit = split(p, parts)
    found = [join(torch._int_mm(a, b), u) for a, b, u in zip(cut.unbind(), codes.unbind(), unit.unbind())]
    return torch.stack(found)
