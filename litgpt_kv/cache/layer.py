"""One layer's part of a cache: its storages, and how a prompt gets into them.

B rows · T tokens of a prompt · n kept tokens · P sets of kept tokens (1, one a key/value head, or one a pool) · g heads
of a pool · H query heads · G key/value heads · D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from litgpt_kv.attention.causal import received_attention
from litgpt_kv.attention.kernels import choose_kernel
from litgpt_kv.cache.plan import LayerPlan
from litgpt_kv.cache.readers import FreshTokens, QueryRing
from litgpt_kv.cache.slots import Slots
from litgpt_kv.cache.strategies.base import RECEIVED, LayerConstants
from litgpt_kv.cache.table import Table, build_storages
from litgpt_kv.config import KVCacheArgs

Kept = tuple[Tensor, Tensor, Tensor | None]
"""Indices, positions and owners of what stays of prompts, see `Slots.select_prompt`."""


@dataclass(eq=False)
class PrefillMetadata:
    """What a group of layers shares in a prefill.

    Attributes:
        slots: The group's.
        length: (B,) real tokens of each row.
        kept: Indices, positions and owners of what stays (`Slots.select_prompt`); None: each layer chooses.
        held: Where layers choose together (`Table`): each one's cache, prompts and attention received, until all have.
    """

    slots: Slots
    length: Tensor
    kept: Kept | None
    held: list[tuple[LayerCache, FreshTokens, Mapping[str, Tensor]]] = field(default_factory=list)

    @classmethod
    def of(cls, slots: Slots, length: Tensor, T: int) -> PrefillMetadata:
        """For prompts (B, T) of `length` (B,) tokens; where all layers keep the same, it is chosen once."""
        length = length.to(slots.pos.device)
        return cls(slots, length, slots.select_prompt(None, length, T) if slots.strategy.recency else None)


class LayerCache(nn.Module):
    """The storages of one layer, and its place in the slots of its group.

    Attributes:
        spec: The layer. stack_index: Its number in the slots' stack.
        keys, values: Storages; of a layer of a `Table` only in what `Table.part` makes of it.
        ring: The last queries, for a strategy that reads them.
        stores_unrotated: Whether keys are stored unrotated.
        kernel: Decode attention. want: The statistics that it returns.
        constants: What the strategy reads of the model; `KVCache.build` sets it where the strategy needs any.
    """

    def __init__(
        self,
        plan: LayerPlan,
        args: KVCacheArgs,
        slots: Slots,
        stack_index: int,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        spec = self.spec = plan.spec
        self.device, self.stack_index, self.stores_unrotated = device, stack_index, plan.stores_unrotated
        self.heads = slots.heads
        if isinstance(slots, Table):
            keys, values, self.heads = slots.keys, slots.values, spec.groups
        else:
            shape = batch_size, plan.pools or spec.groups, slots.size
            self.keys, self.values = keys, values = build_storages(plan, args, shape, dtype, device)
        self.constants: LayerConstants | None = None
        self.window, self.ring = 0, None
        if "queries" in plan.strategy.needs:
            self.window = plan.strategy.window  # type: ignore[attr-defined]
            width = spec.key_size + (spec.value_size if spec.latent else 0)
            self.ring = QueryRing(batch_size, spec.heads, self.window, width, dtype, device)
        self.kernel = choose_kernel(args.attention, keys, values, device)
        self.reads_tokens = bool(plan.strategy.needs) or slots.enters
        self.needs_unrotated = self.stores_unrotated or "rope" in plan.strategy.needs
        self.want = tuple(name for name in RECEIVED if name in plan.strategy.statistics)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerCache:
        self.device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(fn, recurse)

    def by_set(self, x: Tensor) -> Tensor:
        """Tokens of all heads (B, G, T, D) as the storages hold them: (B, P, g * T, D) with pools, head by head."""
        return x if self.heads == 1 else x.unflatten(1, (-1, self.heads)).flatten(2, 3)

    def seed(self, step: PrefillMetadata, fresh: FreshTokens, received: Mapping[str, Tensor]) -> None:
        """Take what the strategy keeps of right-padded prompts; pads are never written.

        Args:
            step: The group's part of the prefill.
            fresh: The prompt's keys, values and queries.
            received: Attention that each token received, by name, (B, G, T).
        """
        slots, kept, statistics = step.slots, step.kept, {}
        if isinstance(slots, Table):
            step.held.append((self, fresh.held(self.needs_unrotated), received))
            return
        if kept is None:
            score, statistics = self.score_prompt(slots, step.length, fresh, received)
            kept = slots.select_prompt(score, step.length, fresh.v.size(2))
        self.fill(slots, kept, fresh, statistics)

    def fill(self, slots: Slots, kept: Kept, fresh: FreshTokens, statistics: Mapping[str, Tensor]) -> None:
        """Write what stays of prompts, with its statistics, and note their last queries."""
        index, pos, owner = kept
        slots.seed(self.stack_index, index, pos, owner, statistics)
        target = torch.arange(index.size(-1), device=index.device).expand(index.shape)
        keys = fresh.unrotated if self.stores_unrotated else fresh.rotated
        for storage, x in ((self.keys, keys), (self.values, fresh.v)):
            x = self.by_set(x)
            if x.size(2) > index.size(-1) or owner is not None:
                x = x.gather(2, index.unsqueeze(-1).expand(-1, x.size(1), -1, x.size(-1)))  # (B, G, n, D)
            storage.write(target, x, pos >= 0)
        if self.ring is not None:
            self.ring.write(*fresh.last(fresh.raw_q if self.stores_unrotated else fresh.q), None)

    def score_prompt(
        self, slots: Slots, length: Tensor, fresh: FreshTokens, received: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the tokens of prompts are worth, (B, P, T) or (B, G, T), None if all fit; and their statistics."""
        T, sets = fresh.v.size(2), slots.pos.size(2) * self.heads
        statistics = {name: slots.per_set(mass) for name, mass in received.items()}
        pos = torch.arange(T, device=fresh.v.device).expand(fresh.v.size(0), sets, T)
        pos = pos.masked_fill(pos >= length.view(-1, 1, 1), -1)
        zeros = dict.fromkeys(slots.names, torch.zeros_like(pos, dtype=slots.dtype))
        tokens = slots.view(pos, length - 1, length, self.spec, {**zeros, **statistics}, fresh)
        own = slots.strategy.enter(tokens) if slots.enters else {}
        own = {name: slots.own(x) for name, x in own.items()}
        tokens.statistics = {**tokens.statistics, **own}
        return (slots.prompt_score(tokens) if T > slots.plan.slots else None), {**statistics, **own}


