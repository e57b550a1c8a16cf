"""The cache: strategies, storages, slots, layers, and `KVCache`, which joins them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litgpt_kv.cache import storage, strategies

if TYPE_CHECKING:
    from litgpt_kv.cache.kv_cache import KVCache

__all__ = ["KVCache", "storage", "strategies"]


def __getattr__(name: str) -> Any:
    """Import `KVCache` when it is first used: strategies and storages alone need torch, but not litgpt."""
    if name != "KVCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from litgpt_kv.cache.kv_cache import KVCache

    return KVCache
