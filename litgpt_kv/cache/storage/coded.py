"""What storages of codes share: quantising, packing, and rotating by a Hadamard matrix.

... any dimensions · D width · n groups of a token's elements · W width of the codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_kv.cache.storage.base import Storage
from litgpt_kv.config import shown


class Coded(Storage):
    """A storage whose buffers keep their dtypes when the cache is cast; `dtype` is what it reads as.

    Attributes:
        role: "keys" or "values". width: Of a token, D. dtype: Of what is read.
        exact: The dtype that it calculates in: float32, or float64 for a float64 model.
    """

    lossless = False

    def __init__(self, role: str, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.role, self.width, self.dtype = role, width, dtype

    @property
    def exact(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def sets(self) -> int:
        """Heads or pools, G."""
        return next(self.buffers()).size(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Coded:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
                self.dtype = fn(torch.empty(0, dtype=self.dtype, device=buffer.device)).dtype
        return self


def check_choice(storage: str, name: str, value: Any, choices: tuple[int, ...]) -> None:
    """Raise ValueError if an option of a storage is not one of `choices`."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
        raise ValueError(f"{name} of the storage {storage!r} must be one of {choices}, got {shown(value)}.")


def check_positive(storage: str, name: str, value: Any) -> None:
    """Raise ValueError if an option of a storage is not a whole number from 1 to 2**31 - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(
            f"{name} of the storage {storage!r} must be a whole number from 1 to 2**31 - 1, got {shown(value)}."
        )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., W) of `bits` bits, 0 to 2**bits - 1, as bytes (..., ceil(W * bits / 8)) uint8.

    Byte i holds the codes i, i + b, i + 2b, ... of the b bytes, the first one in its lowest bits: parts come out whole.
    """
    per = 8 // bits
    codes = F.pad(codes.to(torch.uint8), (0, -codes.size(-1) % per))
    parts = codes.chunk(per, dim=-1)
    packed = parts[0]
    for place, part in enumerate(parts[1:], 1):
        packed = packed | part << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of `pack`, (..., b * 8 / bits) int8: as many as there is room for, zeros at the end."""
    per = 8 // bits
    if bits == 8:
        return packed
    parts = [packed & (2**bits - 1)]
    parts += [(packed >> (bits * place)) & (2**bits - 1) for place in range(1, per - 1)]
    parts.append(packed >> (8 - bits))
    return torch.cat(parts, dim=-1).view(torch.int8)


def levels(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to 2**bits levels between the least and the greatest number along `dim`.

    Returns:
        Codes like x, and scale and zero with `dim` of size 1, in bfloat16: a number is about code * scale + zero.
        The codes are those of scale and zero after rounding.
    """
    low, high = x.aminmax(dim=dim, keepdim=True)
    zero = low.to(torch.bfloat16)
    scale = ((high - zero.to(x.dtype)) / (2**bits - 1)).to(torch.bfloat16)
    least = torch.finfo(torch.bfloat16).tiny
    codes = (x - zero.to(x.dtype)) / scale.to(x.dtype).clamp(min=least)
    return codes.round().clamp(0, 2**bits - 1), scale, zero


def groups_of(width: int, group: int) -> tuple[int, int]:
    """How many groups of at most `group` elements a token has, and the size of each, as even as can be."""
    count = -(-width // group)
    return count, -(-width // count)


def grouped(x: Tensor, count: int, size: int) -> Tensor:
    """x (..., D) as (..., count, size); the last group repeats the last element where D ends early."""
    missing = count * size - x.size(-1)
    if missing:
        x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), dim=-1)
    return x.unflatten(-1, (count, size))


@functools.lru_cache(maxsize=64)
def hadamard(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An orthogonal, symmetric matrix (width, width): Hadamard matrices along the diagonal.

    They have the size of the largest power of two that divides the width, so that every width has one; at odd widths
    this is the identity.
    """
    block = torch.ones(1, 1, dtype=dtype, device=device)
    while width % (2 * block.size(0)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    return torch.block_diag(*[block * block.size(0) ** -0.5] * (width // block.size(0)))
