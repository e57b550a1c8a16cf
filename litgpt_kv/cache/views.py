"""What a model's attention calls: one view a layer, for training, for a prefill, or for decoding.

`view.attend(q, k, v)` takes unrotated queries, keys and values and returns what attention makes of them. Rotation,
masks, writing, eviction and statistics are the view's business; the model knows none of them.

B rows · T new tokens · H query heads · G key/value heads · P sets of kept tokens · N keys attended to · D head size ·
Dv width of a value · C embedding size · E rotated elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from litgpt_kv.attention.causal import causal_attention, queries_at
from litgpt_kv.attention.rope import Angles, RopeTables, rotate, rows_at
from litgpt_kv.cache.layer import LayerCache, PrefillMetadata, prompt_statistics
from litgpt_kv.cache.readers import FreshTokens
from litgpt_kv.cache.reread import HeldPrompt, Rereading
from litgpt_kv.cache.row_clock import RowClock
from litgpt_kv.cache.slots import Slots
from litgpt_kv.cache.spec import LayerSpec
from litgpt_kv.cache.strategies.base import Tokens
from litgpt_kv.cache.table import Table


class LatentProjection(Protocol):
    """What multi-head latent attention brings to `attend`: how latents become keys and values, or queries meet them."""

    def expand(self, q: Tensor, k: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head, (B, H, T, .), from rotated q (B, H, T, E + K), k (B, 1, T, E)."""

    def absorb(self, q: Tensor) -> Tensor:
        """Queries (B, H, T, E + K) as they meet keys and latents side by side: (B, H, T, E + R), one wider with
        `bias`."""

    def output(self, y: Tensor) -> Tensor:
        """From latents (B, H, T, R) that attention returned to values of every head, (B, H, T, Dv)."""

    @property
    def bias(self) -> bool:
        """Whether the last element of an absorbed query is added to its scores."""


