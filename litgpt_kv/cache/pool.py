"""Pools: heads that compete for shared slots (AdaKV's idea, Feng et al. 2024, arXiv 2407.11550, while decoding too).

A pool has one set of slots, each with an `owner` head; each head is sure of its protected tokens and of its best ones
up to `floor`, and beyond that the lowest score anywhere in the pool leaves.

P pools of a layer · g heads of a pool · G = P * g heads · N slots of a pool, or tokens · `...` rows and layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_head(x: Tensor, owner: Tensor, heads: int, empty: float) -> Tensor:
    """What each head owns: (..., P, N) to (..., G, N), `empty` where another head does."""
    own = owner.unsqueeze(-2) == torch.arange(heads, device=owner.device).unsqueeze(-1)  # (..., P, g, N)
    return torch.where(own, x.unsqueeze(-2), x.new_full((), empty)).flatten(-3, -2)


def of_owner(x: Tensor, owner: Tensor, heads: int) -> Tensor:
    """The value of each slot's own head: (..., G, N) to (..., P, N)."""
    return x.unflatten(-2, (-1, heads)).gather(-2, owner.unsqueeze(-2)).squeeze(-2)


def secure(worth: Tensor, pos: Tensor, floor: int, comparable: bool) -> Tensor:
    """Worth (..., G, N) that can be compared within a pool: what a head is sure of is infinite.

    `worth` has infinity for protected tokens and minus infinity for what is gone. Scores that are not comparable are
    divided by their head's sum.
    """
    if not comparable:
        finite = worth.masked_fill(worth.isinf(), 0.0)
        worth = torch.where(worth.isinf(), worth, worth / finite.sum(dim=-1, keepdim=True))
    if floor == 0:
        return worth
    earliest_first = pos.argsort(dim=-1, stable=True)
    best_first = earliest_first.gather(
        -1, worth.gather(-1, earliest_first).argsort(dim=-1, descending=True, stable=True)
    )
    first = torch.arange(pos.size(-1), device=pos.device) < floor
    sure = torch.zeros_like(pos, dtype=torch.bool).scatter_(-1, best_first, first.expand(pos.shape))
    return worth.masked_fill(sure & (worth > float("-inf")), float("inf"))


def worst_first(worth: Tensor, pos: Tensor, owner: Tensor, heads: int, floor: int, comparable: bool) -> Tensor:
    """Slots of each pool in the order in which they would leave: lowest worth, then latest position, then higher head.

    Args:
        worth: (..., G, N), a row for each head. pos, owner: (..., P, N).

    Returns:
        (..., P, N) slot numbers.
    """
    worth = secure(worth, per_head(pos, owner, heads, -1), floor, comparable)
    worth = of_owner(worth, owner, heads)  # (..., P, N)
    last_first = (pos * heads + owner).argsort(dim=-1, descending=True, stable=True)
    return last_first.gather(-1, worth.gather(-1, last_first).argsort(dim=-1, stable=True))


def best(worth: Tensor, pos: Tensor, heads: int, size: int, floor: int, comparable: bool) -> Tensor:
    """The tokens of prompts that a pool keeps.

    Args:
        worth, pos: (B, G, T), a row for each head; -1 is the position of a pad. size: Slots of a pool.

    Returns:
        (B, P, min(size, g * T)) indices into the pool's tokens, head by head, in ascending order.
    """
    worth = secure(worth, pos, floor, comparable).unflatten(1, (-1, heads))  # (B, P, g, T)
    T = pos.size(-1)
    number = torch.arange(heads, device=pos.device).unsqueeze(-1)
    order = torch.arange(T, device=pos.device) * heads + number  # earlier positions, then lower heads, are better
    first_first = order.flatten().argsort().expand(*worth.shape[:2], heads * T)
    worth = worth.flatten(2, 3)
    best_first = first_first.gather(-1, worth.gather(-1, first_first).argsort(dim=-1, descending=True, stable=True))
    return best_first[..., :size].sort(dim=-1).values
