"""One decode step: what all layers of a group share is worked out once, before the first layer runs.

L layers of a group · B rows · T new tokens · P sets of kept tokens · g heads of a pool · S slots of a set ·
N keys attended to (S, or S + T for a block) · H query heads · R query heads a group · E rotated elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt_kv.attention.masks import cache_positions, visible
from litgpt_kv.attention.rope import Angles, RopeTables, angles_at, rows_at
from litgpt_kv.cache import pool
from litgpt_kv.cache.layer import LayerCache
from litgpt_kv.cache.readers import StoredTokens
from litgpt_kv.cache.row_clock import RowClock
from litgpt_kv.cache.slots import Slots
from litgpt_kv.cache.views import DecodeMetadata, DecodeView, LatentProjection, Pass


@dataclass(eq=False)
class DecodePass(Pass):
    """A decode step between `begin` and `commit`.

    Attributes:
        clock: The rows' counters. tokens: New tokens a row, T.
        steps: One a group of layers. layers: Of each group.
        seen: By row what it has seen afterwards. fills: Of each group what its rows hold afterwards.
    """

    clock: RowClock
    tokens: int
    steps: list[DecodeMetadata]
    layers: list[list[LayerCache]]
    tables: list[Angles]
    seen: dict[int, int]
    fills: list[list[int]]

    def commit(self) -> None:
        """Note statistics and counters of a step that went well."""
        for step, layers, tables in zip(self.steps, self.layers, self.tables):
            slots, live = step.slots, step.live
            for name, masses in step.received.items():
                received = torch.stack(masses)  # (L, B, P, n)
                slots.add_received(name, received if slots.owner is not None else slots.per_set(received), live)
            if step.entered and step.entered[0]:
                slots.enter_own(step.entered, step.slot, live)
            if slots.updates:
                now = step.pos[:, -1]
                readers = stored_tokens(slots, layers, now, tables) if slots.strategy.needs else ()
                slots.update_own(now, step.prompt_length, readers, live)
        self.clock.pos.add_(self.clock.live, alpha=self.tokens)
        if not self.clock.static:
            self.clock.end(self.seen, self.fills)


@dataclass(eq=False)
class RowsPass(Pass):
    """A decode step of rows that are stepped one by one: their layers have different sizes."""

    passes: list[Pass]

    @classmethod
    def of(cls, passes: list[Pass]) -> Pass:
        """The passes of single rows as one; of a single row its own."""
        if len(passes) == 1:
            return passes[0]
        return cls([RowsView(list(views)) for views in zip(*(one.views for one in passes))], False, passes)

    def commit(self) -> None:
        for one in self.passes:
            one.commit()


@dataclass(eq=False)
class RowsView:
    """One layer of all rows; `views` has that of each row."""

    views: list[DecodeView]
    last: Tensor | None = None
    observer: Callable[[Tensor], None] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: LatentProjection | None = None) -> Tensor:
        seen: list[Tensor] = []
        out = []
        for b, view in enumerate(self.views):
            view.observer = None if self.observer is None else seen.append
            out.append(view.attend(*(x[b : b + 1] for x in (q, k, v)), latent))
        if self.observer is not None:
            self.observer(torch.cat(seen))
        return torch.cat(out)


def begin_decode(
    clock: RowClock,
    groups: Sequence[Slots],
    layers: Sequence[LayerCache],
    group_of: Sequence[int],
    theta: Sequence[tuple[Tensor, Tensor, Tensor]],
    T: int,
    rope: RopeTables,
    evicting: bool,
    fill_of: Sequence[int] | None = None,
    read_length: int | None = None,
) -> DecodePass:
    """Make room for T new tokens a row, and work out slots, masks and angles.

    Args:
        clock: The rows' counters. groups: The slots of each group of layers.
        fill_of: Of each group, the number of the group by which the clock knows how full it is; None: its own.
        layers: Of the model. group_of: The group of each. theta: Of each rope base, for positions beyond the tables.
        rope: The model's tables.
        evicting, read_length: In static mode, whether rows may be full, and how many first slots are read (`KVCache`).
    """
    pos = clock.pos.unsqueeze(1)
    if T > 1:
        pos = pos + torch.arange(T, device=pos.device)  # (B, T)
    members: list[list[LayerCache]] = [[] for _ in groups]
    tables: list[Angles] = [rope.tables[0]] * len(groups)
    for layer, g, t in zip(layers, group_of, rope.which):
        members[g].append(layer)
        tables[g] = rope.tables[t]
    if not clock.static:
        clock.begin(row for row, alive in enumerate(clock.alive) if alive)
    steps, fills = [], {}
    for g, slots in enumerate(groups):
        known_as = g if fill_of is None else fill_of[g]
        fill = [] if clock.static else clock.fill(known_as)
        after = [] if clock.static else fill_after(slots, fill, clock.alive, T)
        steps.append(_group_step(clock, slots, members[g], tables[g], pos, fill, after, evicting, read_length))
        fills[known_as] = after
    angles: dict[tuple[int, int], dict] = {}
    views = []
    for layer, g, t in zip(layers, group_of, rope.which):
        if (g, t) not in angles:
            angles[g, t] = _angles(steps[g], rope.tables[t], theta[t] if theta else None, T)
        shared = angles[g, t]
        if steps[g].slots.owner is not None and layer.stores_unrotated:
            shared = shared | _pool_angles(steps[g], layer, rope.tables[t], T)
        views.append(DecodeView(layer, steps[g], **shared))
    seen = {} if clock.static else {row: n + T for row, n in enumerate(clock.seen) if clock.alive[row]}
    return DecodePass(views, False, clock, T, steps, members, tables, seen, list(fills.values()))


def read_length_for(tokens: int) -> int:
    """The read length for rows that hold so many tokens, which changes rarely: each is a graph of a compiled model.

    512 and 1,024; from there on four steps from each power of two to the next, so at most a quarter is read in vain.
    """
    if tokens <= 1024:
        return 512 if tokens <= 512 else 1024
    step = 1 << ((tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step


def fill_after(slots: Slots, fill: Sequence[int], alive: Sequence[bool], T: int) -> list[int]:
    """Tokens that a set of each row holds after a step; a full one loses `interval` tokens, or what a block needs."""
    size, interval = slots.plan.slots, slots.plan.interval

    def after(n: int) -> int:
        return n + T if n + T <= size else n + T - max(interval, n + T - size)

    return [after(n) if live else n for n, live in zip(fill, alive)]


def stored_tokens(slots: Slots, layers: Sequence[LayerCache], now: Tensor, tables: Angles) -> list[StoredTokens]:
    """What the layers of a group hold, for strategies that read keys."""
    owner = slots.owner
    return [
        StoredTokens(
            layer.spec,
            (layer.keys, layer.values),
            layer.ring,
            slots.pos[layer.stack_index],
            None if owner is None else owner[layer.stack_index],
            slots.heads,
            now,
            tables,
            layer.stores_unrotated,
            slots.plan.window,
            layer.constants,
        )
        for layer in layers
    ]


def _group_step(
    clock: RowClock,
    slots: Slots,
    layers: list[LayerCache],
    tables: Angles,
    pos: Tensor,
    fill: list[int],
    after: list[int],
    evicting: bool,
    read_length: int | None,
) -> DecodeMetadata:
    plan, T, device = slots.plan, pos.size(1), slots.pos.device
    pos, prompt_length = pos.to(device), clock.prompt_length.to(device)
    alive = [] if clock.static else clock.alive
    live = None if not clock.static and all(alive) else clock.live.to(device)
    full = evicting if clock.static else any(n + T > plan.slots for n, a in zip(fill, alive) if a)
    old = slots.pos.clone() if T > 1 and plan.exact_blocks and plan.strategy.evicts else None
    if full and plan.strategy.evicts:
        now = pos[:, 0] - 1
        readers = stored_tokens(slots, layers, now, tables) if plan.strategy.needs else ()
        slot = slots.make_room(slots.score(now, prompt_length, readers), pos[:, -1], prompt_length, T, live)
    else:
        slot = slots.free_slots(T)
    window, sinks, owner = plan.window, 0, slots.owner
    if T == 1:
        slots.write_positions(slot, pos, live)
        static_extent = slots.size if read_length is None else min(slots.size, read_length * slots.heads)
        extent = static_extent if clock.static else _extent(slots, clock.seen, after, T)
        key_pos = slots.pos[..., :extent]
        owner = None if owner is None else owner[..., :extent]
    else:
        extent = slots.size if clock.static or full else _extent(slots, clock.seen, fill, 0)
        if old is not None:  # the first queries of a block still see what its last tokens evict
            window, sinks = min(plan.slots - plan.sinks, window or plan.slots), plan.sinks
        key_pos = torch.cat(((slots.pos if old is None else old)[..., :extent], slots.entering(pos, slot)), dim=-1)
        if owner is not None:
            heads = torch.arange(slots.heads, device=device).repeat_interleave(T).expand(slot.shape)
            owner = torch.cat((owner[..., :extent], heads), dim=-1)
        slots.write_positions(slot, pos, live)
    even = T == 1 and not clock.static and all(alive) and all(n * slots.heads == extent for n in after)
    mask = None
    if not even or slots.owner is not None or (window is not None and (plan.interval > 1 or not plan.strategy.evicts)):
        mask = visible(pos[None, :, None], key_pos, window, sinks)  # (L, B, P, T, N)
        if owner is not None:  # a query sees what its own head owns
            own = owner.unsqueeze(-2) == torch.arange(slots.heads, device=device).unsqueeze(-1)  # (L, B, P, g, N)
            mask = mask.unsqueeze(3) & own.unsqueeze(4)  # (L, B, P, g, T, N)
            R = slots.layers[0].heads // slots.layers[0].groups
            mask = mask.unsqueeze(4).expand(-1, -1, -1, -1, R, -1, -1).flatten(3, 5)  # (L, B, P, g * R * T, N)
    return DecodeMetadata(slots, pos, prompt_length, slot, key_pos, owner, mask, live, extent)


def _extent(slots: Slots, seen: Sequence[int], fill: Sequence[int], new: int) -> int:
    """Slots that may be filled: the first ones, but where several tokens left at once anywhere."""
    size = slots.plan.slots
    most = max(n if n in (tokens + new, size) or slots.plan.interval == 1 else size for n, tokens in zip(fill, seen))
    return slots.size - (size - max(1, most)) * slots.heads


def _angles(step: DecodeMetadata, tables: Angles, theta: tuple[Tensor, Tensor, Tensor] | None, T: int) -> dict:
    """The angles of a `DecodeView`, as the plan's positions ask for them."""
    slots, plan = step.slots, step.slots.plan
    if plan.stores_unrotated:
        if slots.owner is not None:  # every head numbers its own tokens
            ranks = cache_positions(pool.per_head(step.key_pos, step.owner, slots.heads, -1))
            return {"angles": tables, "tables": tables, "ranks": pool.of_owner(ranks, step.owner, slots.heads)}
        ranks = cache_positions(step.key_pos)  # (L, B, P, N)
        # the next slot of a retired row may lie beyond those that are attended to
        own = ranks[..., -T:] if T > 1 else ranks.gather(-1, step.slot.clamp(max=ranks.size(-1) - 1))
        return {"angles": rows_at(tables, own[0, :, 0]), "tables": tables, "ranks": ranks}
    if not plan.endless:
        cos, sin = rows_at(tables, step.pos)
        return {"angles": (cos.unsqueeze(1), sin.unsqueeze(1))}  # (B, 1, T, E): once for all layers
    sinks = None
    if (plan.sinks or plan.keep_prompt) and step.extent + T > slots.size:
        # until something was evicted all distances are the text's own, and among the last tokens they stay so: only
        # sinks, always in the first slots, and kept prompts are nearer than they were
        kept = plan.sinks if not plan.keep_prompt else step.prompt_length.clamp(min=plan.sinks).view(-1, 1, 1)
        first = step.key_pos[0, ..., : plan.sinks if T == 1 and not plan.keep_prompt else None]
        if plan.interval == 1:
            near = step.pos.clamp(max=plan.slots - 1)
        else:
            near = (step.key_pos[0, :, 0] >= 0).sum(-1, keepdim=True) - T + torch.arange(T, device=step.pos.device)
        sinks = rows_at(tables, near), (first >= 0) & (first < kept)
    return {"angles": angles_at(theta, step.pos, tables[0].dtype), "sinks": sinks}


def _pool_angles(step: DecodeMetadata, layer: LayerCache, tables: Angles, T: int) -> dict:
    """Angles of one layer's new tokens where every head of a pool numbers its own ones."""
    heads, spec, i = step.slots.heads, layer.spec, layer.stack_index
    live = pool.per_head(step.key_pos[i], step.owner[i], heads, -1) >= 0
    own = live.sum(dim=-1, keepdim=True) - T + torch.arange(T, device=live.device)  # (B, G, T)
    cos, sin = rows_at(tables, own)
    R = spec.heads // spec.groups
    return {
        "angles": (cos.repeat_interleave(R, dim=1), sin.repeat_interleave(R, dim=1)),  # (B, H, T, E)
        "new_key_angles": (cos, sin),
    }
