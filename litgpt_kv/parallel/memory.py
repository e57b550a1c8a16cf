"""Memory a device, computed from shapes: nothing is allocated, no device is needed."""

from __future__ import annotations

from functools import partial

import torch

from litgpt.config import Config
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel.heads import divide_heads
from litgpt_kv.parallel.sequential import SequentialGPT, layer_devices
from litgpt_kv.parallel.tensor import local_config, slice_parameter

META = torch.device("meta")


def weight_bytes(config: Config, strategy: str, devices: int, dtype: torch.dtype) -> list[int]:
    """Bytes of each device's parameters and rope tables.

    Raises:
        ValueError: If the model cannot be divided so.
    """
    if strategy == "sequential":
        layer_devices(config.n_layer, devices)  # refuses before the model is made
    with META:
        model = SequentialGPT(config, [META] * devices) if strategy == "sequential" else GPT(config)
    tables = model.cos.nbytes + model.sin.nbytes
    sizes = {name: weight.numel() * dtype.itemsize for name, weight in model.state_dict().items()}
    if strategy == "data_parallel":
        return [sum(sizes.values()) + tables] * devices
    if strategy == "sequential":
        model.devices = [torch.device("meta", d) for d in range(devices)]
        held = [tables] * devices
        for name, size in sizes.items():
            held[model.device_of(name).index] += size
        return held
    state = model.state_dict()
    shares = enumerate(divide_heads(config, devices))
    slices = [partial(slice_parameter, config, heads, rank, devices, True) for rank, heads in shares]
    return [
        tables + dtype.itemsize * sum(slice_of(name, weight).numel() for name, weight in state.items())
        for slice_of in slices
    ]


def cache_bytes(
    config: Config, strategy: str, devices: int, args: KVCacheArgs, batch_size: int, max_tokens: int, dtype: torch.dtype
) -> list[int]:
    """Bytes of each device's part of a cache, as `KVCache.nbytes` counts them."""
    if strategy == "tensor_parallel":
        parts = [local_config(config, heads) for heads in divide_heads(config, devices)]
        return [KVCache.nbytes(part, args, batch_size, max_tokens, dtype)["total"] for part in parts]
    if strategy == "data_parallel":  # rows are divided
        rows = -(-batch_size // devices)
        return [KVCache.nbytes(config, args, rows, max_tokens, dtype)["total"]] * devices
    where = layer_devices(config.n_layer, devices)
    on = [torch.device("meta", d) for d in where]  # layers of one device share their slots
    cache = KVCache(config, args, batch_size, max_tokens, config.block_size, dtype, on)
    held = [0] * devices
    for device, layer in zip(where, cache.layers):
        held[device] += sum(buffer.nbytes for buffer in layer.buffers())
    for slots in cache.slots:
        held[where[slots.layers[0].index]] += sum(buffer.nbytes for buffer in slots.buffers())
    held[0] += sum(buffer.nbytes for buffer in cache.clock.buffers())
    return held
