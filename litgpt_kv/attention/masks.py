"""Which tokens a query sees: comparisons of positions, and the only builder of masks.

S slots · T queries. A slot's position is that of its token in the text, -1 while the slot is empty.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(pos: Tensor, slot_pos: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """Say which slots each query may attend to.

    Args:
        pos: Positions of the queries, (..., T) int64.
        slot_pos: Positions of the tokens in the slots, (..., S) int64, -1 for an empty slot.
        window: A query sees this many last positions, its own included; None: all before it.
        sinks: The first so many positions are seen whatever the window.

    Returns:
        Boolean (..., T, S), True where the slot is filled, not in the query's future, and in its window.
    """
    query, key = pos.unsqueeze(-1), slot_pos.unsqueeze(-2)
    seen = (key >= 0) & (key <= query)
    if window is not None:
        seen = seen & ((key > query - window) | (key < sinks))
    return seen


def cache_positions(slot_pos: Tensor) -> Tensor:
    """Number the tokens in the slots in the order of the text.

    Args:
        slot_pos: (..., S) int64 positions, -1 for an empty slot.

    Returns:
        (..., S) int64: 0 to n - 1 for the n filled slots, below 0 for empty ones.
    """
    order = slot_pos.argsort(dim=-1)
    counting = torch.arange(slot_pos.size(-1), device=slot_pos.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, counting)
    return rank - (slot_pos < 0).sum(dim=-1, keepdim=True)
