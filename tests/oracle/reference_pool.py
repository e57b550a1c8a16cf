"""What a pool of heads keeps, by loops over tokens; see `litgpt_kv.cache.pool` for what it is compared with."""

from __future__ import annotations

import math
from typing import Any


def evict_pools(oracle: Any, layer: int, now: int, new: int) -> None:
    """Evict from all pools of a layer.

    Args:
        oracle: An `Oracle`.
        now: Position of the newest token. new: Tokens of each head that make room for themselves; 0 after a prompt.
    """
    policy, kept = oracle.policies[layer], oracle.kept[layer]
    size = len(kept) // policy.pools
    scores = oracle.scores(layer, now - new, new == 0)
    for first in range(0, len(kept), size):
        heads = range(first, first + size)
        held = sum(len(kept[h]) for h in heads)
        over = held + size * new - size * policy.budget
        if over <= 0:
            continue
        count = max(over, size * policy.interval) if new else over
        candidates = [c for h in heads for c in insecure(oracle, layer, h, now, new, scores[h])]
        # lowest score first, then the latest position, then the higher head
        for _, p, h in sorted(candidates, key=lambda c: (c[0], -c[1], -c[2]))[:count]:
            kept[h].remove(p)


def insecure(
    oracle: Any, layer: int, head: int, now: int, new: int, scores: dict[int, float]
) -> list[tuple[float, int, int]]:
    """(score, position, head) of tokens that may leave: neither protected nor among the best of a head."""
    policy = oracle.policies[layer]
    worth = {p: policy.worth(p, now, scores.get(p, 0.0), oracle.horizon(layer)) for p in oracle.kept[layer][head]}
    best_first = sorted(worth, key=lambda p: (-worth[p], p))
    sure = {p for p in best_first[: max(0, int(policy.floor * policy.budget) - new)] if worth[p] > -math.inf}
    return [(w, p, head) for p, w in worth.items() if p not in sure and w < math.inf]
