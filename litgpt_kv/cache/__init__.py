"""The cache: strategies, storages, slots, layers, and `KVCache`, which joins them."""

from litgpt_kv.cache import storage, strategies
from litgpt_kv.cache.kv_cache import KVCache

__all__ = ["KVCache", "storage", "strategies"]
