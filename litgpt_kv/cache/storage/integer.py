"""Keys and values as integers of 8 or 4 bits.

B rows · G key/value heads (or pools) · S slots · T tokens · D width · n groups of a token's elements · W width of the
codes, at least D · M queries of a head.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_kv.attention import integer
from litgpt_kv.cache.storage.coded import Coded, check_positive, grouped, groups_of, hadamard, levels, pack, unpack
from litgpt_kv.registry import register


class Integers(Coded):
    """Codes with a scale for every group of elements of a token and head; never requantised.

    Attributes:
        bits: 8 or 4. group: Elements of a group at most; None: a token's.
        codes: (B, G, S, W) int8, or packed uint8. scale: (B, G, S, n). zero: (B, G, S, n), or None where codes have a
            sign.
        turn: (D, D) what tokens are rotated by before they are quantised, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        role: str,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        bits: int,
        group: int | None = None,
        rotate: bool = False,
    ) -> None:
        super().__init__(role, shape[-1], dtype)
        self.bits: int = bits
        self.count, self.size = groups_of(self.width, group or self.width)
        self.turn = hadamard(self.width, self.exact, device) if rotate else None
        slots = shape[:-1]
        if bits == 8:
            codes = torch.zeros(shape, dtype=torch.int8, device=device)
            scale, zero = torch.zeros(*slots, 1, dtype=torch.float32, device=device), None
        else:
            per = 8 // bits
            packed = -(-self.count * self.size // per)
            codes = torch.zeros(*slots, packed, dtype=torch.uint8, device=device)
            scale = torch.zeros(*slots, self.count, dtype=torch.bfloat16, device=device)
            zero = torch.zeros_like(scale)
        for name, buffer in (("codes", codes), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, buffer, persistent=False)

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        x = x.to(self.exact)
        if self.turn is not None:
            x = x @ self._turn(x)
        if self.zero is None:
            scale = (torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True) / 127).float()
            codes = (x / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
        else:
            codes, scale, zero = levels(grouped(x, self.count, self.size), -1, self.bits)
            codes = pack(codes.flatten(-2), self.bits)
            scale, zero = scale.squeeze(-1), zero.squeeze(-1)
            self.put(self.zero, slot, zero, live)
        self.put(self.codes, slot, codes, live)
        self.put(self.scale, slot, scale, live)

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots, dequantised and turned back, (B, G, extent, D)."""
        codes = self._codes(extent)[..., : self.count * self.size].to(self.exact)
        scale = self.scale[:, :, :extent].to(self.exact)
        if self.zero is None:
            x = codes * scale
        else:
            x = codes.unflatten(-1, (self.count, self.size)) * scale.unsqueeze(-1)
            x = (x + self.zero[:, :, :extent].to(self.exact).unsqueeze(-1)).flatten(-2)[..., : self.width]
        if self.turn is not None:
            x = x @ self._turn(x)
        return x.to(self.dtype)

    def products(self, x: Tensor, extent: int) -> Tensor:
        """x (B, G, M, D) float32 with each of the first `extent` slots, (B, G, M, extent)."""
        B, G, M, _ = x.shape
        if self.turn is not None:
            x = x @ self._turn(x)
        codes = self._codes(extent)
        x = F.pad(x, (0, codes.size(-1) - x.size(-1))) if codes.size(-1) > x.size(-1) else x
        scale = self.scale[:, :, :extent].to(x.dtype).mT.unsqueeze(3)  # (B, G, n, 1, extent)
        if self.count > 1:
            x = (x.unsqueeze(2) * self._members(x)).flatten(2, 3)  # (B, G, n * M, W)
        found = integer.products(x.flatten(0, 1), codes.flatten(0, 1), integer.parts_for(self.dtype))
        found = found.view(B, G, self.count, M, -1) * scale
        if self.zero is not None:
            zero = self.zero[:, :, :extent].to(x.dtype).mT.unsqueeze(3)  # (B, G, n, 1, extent)
            found = found + x.sum(dim=-1).view(B, G, self.count, M, 1) * zero
        return found.squeeze(2) if self.count == 1 else found.sum(dim=2)

    def sums(self, p: Tensor, extent: int) -> Tensor:
        """The first `extent` slots, weighted by p (B, G, M, extent) float32: (B, G, M, D)."""
        B, G, M, _ = p.shape
        codes = self._codes(extent)
        scale = self.scale[:, :, :extent].to(p.dtype).mT.unsqueeze(3)  # (B, G, n, 1, extent)
        scaled = (p.unsqueeze(2) * scale).reshape(B * G, self.count * M, -1)
        y = integer.sums(scaled, codes.flatten(0, 1), integer.parts_for(self.dtype)).view(B, G, self.count, M, -1)
        y = y.squeeze(2) if self.count == 1 else (y * self._members(y)).sum(dim=2)
        if self.zero is not None:
            shift = (p @ self.zero[:, :, :extent].to(p.dtype)).repeat_interleave(self.size, dim=-1)
            y = y[..., : self.width] + shift[..., : self.width]
        return y if self.turn is None else y @ self._turn(y)

    def _codes(self, extent: int) -> Tensor:
        """(B, G, extent, W) int8."""
        return unpack(self.codes[:, :, :extent], self.bits)

    def _members(self, x: Tensor) -> Tensor:
        """(n, 1, W) 1 where an element belongs to a group, in the dtype of x (..., W)."""
        group = torch.arange(x.size(-1), device=x.device) // self.size
        return (group == torch.arange(self.count, device=x.device).view(-1, 1, 1)).to(x.dtype)

    def _turn(self, x: Tensor) -> Tensor:
        if self.turn.device != x.device or self.turn.dtype != x.dtype:  # the cache was moved or cast
            self.turn = hadamard(self.width, x.dtype, x.device)
        return self.turn


@register("storage", "int8")
class Int8(Integers):
    """8 bits a number, with a float32 scale a token and head: the largest magnitude is 127."""

    bits = 8

    def __init__(self, role: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(role, shape, dtype, device, 8)


@register("storage", "int4")
class Int4(Integers):
    """4 bits a number, with a bfloat16 scale and zero for every group of a token's elements.

    `group` (32) is the most elements of a group: fewer are more exact and take more memory.
    """

    bits = 4
    options: ClassVar[tuple[str, ...]] = ("group",)
    rotated: ClassVar[bool] = False

    def __init__(
        self,
        role: str,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        group: int = 32,
    ) -> None:
        check_positive("int4", "group", group)
        super().__init__(role, shape, dtype, device, 4, group, self.rotated)


@register("storage", "int4-hadamard")
class Int4Hadamard(Int4):
    """int4 of tokens that a Hadamard matrix rotates first, which spreads outliers over all elements.

    The matrix has blocks of the largest power of two that divides the head size; at odd head sizes it does nothing, and
    this is int4. QuaRot: Ashkboos et al. 2024, arXiv 2404.00456. Queries are rotated instead of the keys that are read,
    and what attention returns instead of the values.
    """

    rotated = True


@register("storage", "k8v4")
class Keys8Values4(Integers):
    """Keys as in int8 and values as in int4: scores suffer more from rounding than sums do.

    `group` (32) is the most elements of a group of a value.
    """

    bits = 6.0
    options: ClassVar[tuple[str, ...]] = ("group",)

    def __init__(
        self,
        role: str,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        group: int = 32,
    ) -> None:
        check_positive("k8v4", "group", group)
        super().__init__(role, shape, dtype, device, *((8,) if role == "keys" else (4, group)))
