"""litgpt's way to call a model: caches attached to the layers, and positions given by the caller.

litgpt's generation, chat, speculative decoding and `LLM` call `model.set_kv_cache(B)` and `model(idx, input_pos)`. Each
position has one slot. A query sees its own position and all earlier ones in its window, no matter when they were
written, so a caller may go back and overwrite positions, as speculative decoding does.

B rows · T new tokens · N cached positions · G key/value heads · D head size · E rotated elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import litgpt.model as base
from litgpt_kv.attention.eager import slot_attention
from litgpt_kv.attention.masks import visible
from litgpt_kv.attention.rope import Angles, rotate
from litgpt_kv.cache import KVCache
from litgpt_kv.cache.pieces import PromptReader
from litgpt_kv.cache.spec import LayerSpec
from litgpt_kv.cache.views import LatentProjection, Pass, SequenceView
from litgpt_kv.config import shown
from litgpt_kv.model import attention, block, gpt, latent


class BuildsKVCache:
    """A mixin with `build_kv_cache`, which litgpt's code calls on attention modules."""

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> base.KVCache:
        """Build this layer's cache for `GPT.set_kv_cache`."""
        return dense_cache(self, batch_size, max_seq_length, device, dtype)


class CausalSelfAttention(BuildsKVCache, attention.CausalSelfAttention):
    """Our attention, with litgpt's `build_kv_cache`."""


class MultiheadLatentAttention(BuildsKVCache, latent.MultiheadLatentAttention):
    """Our latent attention, with litgpt's `build_kv_cache`: `k` has the rotary parts, `v` the latents."""


class Block(block.Block):
    """Our block, with these attention modules."""

    attention = CausalSelfAttention
    latent_attention = MultiheadLatentAttention


class GPT(gpt.GPT):
    """`litgpt_kv.model.GPT` with litgpt's `set_kv_cache` and `model(idx, input_pos)`, for litgpt's own code."""

    block = Block

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | PromptReader | Tensor | None = None,
        length: Tensor | int | None = None,
        lm_head_chunk_size: int = 0,
        *,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Return the logits of the tokens `idx` (B, T) int64, with our arguments or with litgpt's.

        Args:
            idx, cache, length, lm_head_chunk_size: See `litgpt_kv.model.GPT.forward`.
            input_pos, input_pos_maxp1: litgpt's arguments, after `set_kv_cache`: the positions (T,) or (B, T) of the
                tokens, and the largest position plus one. As in litgpt, they may be passed by position instead of
                `cache` and `length`. The logits are then (B, T, V).
        """
        if isinstance(cache, Tensor):
            if input_pos is not None:
                raise ValueError("Pass either a cache, which counts positions itself, or input_pos, not both.")
            input_pos_maxp1 = length if input_pos_maxp1 is None else input_pos_maxp1
            input_pos, cache, length = cache, None, None
        if input_pos is None:
            return super().forward(idx, cache, length, lm_head_chunk_size)
        if cache is not None:
            raise ValueError("Pass either a cache, which counts positions itself, or input_pos, not both.")
        if not isinstance(idx, Tensor):
            raise TypeError(f"Tokens must be a tensor of shape (B, T), got {shown(idx)}.")
        if idx.dim() != 2:
            raise ValueError(f"Tokens must have shape (B, T), got {tuple(idx.shape)}.")
        step = attached_pass(self, idx, input_pos, input_pos_maxp1)
        x = self.embed(idx)
        for layer, view in zip(self.transformer.h, step.views):
            x = layer(x, view)
        x = self.transformer.ln_f(x)
        if lm_head_chunk_size > 0:
            return [self.head(part) for part in x.split(lm_head_chunk_size, dim=1)]
        return self.head(x)  # (B, T, V)

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Give every layer a cache for `model(idx, input_pos)`; other calls do not need it.

        Args:
            batch_size: The most rows of a pass.
            max_seq_length: The number of positions; None: the model's `max_seq_length`.
            rope_cache_length: Ignored.
            device, dtype: The device and dtype of the buffers; None: those of each layer.
        """
        size = self.max_seq_length if max_seq_length is None else max_seq_length
        for layer in self.transformer.h:
            layer.attn.kv_cache = layer.attn.build_kv_cache(batch_size, size, device=device, dtype=dtype)
        device = self.transformer.h[0].attn.kv_cache.k.device
        # litgpt reads only its shape and device, so it has one byte
        self.mask_cache = torch.ones((), dtype=torch.bool, device=device).expand(1, 1, size, size)


