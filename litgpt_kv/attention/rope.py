"""Rotary positions: tables, angles beyond the tables, and the rotation itself.

B rows · H heads · P sets of kept tokens (1, or one a key/value head) · T tokens · N table length · D head size ·
E rotated elements (two where litgpt rotates a single one).

Angles are a pair (cos, sin) whose sin has the sign of the rotation folded in (`signed`), so that a rotation is two
products and a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]  # cos, signed sin


@dataclass(eq=False)
class RopeTables:
    """A model's tables: a pair of (N, E) for each rope base (and device), and `which` of them each layer uses."""

    tables: list[Angles]
    which: list[int]

    def slice(self, start: int, stop: int) -> list[Angles]:
        """The rows of the positions `start` to `stop` - 1 of every pair, (1, T, E)."""
        return [(cos[start:stop].unsqueeze(0), sin[start:stop].unsqueeze(0)) for cos, sin in self.tables]


def signed(sin: Tensor, size: int) -> Tensor:
    """Negate the part of sin (..., E) that meets the second half of a pair; `size` elements are rotated."""
    first = sin.size(-1) - size // 2
    return torch.cat((-sin[..., :first], sin[..., first:]), dim=-1)


def rows_at(tables: Angles, pos: Tensor) -> Angles:
    """Rows of the tables (N, E) at integer positions: `pos` (...) gives a pair of (..., E).

    Positions must lie inside the tables; that is checked before a step, not here. An empty slot (-1) gives the first
    row, and the next position of a retired row, which may be one too large, the last: neither is ever attended to.
    """
    cos, sin = tables
    flat = pos.clamp(0, cos.size(0) - 1).reshape(-1)
    shape = (*pos.shape, cos.size(-1))
    return cos.index_select(0, flat).view(shape), sin.index_select(0, flat).view(shape)


def theta_of(tables: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """What one position turns, (E,) float64, and the amplitudes (E,) of cos and signed sin (YaRN's are not 1).

    The tables must be float32 or float64: a rounded angle is wrong by radians a thousand positions on.
    """
    cos, sin = tables
    if cos.device.type == "mps":  # which has no float64
        cos, sin = cos.cpu(), sin.cpu()
    angle = torch.atan2(sin[1].abs(), cos[1]).double()
    amplitude = cos[0].double().clone()
    # the angle of one position is below pi, so its sine is positive and the sign is the rotation's
    return angle, amplitude, torch.where(sin[1] < 0, -amplitude, amplitude)


def angles_at(theta: tuple[Tensor, Tensor, Tensor], pos: Tensor, dtype: torch.dtype) -> Angles:
    """As `rows_at`, beyond the tables too: `theta` of `theta_of` and `pos` (...) give a pair of (..., E) of `dtype`.

    The angle is multiplied in float64, where a position of 10^9 still has seven exact digits; float32 loses the angle
    near 10^6.
    """
    per_position, cos_size, sin_size = theta
    angle = pos.to(per_position.device).double().unsqueeze(-1) * per_position
    return tuple(x.to(dtype).to(pos.device) for x in (angle.cos() * cos_size, angle.sin() * sin_size))  # type: ignore[return-value]


def rotate(x: Tensor, angles: Angles, size: int) -> Tensor:
    """Rotate the first `size` elements of x (B, H, T, D); the rest passes.

    Args:
        x: Queries or keys. Pairs are the elements (i, i + size/2), litgpt's layout.
        angles: Pair of (B or 1, T, E), or of (B, P, T, E).
        size: E, but for 1, which litgpt widens to two elements (D grows by one); so does this.

    Returns:
        (B, H, T, D), the numbers of litgpt's `apply_rope` to the bit.
    """
    if size == 0:
        return x
    cos, sin = angles
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    whole = size == x.size(-1)
    head = x if whole else x[..., :size]
    rotated = (head * cos + head.roll(-(size // 2), -1) * sin).to(x.dtype)
    return rotated if whole else torch.cat((rotated, x[..., size:]), dim=-1)


def unrotate(x: Tensor, angles: Angles, size: int) -> Tensor:
    """Turn back what `rotate` turned; an amplitude other than 1 (YaRN) is divided out."""
    if size == 0:
        return x
    cos, sin = angles
    square = cos * cos + sin * sin
    return rotate(x, (cos / square, -sin / square), size)


def deinterleave(x: Tensor, size: int) -> Tensor:
    """Move the first `size` elements of x (..., D), interleaved pairs, to litgpt's layout of pairs (i, i + size/2).

    Done once, before `rotate`: cached keys need no second permutation.
    """
    head = x[..., :size].unflatten(-1, (size // 2, 2)).transpose(-1, -2).flatten(-2)
    return torch.cat((head, x[..., size:]), dim=-1)