class LayerView(Protocol):
    """One layer's part of a pass."""

    last: Tensor | None
    """(B,) the only tokens whose output is wanted, or None for all."""
    observer: Callable[[Tensor], None] | None
    """Called with the rotated queries (B, H, T, D) of the wanted outputs; litgpt's adapters attend with them, too."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: LatentProjection | None = None) -> Tensor:
        """Attention of new tokens.

        Args:
            q: (B, H, T, D) unrotated queries. k: (B, G, T, D) unrotated keys. v: (B, G, T, Dv) values.
            latent: With multi-head latent attention, where q has its rotary part first, k is the rotary key that all
                heads share, and v the latent.

        Returns:
            (B, T, H, Dv), or (B, 1, H, Dv) for the `last` tokens alone.
        """


@dataclass(eq=False)
class SequenceView:
    """A whole sequence attends to itself: in training, or as a prompt of which a layer's cache keeps something.

    Attributes:
        spec: The layer. angles: Of the positions from 0 on.
        last, observer: See `LayerView`.
        layer, step: Of a prefill: the layer's cache, and what its group shares.
        rereading: Of a prefill whose prompts are read twice.
    """

    spec: LayerSpec
    angles: Angles
    last: Tensor | None = None
    observer: Callable[[Tensor], None] | None = None
    layer: LayerCache | None = None
    step: PrefillMetadata | None = None
    rereading: Rereading | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: LatentProjection | None = None) -> Tensor:
        spec = self.spec
        rotated_q, rotated_k = (rotate(x, self.angles, spec.rope_size) for x in (q, k))
        queries, keys, values = (rotated_q, rotated_k, v) if latent is None else latent.expand(rotated_q, rotated_k, v)
        wanted = queries if self.last is None else queries_at(queries, self.last)
        if self.observer is not None:
            self.observer(wanted)
        math = {"scale": spec.scale, "softcap": spec.softcap, "window": spec.window}
        sums = self.layer is not None and "mass" in self.layer.want
        y, lse = causal_attention(wanted, keys, values, **math, last=self.last, with_lse=sums)
        if self.layer is not None and self.step is not None:
            length = self.step.length
            received = prompt_statistics(self.layer, queries.detach(), keys.detach(), length, lse)
            if latent is not None and self.layer.window:
                rotated_q, q = latent.absorb(rotated_q), latent.absorb(q)
            # detached: the cache must not keep the autograd graph alive
            tensors = (x.detach() for x in (rotated_k, k, v, rotated_q, q))
            fresh = FreshTokens(spec, *tensors, length, self.layer.window, constants=self.layer.constants)
            if self.rereading is None:
                self.layer.seed(self.step, fresh, received)
            else:
                self.rereading.hold(self.layer, self.step, HeldPrompt(keys.detach(), values.detach(), fresh, received))
        return y.transpose(1, 2)  # (B, T, H, Dv)


@dataclass(eq=False)
class DecodeMetadata:
    """What a group of layers shares in a decode step, worked out once.

    Attributes:
        slots: The group's.
        pos: (B, T) positions of the new tokens. prompt_length: (B,).
        slot: (L, B, P, g * T) the slots that they take.
        key_pos: (L, B, P, N) positions of the keys attended to.
        mask: (L, B, P, ., N) of each layer as `slot_attention` takes it; None where every query sees every key.
        owner: (L, B, P, N) heads of a pool that these keys belong to; None without pools.
        live: (B,) rows that take their tokens; None: all.
        extent: Slots from here on are empty.
        received: By name, of each layer the attention that slots received.
        entered: Of each layer the strategy's own statistics of the new tokens.
    """

    slots: Slots
    pos: Tensor
    prompt_length: Tensor
    slot: Tensor
    key_pos: Tensor
    owner: Tensor | None
    mask: Tensor | None
    live: Tensor | None
    extent: int
    received: dict[str, list[Tensor]] = field(default_factory=dict)
    entered: list[Mapping[str, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class DecodeView:
    """New tokens enter the cache and attend to what it keeps. Kernels read the attributes.

    Attributes:
        layer: The layer's storages. step: Its group's part of the step.
        angles: Of the new queries and keys.
        sinks: Angles of queries for the sinks, and where these are, (B, P, n); None: sinks are like other tokens.
        tables: Rope tables for keys that are stored unrotated, else None.
        ranks: (L, B, P, N) positions inside the cache of keys that are stored unrotated, else None.
        new_key_angles: Angles of the new keys, where those of the queries are a head's.
        mask, key_angles, sink_queries, extent, per_group, value_padding: For the kernel.
    """

    layer: LayerCache
    step: DecodeMetadata
    angles: Angles
    sinks: tuple[Angles, Tensor] | None = None
    tables: Angles | None = None
    ranks: Tensor | None = None
    new_key_angles: Angles | None = None
    last: Tensor | None = None
    observer: Callable[[Tensor], None] | None = None
    key_angles: Angles | None = None
    sink_queries: tuple[Tensor, Tensor] | None = None
    value_padding: bool = False

    @property
    def spec(self) -> LayerSpec:
        return self.layer.spec

    @property
    def extent(self) -> int:
        return self.step.extent

    @property
    def mask(self) -> Tensor | None:
        return None if self.step.mask is None else self.step.mask[self.layer.stack_index]

    @property
    def per_group(self) -> int:
        return self.layer.spec.heads // self.layer.spec.groups

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: LatentProjection | None = None) -> Tensor:
        layer, step = self.layer, self.step
        spec, size = layer.spec, layer.spec.rope_size
        if layer.stores_unrotated or q.size(-1) != k.size(-1):
            rotated_q = rotate(q, self.angles, size)
            rotated_k = k if layer.stores_unrotated else rotate(k, self.angles, size)
        else:  # together: a step of a small model is bound by the number of operators
            both = rotate(torch.cat((q, k), dim=1), self.angles, size)
            rotated_q, rotated_k = both.split((q.size(1), k.size(1)), dim=1)
        if self.observer is not None:
            self.observer(rotated_q)
        if self.sinks is not None:
            part = q if latent is None else q[..., :size]
            self.sink_queries = rotate(part, self.sinks[0], size), self.sinks[1]
        if self.ranks is not None:
            self.key_angles = rows_at(self.tables, self.ranks[layer.stack_index])
        if latent is not None:
            rotated_q, q = latent.absorb(rotated_q), latent.absorb(q) if layer.ring is not None else q
            self.value_padding = latent.bias
        keys, values = self._write(rotated_k.detach(), v.detach(), rotated_k, v)
        y, received = layer.kernel.attend(rotated_q, keys, values, self, layer.want)
        for name, mass in received.items():
            step.received.setdefault(name, []).append(self._at_slots(mass.detach()))
        if layer.ring is not None:
            layer.ring.write((q if layer.stores_unrotated else rotated_q).detach(), step.pos, step.live)
        if step.slots.enters:
            step.entered.append(self._entered(k.detach(), v.detach()))
        if latent is not None:
            y = latent.output(y[..., : spec.value_size])
        return y.transpose(1, 2)  # (B, T, H, Dv)

    def _write(self, k: Tensor, v: Tensor, *fresh: Tensor) -> tuple:
        """Write the new tokens; the storages to attend to.

        One token finds the slots as they are after it is written. A block is attended to beside what was there before
        it, as its first queries may still see what its last tokens evict.
        """
        layer, step = self.layer, self.step
        slot = step.slot[layer.stack_index]
        stores = layer.keys, layer.values
        if step.pos.size(1) > 1:
            both = zip(stores, fresh)
            beside = tuple(_Tensors(torch.cat((s.read(step.extent).to(x.dtype), layer.by_set(x)), 2)) for s, x in both)
        layer.keys.write(slot, layer.by_set(k), step.live)
        layer.values.write(slot, layer.by_set(v), step.live)
        return beside if step.pos.size(1) > 1 else stores

    def _at_slots(self, mass: Tensor) -> Tensor:
        """The mass (B, P, N) of the keys attended to, by their slots afterwards."""
        step, layer = self.step, self.layer
        if step.pos.size(1) == 1:
            return mass
        old, new = mass[..., : step.extent], mass[..., step.extent :]
        every = torch.nn.functional.pad(old, (0, step.slots.size - step.extent))
        slot = step.slot[layer.stack_index].expand(-1, mass.size(1), -1)
        return every.scatter(-1, slot, new)

    def _entered(self, k: Tensor, v: Tensor) -> Mapping[str, Tensor]:
        """The strategy's own statistics of the new tokens."""
        layer, step, slots = self.layer, self.step, self.step.slots
        sets = slots.pos.size(2) * slots.heads
        pos = step.pos.unsqueeze(1).expand(-1, sets, -1)
        zeros = torch.zeros_like(pos, dtype=slots.dtype)
        turned = rotate(k, self.new_key_angles or self.angles, layer.spec.rope_size)
        fresh = FreshTokens(layer.spec, turned, k, v, k, k, step.pos[:, -1] + 1, 0, constants=layer.constants)
        now = step.pos[:, -1]
        return slots.strategy.enter(
            Tokens(pos, now, step.prompt_length, layer.spec, dict.fromkeys(slots.names, zeros), fresh)
        )


