"""Build a cache for a model."""

from __future__ import annotations

from typing import Any

import torch

from litgpt_kv.cache import door, serialize
from litgpt_kv.cache.constants import connect
from litgpt_kv.config import KVCacheArgs


def build_cache(
    cls: Any,
    model: Any,
    args: KVCacheArgs | str | None,
    batch_size: int,
    max_tokens: int | None,
    dtype: torch.dtype | None,
    static: bool,
) -> Any:
    """Do the work of `KVCache.build`."""
    context = model.max_seq_length
    max_tokens = context if max_tokens is None else max_tokens
    args = door.check_build("dense" if args is None else args, batch_size, max_tokens)
    own = args if model.sharing is None else door.own_pools(args, *model.sharing.groups_and_devices)
    devices = [next(block.attn.proj.parameters()).device for block in model.transformer.h]
    dtype = dtype or model.transformer.wte.weight.dtype
    with torch.inference_mode(False):  # tensors made inside could not be used outside of it
        size = lambda: cls.nbytes(model.config, own, batch_size, max_tokens, dtype)  # noqa: E731
        with door.refused_without_memory(size, batch_size):
            cache = cls(model.config, own, batch_size, max_tokens, context, dtype, devices, static)
        cache.args = args
        cache.fingerprint = serialize.fingerprint(model)
        connect(cache, model)
        return cache
