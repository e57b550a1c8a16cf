"""What a storage holds, as Triton reads it: the tensors of a storage, and a function that makes numbers of them.

B rows · P sets of slots · S slots · D width · n groups of a token's elements · W width of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_kv.cache.storage.coded import hadamard
from litgpt_kv.cache.storage.float8 import Float8
from litgpt_kv.cache.storage.integer import Integers
from litgpt_kv.cache.storage.plain import Plain

PLAIN, INT8, INT4, FLOAT8 = range(4)
ELEMENTS, CODES, HALVES = range(3)
"""How tokens are read: numbers; codes, whose scales are multiplied with products; or halves of INT4's tokens."""


@dataclass(frozen=True)
class Stored:
    """The tensors of a storage.

    Attributes:
        kind: PLAIN, INT8, INT4 or FLOAT8.
        data: (B, P, S, W): numbers, int8 codes, or bytes of codes.
        scale: (B, P, S, n), or None for numbers. zero: (B, P, S, n) of INT4, else None.
        width: Of a token, D. group: Elements that share a scale, of INT4.
        turn: (D, D) symmetric matrix that tokens were multiplied by before they were quantised, or None.
    """

    kind: int
    data: Tensor
    scale: Tensor | None
    zero: Tensor | None
    width: int
    group: int
    turn: Tensor | None


def is_readable(storage: Any) -> bool:
    """Whether `stored` knows a storage: plain, int8, int4, int4-hadamard, k8v4 and float8."""
    read = getattr(type(storage), "read", None)  # a subclass may read in another way
    return read in (Plain.read, Integers.read, Float8.read)


def stored(storage: Any) -> Stored:
    """The tensors of a storage that `is_readable`."""
    if isinstance(storage, Plain):
        return Stored(PLAIN, storage.data, None, None, storage.data.size(-1), 1, None)
    if isinstance(storage, Float8):
        return Stored(FLOAT8, storage.codes, storage.scale, None, storage.width, storage.width, None)
    turn = None if storage.turn is None else hadamard(storage.width, storage.exact, storage.codes.device)
    kind = INT8 if storage.zero is None else INT4
    return Stored(kind, storage.codes, storage.scale, storage.zero, storage.width, storage.size, turn)


def how_read(kind: int, group: int, size: int, width: int, dtype: torch.dtype) -> int:
    """How tokens of a kind are read: CODES or HALVES where they can, which are faster, and ELEMENTS elsewhere.

    Keys that are rotated as they are read must be ELEMENTS, whatever this returns.

    Args:
        kind: PLAIN, INT8, INT4 or FLOAT8. group: Elements that share a scale. size: Of a token's codes.
        width: Of a token. dtype: Of the products; float16 has too small a range for probabilities times scales.
    """
    if kind == INT4:
        even = 2 * size == width and size >= 16 and size % group == 0
        powers = size.bit_count() == 1 and group.bit_count() == 1  # as Triton wants the sizes of blocks
        return HALVES if even and powers else ELEMENTS
    return CODES if kind == PLAIN or dtype != torch.float16 else ELEMENTS


@triton.jit
def load_codes(data, slots, columns, there, wide, data_stride, dtype: tl.constexpr, KIND: tl.constexpr):
    """The codes of tokens as numbers, (M, N); times `load_scales`, they are `load_elements`. Not for INT4."""
    if KIND == 3:
        # 4 bits of exponent and 3 of mantissa, moved to where float16 has its own: 2**8 too small; the rest is NaN
        codes = tl.load(data + slots * data_stride + columns, mask=there & wide, other=0).to(tl.uint16)
        half = (((codes & 128) << 8) | ((codes & 127) << 7)).to(tl.float16, bitcast=True)
        x = tl.where((codes & 127) == 127, float("nan"), half)
    else:
        x = tl.load(data + slots * data_stride + columns, mask=there & wide, other=0)
    return x.to(dtype)


@triton.jit
def load_scales(scale, slots, there, scale_stride, KIND: tl.constexpr):
    """What the codes of the tokens in `slots` are multiplied with, float32 in the shape of `slots`."""
    if KIND == 0:
        x = tl.full(slots.shape, 1.0, tl.float32)
    else:
        x = tl.load(scale + slots * scale_stride, mask=there, other=0.0).to(tl.float32)
        if KIND == 3:
            x *= 256.0
    return x


@triton.jit
def load_halves(
    data, scale, zero, slots, there, data_stride, scale_stride, zero_stride,
    dtype: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The first and the second half of INT4's tokens in `slots` (N,), dequantised, (N, BYTES) each.

    A byte is read once and holds an element of either half; a scale is read once for its group.
    """
    groups = tl.arange(0, BYTES // GROUP)[None, :]
    at = (groups * GROUP)[:, :, None] + tl.arange(0, GROUP)[None, None, :]
    codes = tl.load(data + slots[:, None, None] * data_stride + at, mask=there[:, None, None], other=0)
    scale += slots[:, None] * scale_stride + groups
    zero += slots[:, None] * zero_stride + groups
    inside = there[:, None]
    low = (codes & 15).to(tl.float32) * tl.load(scale, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    low += tl.load(zero, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    high = (codes >> 4).to(tl.float32) * tl.load(scale + BYTES // GROUP, mask=inside, other=0.0).to(tl.float32)[
        :, :, None
    ]
    high += tl.load(zero + BYTES // GROUP, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    size: tl.constexpr = slots.shape[0]
    return low.to(dtype).reshape(size, BYTES), high.to(dtype).reshape(size, BYTES)


@triton.jit
def load_elements(
    data, scale, zero, slots, columns, there, wide,
    data_stride, scale_stride, zero_stride,
    KIND: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The elements `columns` (1, N) of the tokens in `slots` (M, 1), dequantised, (M, N).

    They are 0 but where the slots are `there` (M, 1) and the columns `wide` enough (1, N). `data`, `scale` and `zero`
    point to the first slot of a set; strides are those from slot to slot. BYTES: of a token of INT4, whose byte i holds
    the elements i (lower half) and i + BYTES.
    """
    if KIND == 2:
        inside = there & wide
        codes = tl.load(data + slots * data_stride + columns % BYTES, mask=inside, other=0)
        codes = (codes >> (4 * (columns // BYTES)).to(tl.uint8)) & 15
        group = columns // GROUP
        x = codes.to(tl.float32) * tl.load(scale + slots * scale_stride + group, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(zero + slots * zero_stride + group, mask=inside, other=0.0).to(tl.float32)
    else:
        x = load_codes(data, slots, columns, there, wide, data_stride, tl.float32, KIND)
        if KIND != 0:
            x *= load_scales(scale, slots, there, scale_stride, KIND)
    return x