@dataclass(eq=False)
class _Tensors:
    """Keys or values as a kernel reads them, not in a storage."""

    data: Tensor
    lossless: bool = True

    def read(self, extent: int) -> Tensor:
        return self.data


@dataclass(eq=False)
class Pass:
    """One call of the model.

    Attributes:
        views: One a layer.
        last_only: Whether only the last token of each row has an output.
        rereading: The second reading of the tokens, before `commit`; None: there is none.
    """

    views: list
    last_only: bool
    rereading = None  # no field: only a prefill has one

    def commit(self) -> None:
        """Note a pass that went well; called once, after the last layer."""


def training_pass(specs: list[LayerSpec], T: int, rope: RopeTables) -> Pass:
    """A pass over sequences of T tokens without a cache."""
    angles = rope.slice(0, T)
    return Pass([SequenceView(spec, angles[table]) for spec, table in zip(specs, rope.which)], False)


@dataclass(eq=False)
class PrefillPass(Pass):
    """A prefill between `begin` and `commit`.

    Attributes:
        clock: The rows' counters. length: (B,) tokens of the prompts, `lengths` the same on the host.
        steps: Of each group of layers.
    """

    clock: RowClock
    length: Tensor
    lengths: list[int]
    steps: list[PrefillMetadata]
    rereading: Rereading | None = None

    def commit(self) -> None:
        end_prefill(self.clock, self.steps, self.length, self.lengths)


def end_prefill(clock: RowClock, steps: Sequence[PrefillMetadata], length: Tensor, lengths: Sequence[int]) -> None:
    """Seed layers that choose together, and note that prompts of `length` (B,), on the host `lengths`, were read."""
    for g, step in enumerate(steps):
        if isinstance(step.slots, Table):
            for row, sizes in enumerate(step.slots.seed_rows(step, lengths)):
                clock.set_sizes(g, row, sizes)
    clock.pos.copy_(length)
    fills = [[min(n, step.slots.plan.slots) for n in lengths] for step in steps]
    clock.end(dict(enumerate(lengths)), fills)


def begin_prefill(
    clock: RowClock,
    groups: Sequence[Slots],
    layers: Sequence[LayerCache],
    group_of: Sequence[int],
    T: int,
    length: Tensor,
    lengths: list[int],
    rope: RopeTables,
) -> PrefillPass:
    """Prepare to seed empty rows with prompts of `length` (B,) tokens, padded on the right to T."""
    clock.set_prompt_lengths({row: max(n, clock.prompt(row)) for row, n in enumerate(lengths)})
    clock.begin(range(len(lengths)))
    steps = [PrefillMetadata.of(slots, length, T) for slots in groups]
    angles = rope.slice(0, T)
    views = [
        SequenceView(layer.spec, angles[t], layer=layer, step=steps[g])
        for layer, g, t in zip(layers, group_of, rope.which)
    ]
    own, longest = [steps[g] for g in group_of], max(lengths)
    chunks = [s.slots.strategy.chunk for s in own if s.slots.strategy.rereads and longest > s.slots.plan.slots]
    rereading = Rereading(layers, own, rope, length, longest, max(chunks)) if chunks else None
    for view in views:
        view.rereading = rereading
    views[-1].last = length.to(layers[-1].device) - 1  # all the others' outputs make keys and values
    return PrefillPass(views, True, clock, length, lengths, steps, rereading)