def build_layers(
    plans: Sequence[LayerPlan],
    args: KVCacheArgs,
    batch_size: int,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
) -> tuple[list[Slots], list[LayerCache], list[int]]:
    """The slots of each group of layers that keep their books together, each layer's cache, and each layer's group."""
    groups: dict[tuple, list[LayerPlan]] = {}
    for plan in plans:
        groups.setdefault((*plan.stack_key, devices[plan.spec.index]), []).append(plan)
    every, layers, group_of = [], {}, [0] * len(plans)
    for number, group in enumerate(groups.values()):
        device = devices[group[0].spec.index]
        exact = torch.promote_types(dtype, torch.float32)
        specs = tuple(plan.spec for plan in group)
        if group[0].select == "model":
            slots: Slots = Table(group[0], specs, args, batch_size, exact, dtype, device)
        else:
            slots = Slots(group[0], specs, batch_size, exact, device)
        every.append(slots)
        for i, plan in enumerate(group):
            layers[plan.spec.index] = LayerCache(plan, args, slots, slots.stack_index(i), batch_size, dtype, device)
            group_of[plan.spec.index] = number
    if len({devices[plan.spec.index] for plan in plans if plan.select == "model"}) > 1:
        raise ValueError(
            f"select 'model' deals out the slots of all layers, which must be on one device: they are on "
            f"{len(set(devices))}. select 'pool' shares those of each layer, and data_parallel has all layers on each."
        )
    in_order = [layers[i] for i in range(len(plans))]
    for layer, following in pairwise(layer for layer in in_order if hasattr(layer, "keys")):
        layer.keys.before(following.keys)
        layer.values.before(following.values)
    return every, in_order, group_of


def prompt_statistics(
    layer: LayerCache,
    q: Tensor,
    k: Tensor,
    length: Tensor,
    lse: Tensor | None = None,
    start: int = 0,
    final: bool = True,
) -> dict[str, Tensor]:
    """The attention that a prompt's tokens received from the queries q, by the names that the layer's strategy keeps.

    Args:
        q: (B, H, T, D). k: (B, G or H, N, D). length: (B,) tokens of each row.
        lse: (B, H, T) log-sum-exp of each query's scores, where it is known.
        start: Position of the first query. final: Whether the last query of the prompt is among them.

    Returns:
        (B, G, N) each.
    """
    spec, out = layer.spec, {}
    received_by = getattr(layer.kernel, "received_attention", received_attention)
    for name in layer.want if final else [name for name in layer.want if name != "last"]:
        received = received_by(
            q, k, length, -1 if name == "mass" else 1, scale=spec.scale, softcap=spec.softcap, window=spec.window,
            start=start, lse=lse.detach() if lse is not None else None,
        )  # fmt: skip
        out[name] = received.mean(1, keepdim=True) if spec.latent else received
    return out