def dense_cache(
    attn: nn.Module,
    batch_size: int,
    max_seq_length: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> base.KVCache:
    """Build litgpt's cache module for a layer: buffers `k` (B, G, N, D) and `v`, by default in the layer's dtype.

    A sliding-window layer keeps every position, too. litgpt's ring buffer loses positions that the first queries of a
    block still need, and those that a caller who goes back needs.
    """
    spec: LayerSpec = attn.spec
    weight = next(attn.parameters())
    device = weight.device if device is None and weight.device.type != "meta" else device
    dtype = weight.dtype if dtype is None and weight.is_floating_point() else dtype
    shape = batch_size, spec.groups, max_seq_length
    return base.KVCache((*shape, spec.key_size), (*shape, spec.value_size), device=device, dtype=dtype)


@dataclass(eq=False)
class AttachedView:
    """The attached cache of one layer in one pass.

    Attributes:
        spec: The layer. store: Its cache. angles: The angles of the new tokens. pos: (B or 1, T), their positions.
        mask: (B, 1, T, extent), the positions that they see; None for a whole prompt, which attends to itself.
        extent: Only positions below it are read.
    """

    spec: LayerSpec
    store: base.KVCache
    angles: Angles
    pos: Tensor
    mask: Tensor | None
    extent: int
    last: Tensor | None = None
    observer: Callable[[Tensor], None] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, projection: LatentProjection | None = None) -> Tensor:
        spec = self.spec
        rotated_q, rotated_k = (rotate(x, self.angles, spec.rope_size) for x in (q, k))
        self._write("k", rotated_k.detach())
        self._write("v", v.detach())
        if self.mask is None:
            return SequenceView(spec, self.angles, observer=self.observer).attend(q, k, v, projection)
        if self.observer is not None:
            self.observer(rotated_q)
        keys, values = (buffer[: k.size(0), :, : self.extent] for buffer in (self.store.k, self.store.v))
        if projection is not None:
            rotated_q = projection.absorb(rotated_q)
            values = nn.functional.pad(values, (0, 1), value=1.0) if projection.bias else values
        y, _ = slot_attention(rotated_q, keys, values, self.mask, scale=spec.scale, softcap=spec.softcap)
        if projection is not None:
            y = projection.output(y[..., : spec.value_size])
        return y.transpose(1, 2)  # (B, T, H, Dv)

    def _write(self, name: str, x: Tensor) -> None:
        buffer = getattr(self.store, name)
        if buffer.dtype != x.dtype:  # mixed precision: use the activations' dtype, as litgpt does
            buffer = buffer.to(x.dtype)
            setattr(self.store, name, buffer)
        if self.pos.size(0) == 1:
            buffer[: x.size(0)].index_copy_(2, self.pos[0].to(x.device), x)
        else:
            buffer[: x.size(0)].scatter_(2, self.pos.to(x.device)[:, None, :, None].expand(x.shape), x)


def attached_pass(model: GPT, idx: Tensor, input_pos: Tensor, end: int | None) -> Pass:
    """Prepare a pass over the attached caches; angles and masks are computed once for each device and window.

    Raises:
        TypeError: If `set_kv_cache` was not called. ValueError: If tokens, positions and cache do not fit together.
    """
    B, T = idx.shape
    if input_pos.dim() not in (1, 2):
        raise ValueError(f"input_pos must have 1 or 2 dimensions, input_pos.shape = {tuple(input_pos.shape)}")
    if input_pos.size(-1) != T:
        raise ValueError(f"input_pos.shape[-1] = {input_pos.size(-1)} != {T} = idx.shape[1], must be the same")
    if input_pos.dim() == 2 and input_pos.size(0) != B:
        raise ValueError(f"input_pos has {input_pos.size(0)} rows, the tokens have {B}.")
    modules = [layer.attn for layer in model.transformer.h]
    stores = [attn.kv_cache for attn in modules]
    if any(store is None for store in stores):
        raise TypeError("You need to call `gpt.set_kv_cache()`")
    rows, size = stores[0].k.size(0), stores[0].k.size(2)
    if B > rows:
        raise ValueError(f"The cache has {rows} rows, the tokens have {B}: call set_kv_cache({B}).")
    extent = size if end is None else end
    if max(extent, T) > size:
        raise ValueError(
            f"Positions in 'input_pos' must be in [0,{size}), the size of the cache, not up to "
            f"{max(extent, T) - 1}: call set_kv_cache with more."
        )
    pos, rope = input_pos.view(-1, T), model.rope()
    is_prompt = T > 1 and not torch.compiler.is_compiling() and _from_start(pos, stores)
    if is_prompt and T > model.max_seq_length:
        raise ValueError(f"Cannot forward {T} tokens, the model's context is {model.max_seq_length}.")
    shared, views = {}, []
    for attn, store, table in zip(modules, stores, rope.which):
        device, window, mask = store.k.device, attn.spec.window, None
        if (device, table) not in shared:
            shared[device, table] = tuple(_rows(x, pos).to(device) for x in rope.tables[table])
        if not is_prompt and (device, "mask", window) not in shared:
            seen = visible(pos.to(device), torch.arange(extent, device=device), window)  # (B or 1, T, extent)
            shared[device, "mask", window] = seen.expand(B, -1, -1)[:, None]
        if not is_prompt:
            mask = shared[device, "mask", window]
        views.append(AttachedView(attn.spec, store, shared[device, table], pos, mask, extent))
    return Pass(views, False)


def _from_start(pos: Tensor, stores: list[base.KVCache]) -> bool:
    """Return whether the tokens are a whole prompt on one device, which can attend to itself without cache and mask."""
    if any(store.k.device != pos.device for store in stores):
        return False
    return bool((pos == torch.arange(pos.size(1), device=pos.device)).all())


def _rows(table: Tensor, pos: Tensor) -> Tensor:
    """Return the rows of a rope table (N, E) at pos (B or 1, T); a position outside the table raises an error."""
    return table.index_select(0, pos.reshape(-1).to(table.device)).view(*pos.shape, -1)
