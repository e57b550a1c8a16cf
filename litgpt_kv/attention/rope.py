"""Positions: angles, rotation, ranks inside the cache, and the only builder of masks. Floor 1.

B rows · P sets of kept tokens (1, or one a key/value head) · T queries · S slots · N table length · E rotated elements.
A slot's position is that of its token in the text, -1 while the slot is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]  # cos, sin


def rows_at(cos: Tensor, sin: Tensor, pos: Tensor) -> Angles:
    """The rows of litgpt's rope table at integer positions: `pos` (...) gives cos, sin (..., E).

    Positions must lie inside the table; that is checked before a step, not here. An empty slot (-1) gives the first
    row and a retired row's next position, which may be one too far, the last: neither is ever attended to.
    """
    flat = pos.clamp(0, cos.size(0) - 1).reshape(-1)
    return tuple(table.index_select(0, flat).view(*pos.shape, *table.shape[1:]) for table in (cos, sin))  # type: ignore[return-value]


def theta_of(cos: Tensor, sin: Tensor) -> Angles:
    """What one position turns, (E,) float64, and the amplitude (E,) of a table (YaRN's is not 1): rows 1 and 0 of it.

    The table must be float32 or float64: a rounded angle is wrong by radians a thousand positions on.
    """
    if cos.device.type == "mps":  # which has no float64
        cos, sin = cos.cpu(), sin.cpu()
    return torch.atan2(sin[1], cos[1]).double(), cos[0].double().clone()


def angles_at(theta: Angles, pos: Tensor, dtype: torch.dtype) -> Angles:
    """As `rows_at`, beyond the table too: `theta` of `theta_of`, `pos` (...), to cos, sin (..., E) of `dtype`.

    The angle is multiplied in float64, where a position of 10^9 still has seven exact digits; float32 loses the angle
    near 10^6.
    """
    per_position, amplitude = theta
    here = pos.device
    angle = pos.to(per_position.device).double().unsqueeze(-1) * per_position
    return tuple((x * amplitude).to(dtype).to(here) for x in (angle.cos(), angle.sin()))  # type: ignore[return-value]


def rotate(x: Tensor, angles: Angles, size: int) -> Tensor:
    """Rotates the first `size` elements of x (B, H, T, D) by cos, sin (B or 1, T, E) or (B, P, T, E); the rest passes.

    Pairs are (i, i + E/2), litgpt's layout, and the arithmetic is its `apply_rope`, so that results are the same to
    the bit. E is `size`, but for `size` 1, which litgpt widens to two elements (D grows by one); so does this.
    """
    if size == 0:
        return x
    cos, sin = (a.unsqueeze(1) if a.dim() == 3 else a for a in angles)
    head, tail = x[..., :size], x[..., size:]
    turned = torch.cat((-head[..., size // 2 :], head[..., : size // 2]), dim=-1)
    rotated = (head * cos + turned * sin).to(x.dtype)
    return torch.cat((rotated, tail), dim=-1) if tail.size(-1) else rotated


def halves(x: Tensor, size: int) -> Tensor:
    """Moves the first `size` elements of x (..., D), interleaved pairs, to litgpt's layout of pairs (i, i + size/2).

    Done once, before `rotate`: cached keys need no second permutation.
    """
    head = x[..., :size].unflatten(-1, (size // 2, 2)).transpose(-1, -2).flatten(-2)
    return torch.cat((head, x[..., size:]), dim=-1)


def ranks(slot_pos: Tensor) -> Tensor:
    """The order of each slot's token among the live ones: (..., S) positions give (..., S) ranks 0..n-1, empty < 0."""
    order = slot_pos.argsort(dim=-1)
    counting = torch.arange(slot_pos.size(-1), device=slot_pos.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, counting)
    return place - (slot_pos < 0).sum(dim=-1, keepdim=True)


def visible(pos: Tensor, slot_pos: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """Which slots each query may attend to; every mask of this library is made here.

    Args:
        pos: Positions of the queries, (..., T).
        slot_pos: Positions of the tokens in the slots, (..., S), -1 for an empty slot.
        window: A query sees this many last positions, its own included; None: all before it.
        sinks: The first so many positions are seen whatever the window.

    Returns:
        Boolean (..., T, S), True where the slot is live, not in the query's future, and in its window.
    """
    query, key = pos.unsqueeze(-1), slot_pos.unsqueeze(-2)
    seen = (key >= 0) & (key <= query)
    if window is not None:
        seen = seen & ((key > query - window) | (key < sinks))
    return seen
