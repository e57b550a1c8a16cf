"""One layer's part of a cache and of a pass: seed, extend, observe. Floor 3.

L layers of a group · B rows · T new tokens · S slots (the budget) · N keys attended to (S, or S + T for a block) ·
H query heads · G key/value heads · P sets of kept tokens (1, or G) · D head size · E rotated elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from litgpt_kv.attention.rope import Angles, rows_at
from litgpt_kv.cache.slots import Slots
from litgpt_kv.cache.strategies.base import Seen
from litgpt_kv.config import LayerFacts
from litgpt_kv.registry import register


@dataclass(eq=False)
class PromptStep:
    """A group of layers' part in a prefill, worked out once for all of them."""

    slots: Slots
    length: Tensor  # (B,) real tokens of each row
    kept: tuple[Tensor, Tensor] | None  # indices and positions of what stays, (B, P, n); None: each layer chooses


@dataclass(eq=False)
class DecodeStep:
    """A group of layers' part in decoding, worked out once for all of them."""

    slots: Slots
    pos: Tensor  # (B, T) positions of the new tokens
    slot: Tensor  # (L, B, P, T) the slots that they take
    seen: Tensor  # (L, B, P, N) positions of the keys attended to
    mask: Tensor | None  # (L, B, P, T, N), None where every query sees every key
    live: Tensor | None  # (B,) rows that take their token, None for all
    extent: int  # slots from here on are empty
    entered: list[Tensor] = field(default_factory=list)  # of each layer, the new tokens' ranks
    masses: list[Tensor] = field(default_factory=list)  # of each layer, the attention that slots received


@dataclass(eq=False)
class Turn:
    """One layer's part in a pass: what its attention needs besides the layer's own weights."""

    layer: LayerCache
    step: PromptStep | DecodeStep
    angles: Angles  # for the new queries and keys
    far: tuple[Angles, Tensor] | None = None  # for queries (B, T, E) from inside the cache, at the sinks (B, P, n)
    ranked: tuple[Tensor, Angles] | None = None  # ranks (L, B, P, N) and tables, for keys stored unrotated

    @property
    def mask(self) -> Tensor | None:
        return None if self.step.mask is None else self.step.mask[self.layer.place]

    @property
    def keys(self) -> Angles:
        """Angles (B, P, N, E) of all keys stored unrotated; made for one layer at a time."""
        rank, tables = self.ranked
        return rows_at(*tables, rank[self.layer.place])


@register("cache", "slots")
class LayerCache(nn.Module):
    """Stored keys and values of one layer, and its place in a group's slots."""

    row_dim: ClassVar[int] = 0

    def __init__(self, facts: LayerFacts, slots: Slots, place: int, keys: nn.Module, values: nn.Module, raw: bool):
        super().__init__()
        self.facts, self.place, self.raw = facts, place, raw
        self.keys, self.values = keys, values
        self.observes = slots.strategy.attention

    def seed(self, step: PromptStep, q: Tensor, stored: Tensor, v: Tensor, mass: Tensor | None) -> None:
        """Takes what the strategy keeps of right-padded prompts; pads are never written.

        Args:
            q: (B, H, T, D) the queries, rotated at the tokens' positions.
            stored: (B, G, T, D) the keys as this cache stores them: rotated, or not if `raw`.
            v: (B, G, T, Dv) the values.
            mass: (B, G, T) attention received, for a strategy that observes it.
        """
        slots, rank = step.slots, None
        q, stored, v = q.detach(), stored.detach(), v.detach()  # a cache remembers no graph
        mass = None if mass is None else mass.detach()
        if step.kept is None:
            B, _, T, _ = v.shape
            pos = torch.arange(T, device=v.device).expand(B, slots.pos.size(2), T)
            seen = Seen(pos, step.length - 1, True, self.facts, mass, self._scored(stored, v), v, q)
            rank = slots.prompt_rank(seen)
            index, kept = slots.keep(rank, step.length)
        else:
            index, kept = step.kept
        slots.seed(self.place, index, kept, rank)
        target = torch.arange(index.size(-1), device=v.device).expand(index.shape)
        for buffer, x in ((self.keys, stored), (self.values, v)):
            if x.size(2) > index.size(-1):
                x = x.gather(2, index.unsqueeze(-1).expand(-1, x.size(1), -1, x.size(-1)))  # (B, G, n, D)
            buffer.write(target, x.masked_fill((kept < 0).unsqueeze(-1), 0.0))

    def extend(self, step: DecodeStep, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new tokens (B, G, T, D) into their slots; returns the keys and values (B, G, N, D) to attend to.

        One token finds the slots as they are after it is written. A block is attended to beside what was there
        before it, as its first queries may still see what its last tokens evict.
        """
        slot, T = step.slot[self.place], k.size(2)
        block = T > 1
        if block:
            old = self.keys.read(step.extent), self.values.read(step.extent)
            keys, values = (torch.cat((o.to(n.dtype), n), dim=2) for o, n in zip(old, (k, v)))
        q, k, v = q.detach(), k.detach(), v.detach()  # a cache remembers no graph
        self.keys.write(slot, k, step.live)
        self.values.write(slot, v, step.live)
        if not block:
            keys, values = self.keys.read(step.extent).to(k.dtype), self.values.read(step.extent).to(v.dtype)
        if step.slots.rank is not None:
            pos = step.pos.unsqueeze(1).expand(slot.shape)
            seen = Seen(pos, step.pos[:, -1], False, self.facts, None, self._scored(k, v), v, q)
            step.entered.append(step.slots.strategy.enter(seen))
        return keys, values

    def _scored(self, k: Tensor, v: Tensor) -> Tensor:
        """What queries meet of stored tokens: their keys, and their latents too where there are any."""
        return torch.cat((k, v), dim=-1) if self.facts.latent else k

    def observe(self, step: DecodeStep, mass: Tensor) -> None:
        """Notes the attention (B, G, N) that a pass paid to each key, in the order of its slots afterwards."""
        size, T, mass = step.slots.size, step.pos.size(1), mass.detach()
        if T > 1:  # the block's own keys stand after the slots: bring them to theirs
            old, new = mass[..., : step.extent], mass[..., step.extent :]
            whole = nn.functional.pad(old, (0, size - step.extent))
            mass = whole.scatter(-1, step.slot[self.place].expand(-1, mass.size(1), -1), new)
        elif mass.size(-1) < size:
            mass = nn.functional.pad(mass, (0, size - mass.size(-1)))
        step.masses.append(mass)
