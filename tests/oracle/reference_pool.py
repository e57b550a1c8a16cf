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
        room = oracle.dealt.get(layer, size * policy.budget)
        over = held + size * new - room
        if over <= 0:
            continue
        count = max(over, size * policy.interval) if new else over
        candidates = [c for h in heads for c in insecure(oracle, layer, h, now, new, scores[h])]
        # lowest score first, then the latest position, then the higher head
        for _, p, h in sorted(candidates, key=lambda c: (c[0], -c[1], -c[2]))[:count]:
            kept[h].remove(p)


def deal_out(oracle: Any, now: int) -> None:
    """After a prompt: what all layers with `select` "model" keep together, and so how many slots each has from now on.

    The slots of the model are dealt out to the best tokens of all layers and heads. Every head is sure of what is
    protected and of its best tokens, as many as are needed to go on: its floor or what is protected, if that is more,
    and the `interval` that leaves at once. Layers of other settings or windows are dealt out among themselves.
    """
    kinds: dict[str, list[int]] = {}
    for layer, policy in enumerate(oracle.policies):
        if policy.select == "model" and policy.scored:
            kinds.setdefault(f"{policy} {oracle.window(layer)}", []).append(layer)
    for layers in kinds.values():
        deal_out_among(oracle, layers, now)


def deal_out_among(oracle: Any, layers: list[int], now: int) -> None:
    """`deal_out` for layers of one kind."""
    candidates, held, room = [], 0, 0
    for layer in layers:
        policy, kept = oracle.policies[layer], oracle.kept[layer]
        if len(kept[0]) <= policy.budget:
            return
        sure = max(int(policy.floor * policy.budget), policy.sinks + policy.recent) + policy.interval
        for head, scores in enumerate(oracle.scores(layer, now, True)):
            candidates += [(w, p, layer, h) for w, p, h in insecure(oracle, layer, head, now, 0, scores, sure)]
            held, room = held + len(kept[head]), room + policy.budget
    # lowest score first, then the latest position, then the later layer and head
    for _, p, layer, head in sorted(candidates, key=lambda c: (c[0], -c[1], -c[2], -c[3]))[: held - room]:
        oracle.kept[layer][head].remove(p)
    for layer in layers:
        oracle.dealt[layer] = sum(len(head) for head in oracle.kept[layer])


def insecure(
    oracle: Any, layer: int, head: int, now: int, new: int, scores: dict[int, float], sure_of: int | None = None
) -> list[tuple[float, int, int]]:
    """(score, position, head) of tokens that may leave: neither protected nor among the best of a head."""
    policy = oracle.policies[layer]
    sure_of = int(policy.floor * policy.budget) if sure_of is None else sure_of
    worth = {p: policy.worth(p, now, scores.get(p, 0.0), oracle.horizon(layer)) for p in oracle.kept[layer][head]}
    best_first = sorted(worth, key=lambda p: (-worth[p], p))
    sure = {p for p in best_first[: max(0, sure_of - new)] if worth[p] > -math.inf}
    return [(w, p, head) for p, w in worth.items() if p not in sure and w < math.inf]
