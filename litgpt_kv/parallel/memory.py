"""Compute the memory of each device from shapes; nothing is allocated, and no device is needed."""

from __future__ import annotations

from functools import partial

import torch

from litgpt.config import Config
from litgpt_kv.cache.door import check_one_device, own_pools
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.plan import resolve
from litgpt_kv.cache.spec import layer_spec
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel.heads import divide_heads
from litgpt_kv.parallel.sequential import SequentialGPT, layer_devices
from litgpt_kv.parallel.tensor import local_config, slice_parameter

META = torch.device("meta")


def weight_bytes(config: Config, strategy: str, devices: int, dtype: torch.dtype) -> list[int]:
    """Return the bytes of parameters and rope tables on each device.

    Raises:
        ValueError: If the model cannot be divided over so many devices.
    """
    if strategy == "sequential":
        layer_devices(config.n_layer, devices)  # raises before the model is built
    with META:
        model = SequentialGPT(config, [META] * devices) if strategy == "sequential" else GPT(config)
    tables = model.cos.nbytes + model.sin.nbytes
    sizes = {name: weight.numel() * dtype.itemsize for name, weight in model.state_dict().items()}
    if strategy == "data_parallel":
        return [sum(sizes.values()) + tables] * devices
    if strategy == "sequential":
        model.devices = [torch.device("meta", d) for d in range(devices)]
        totals = [tables] * devices
        for name, size in sizes.items():
            totals[model.device_of(name).index] += size
        return totals
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
    """Return the bytes of a cache on each device, as `KVCache.nbytes` counts them."""
    if strategy == "tensor_parallel":
        parts, groups = divide_heads(config, devices), layer_spec(config, 0).groups
        check_one_device(resolve(config, args.resolved(max_tokens), max_tokens, config.block_size), devices)
        args, parts = own_pools(args, groups, devices), [local_config(config, heads) for heads in parts]
        return [KVCache.nbytes(part, args, batch_size, max_tokens, dtype)["total"] for part in parts]
    if strategy == "data_parallel":  # rows are divided
        rows = -(-batch_size // devices)
        return [KVCache.nbytes(config, args, rows, max_tokens, dtype)["total"]] * devices
    index = layer_devices(config.n_layer, devices)
    meta = [torch.device("meta", d) for d in index]  # layers on one device share their slots
    cache = KVCache(config, args, batch_size, max_tokens, config.block_size, dtype, meta)
    totals = [0] * devices
    for device, layer in zip(index, cache.layers):
        totals[device] += sum(buffer.nbytes for buffer in layer.buffers())
    for slots in cache.slots:
        totals[index[slots.layers[0].index]] += sum(buffer.nbytes for buffer in slots.buffers())
    totals[0] += sum(buffer.nbytes for buffer in cache.clock.buffers())
    return totals
