"""Naive quantisers, a token at a time in float64, and storages that keep what these make of keys and values.

`naive(name)` is a storage class: it stores plain float64 numbers, quantised and dequantised by the loops below, so that
a cache of the storage under test and a cache of it must give the same logits to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from litgpt_kv.cache.storage.base import Storage

Token = list[float]


def rounded(x: float, dtype: torch.dtype) -> float:
    """A number as a dtype holds it."""
    return float(torch.tensor(x, dtype=torch.float64).to(dtype))


def int8(x: Token) -> Token:
    """127 is the largest magnitude."""
    scale = rounded(max(abs(v) for v in x) / 127, torch.float32)
    return [round(v / scale) * scale if scale else 0.0 for v in x]


def levels(x: Token, bits: int) -> Token:
    """2**bits levels from the least number on, with bfloat16 scale and zero."""
    zero, most = rounded(min(x), torch.bfloat16), 2**bits - 1
    scale = rounded((max(x) - zero) / most, torch.bfloat16)
    return [min(max(round((v - zero) / scale), 0), most) * scale + zero if scale > 0 else zero for v in x]


def in_groups(x: Token, group: int, bits: int) -> Token:
    """`levels` of each of the fewest groups of at most `group` neighbours, as even as can be."""
    size = math.ceil(len(x) / math.ceil(len(x) / group))
    return [v for start in range(0, len(x), size) for v in levels(x[start : start + size], bits)]


def turned(x: Token) -> Token:
    """x times Hadamard matrices of the largest power of two that divides its length: (-1)**popcount(i & j)."""
    block = len(x) & -len(x)
    return [
        sum(x[i // block * block + j] * (-1) ** (i % block & j).bit_count() for j in range(block)) / math.sqrt(block)
        for i in range(len(x))
    ]


def float8(x: Token) -> Token:
    """Sign, exponents -6 to 8, eight steps in each, the last missing; 448 is the largest. Ties go to even steps."""
    scale = rounded(max(abs(v) for v in x) / 448, torch.float32)

    def nearest(v: float) -> float:
        if v == 0:
            return 0.0
        step = 2.0 ** (max(math.floor(math.log2(abs(v))), -6) - 3)
        return min(max(round(v / step) * step, -448.0), 448.0)

    return [nearest(v / scale) * scale if scale else 0.0 for v in x]


def quantiser(name: str, role: str, group: int = 32) -> Callable[[Token], Token]:
    """How a storage of that name changes one token of a head."""
    if name == "int4-hadamard":
        return lambda x: turned(in_groups(turned(x), group, 4))
    if name == "int4" or (name, role) == ("k8v4", "values"):
        return lambda x: in_groups(x, group, 4)
    return {"plain": list, "int8": int8, "k8v4": int8, "float8": float8}[name]


def apply(change: Callable[[Token], Token], x: Tensor) -> Tensor:
    """A quantiser over the last dimension of x, float64."""
    rows = [change(row) for row in x.double().reshape(-1, x.size(-1)).tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


class Naive(Storage):
    """Plain float64 slots of naively quantised tokens."""

    lossless, name = False, ""

    def __init__(self, role: str, shape: tuple, dtype: torch.dtype, device: torch.device, group: int = 32) -> None:
        super().__init__()
        self.change = quantiser(self.name, role, group)
        self.register_buffer("data", torch.zeros(shape, dtype=torch.float64, device=device), persistent=False)

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        self.put(self.data, slot, apply(self.change, x.nan_to_num()) if x.device.type == "cpu" else x, live)

    def read(self, extent: int) -> Tensor:
        return self.data[:, :, :extent]


class NaiveKivi(Storage):
    """A list of tokens a row, in the order in which they came, quantised by whole groups."""

    lossless, in_order, options = False, True, ("bits", "group")

    def __init__(
        self, role: str, shape: tuple, dtype: torch.dtype, device: torch.device, bits: int, group: int
    ) -> None:
        super().__init__()
        self.role, self.bits, self.shape = role, bits, shape
        self.group = group
        self.closed: dict[tuple[int, int], Tensor] = {}  # by row and number of the token
        self.tokens: list[list[tuple[int, Tensor]]] = [[] for _ in range(shape[0])]  # slot, (G, D)
        self.register_buffer("nothing", torch.zeros(shape[0], 1), persistent=False)

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        for b in range(x.size(0)):
            for t in range(x.size(2)):
                if live is None or bool(live[b] if live.dim() == 1 else live[b, 0, t]):
                    self.tokens[b].append((int(slot[b, 0, t]), x[b, :, t].double()))

    def read(self, extent: int) -> Tensor:
        out = torch.zeros(*self.shape[:2], extent, self.shape[3], dtype=torch.float64)
        for b, tokens in enumerate(self.tokens):
            for i, (slot, x) in enumerate(tokens):
                if slot < extent:
                    if (b, i) not in self.closed and i // self.group * self.group + self.group <= len(tokens):
                        self.closed[b, i] = self._quantised(tokens, i, x)
                    out[b, :, slot] = self.closed.get((b, i), x)
        return out

    def _quantised(self, tokens: list[tuple[int, Tensor]], i: int, x: Tensor) -> Tensor:
        first = i // self.group * self.group
        if self.role == "values":
            return apply(lambda row: in_groups(row, self.group, self.bits), x)
        group = torch.stack([x for _, x in tokens[first : first + self.group]], -1)  # (G, D, g)
        return apply(lambda channel: levels(channel, self.bits), group)[..., i - first]


def naive(name: str) -> type[Storage]:
    """The naive twin of the storage of that name."""
    return NaiveKivi if name == "kivi" else type("Naive", (Naive,), {"name": name, "options": ("group",)})


def int8_linear(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, column: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A linear layer with int8 weights by its definition, in float64, but for the rounding of its outputs.

    Args:
        x: (M, K). q: (N, K) int8. scale: (N,). bias: (N,) or None.
        column: (K,) that inputs are multiplied with before they are rounded to bfloat16; None: nothing.

    Returns:
        (M, N) outputs, and the sums of absolute values (M, N), which errors of adding are relative to.
    """
    rounded = (x if column is None else x * column).to(torch.bfloat16).double()
    weight = q.double() * scale.double().unsqueeze(1)
    y = rounded @ weight.mT
    return y if bias is None else y + bias.double(), rounded.abs() @ weight.abs().mT
