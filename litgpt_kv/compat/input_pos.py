"""The cache that litgpt's own code knows: attached to the layers, indexed by the caller's positions. Floor 3.

`model.set_kv_cache(B)` and `model(idx, input_pos)` are what litgpt's generation, chat, speculative decoding and `LLM`
are written in. A slot is a position; a query sees what is at its own position and before, in its window, whoever wrote
it and when, so that a caller may go back and write again, as speculative decoding does.

B rows · T new tokens · N cached positions · G key/value heads · D head size · E rotated elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

import litgpt.model as base
from litgpt_kv.attention.rope import Angles, visible
from litgpt_kv.cache.layer import Turn
from litgpt_kv.config import LayerFacts

if TYPE_CHECKING:
    from litgpt_kv.cache.kv_cache import KVCache


def dense_cache(
    attn: nn.Module,
    batch_size: int,
    max_seq_length: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> base.KVCache:
    """litgpt's cache module for a layer: buffers `k` (B, G, N, D) and `v`, on the layer's device and in its dtype.

    A sliding-window layer keeps every position as well: litgpt's ring loses what the first queries of a block, or a
    caller who goes back, still need.
    """
    facts: LayerFacts = attn.facts
    weight = next(attn.parameters())
    device = weight.device if device is None and weight.device.type != "meta" else device
    dtype = weight.dtype if dtype is None and weight.is_floating_point() else dtype
    shape = batch_size, facts.groups, max_seq_length
    return base.KVCache((*shape, facts.key_size), (*shape, facts.value_size), device=device, dtype=dtype)


def attach(model: base.GPT, batch_size: int, max_seq_length: int, **where: Any) -> Tensor:
    """Gives every layer its cache. Returns what `mask_cache` is: a shape and a device, one byte and no mask."""
    for block in model.transformer.h:
        block.attn.kv_cache = block.attn.build_kv_cache(batch_size, max_seq_length, **where)
    device = model.transformer.h[0].attn.kv_cache.k.device
    return torch.ones((), dtype=torch.bool, device=device).expand(1, 1, max_seq_length, max_seq_length)


@dataclass(eq=False)
class Place:
    """Where a pass is, for the layers of one device and window."""

    kept: ClassVar[tuple] = ()  # nothing is chosen: no layer ranks its prompt
    pos: Tensor  # (B or 1, T)
    extent: int  # positions from here on are not looked at
    mask: Tensor  # (1, B, 1, T, N)


class AttachedLayer:
    """A layer's attached cache with the methods of a `LayerCache`."""

    raw: ClassVar[bool] = False
    observes: ClassVar[int] = 0
    place: ClassVar[int] = 0

    def __init__(self, store: base.KVCache) -> None:
        self.store = store

    def seed(self, step: Place, q: Tensor, k: Tensor, v: Tensor, mass: None) -> None:
        for name, x in (("k", k), ("v", v)):
            buffer = getattr(self.store, name)
            if buffer.dtype != x.dtype:  # under mixed precision; litgpt's, too, takes the activations' dtype
                buffer = buffer.to(x.dtype)
                setattr(self.store, name, buffer)
            if step.pos.size(0) == 1:
                buffer[: x.size(0)].index_copy_(2, step.pos[0], x.detach())
            else:
                buffer[: x.size(0)].scatter_(2, step.pos[:, None, :, None].expand(x.shape), x.detach())

    def extend(self, step: Place, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        self.seed(step, q, k, v, None)
        return tuple(buffer[: k.size(0), :, : step.extent] for buffer in (self.store.k, self.store.v))


class Attached:
    """One pass over the attached caches, with the methods of a `KVCache` that the model calls."""

    def __init__(self, model: base.GPT, idx: Tensor, input_pos: Tensor, end: int | None) -> None:
        B, T = self.batch_size, self.tokens = idx.shape
        if input_pos.dim() not in (1, 2):
            raise ValueError(f"input_pos must have 1 or 2 dimensions, input_pos.shape = {tuple(input_pos.shape)}")
        if input_pos.size(-1) != T:
            raise ValueError(f"input_pos.shape[-1] = {input_pos.size(-1)} != {T} = idx.shape[1], must be the same")
        if input_pos.dim() == 2 and input_pos.size(0) != B:
            raise ValueError(f"input_pos has {input_pos.size(0)} rows, the tokens have {B}.")
        self.stores = [block.attn.kv_cache for block in model.transformer.h]
        if any(store is None for store in self.stores):
            raise TypeError("You need to call `gpt.set_kv_cache()`")
        rows, size = self.stores[0].k.size(0), self.stores[0].k.size(2)
        if B > rows:
            raise ValueError(f"The cache has {rows} rows, the tokens have {B}: call set_kv_cache({B}).")
        self.extent = size if end is None else end
        if max(self.extent, T) > size:
            raise ValueError(
                f"Positions in 'input_pos' must be in [0,{size}), the size of the cache, not up to "
                f"{max(self.extent, T) - 1}: call set_kv_cache with more."
            )
        self.pos = input_pos.view(-1, T)
        self.windows = [block.attn.facts.window for block in model.transformer.h]
        self.fresh = T > 1 and not torch.compiler.is_compiling() and self._from_start()

    @classmethod
    def of(
        cls,
        model: base.GPT,
        idx: Tensor,
        cache: KVCache | Tensor | None,
        length: Tensor | int | None,
        input_pos: Tensor | None,
        end: int | None,
    ) -> Attached:
        """The pass that a caller means who gave `input_pos` by name or as the `cache`."""
        if cache is not None and input_pos is not None:
            raise ValueError("Pass a cache, which counts by itself, or input_pos, not both.")
        return cls(model, idx, cache if input_pos is None else input_pos, length if end is None else end)

    def _from_start(self) -> bool:
        """Whether this is a whole prompt on one device: it then needs no cache and no mask to attend to itself."""
        here = self.pos.device
        if any(store.k.device != here for store in self.stores):
            return False
        return bool((self.pos == torch.arange(self.tokens, device=here)).all())

    def begin_prompt(self, T: int, length: None, angles: list[Angles], tables: list[int]) -> list[Turn]:
        step = Place(self.pos, self.extent, None)
        return [Turn(AttachedLayer(store), step, angles[t]) for store, t in zip(self.stores, tables)]

    def begin(self, T: int, rope: list[Angles], tables: list[int]) -> list[Turn]:
        """Angles and masks are made once for each device, as a model may be spread over several."""
        steps: dict[tuple, Place] = {}
        angles: dict[tuple, Angles] = {}
        turns = []
        for store, table, window in zip(self.stores, tables, self.windows):
            device = store.k.device
            if (device, table) not in angles:
                angles[device, table] = tuple(_rows(x, self.pos).to(device) for x in rope[table])
            if (device, window) not in steps:
                pos = self.pos.to(device)
                mask = visible(pos, torch.arange(self.extent, device=device), window)  # (B or 1, T, N)
                mask = mask.expand(self.batch_size, -1, -1)[None, :, None]
                steps[device, window] = Place(pos, self.extent, mask)
            turns.append(Turn(AttachedLayer(store), steps[device, window], angles[device, table]))
        return turns


def _rows(table: Tensor, pos: Tensor) -> Tensor:
    """Rows of a rope table (S, E) at pos (B or 1, T); a position outside of it is an error."""
    return table.index_select(0, pos.reshape(-1).to(table.device)).view(*pos.shape, -1)
