"""A decode step recorded as a CUDA graph: the host starts all of its kernels at once.

B rows · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache


def can_record(cache: KVCache) -> bool:
    """Whether the steps of a static cache can be recorded: it is on an NVIDIA GPU."""
    return cache.pos.is_cuda


class CudaGraph:
    """Record one step of a static cache, and run it again and again.

    Recording runs nothing. A graph is right as long as the cache's buffers and the model's weights stay where they are,
    and for the `evicting` and `read_length` with which it was recorded.

    Args:
        step: Decodes tokens (B, 1) on a cache. It has run before, so that all kernels are loaded.
        token: (B, 1) int64, of the right shape and device.
        cache: A static cache that `can_record`.
        pool: Memory that several graphs share, from `torch.cuda.graph_pool_handle`: only one of them runs at a time.
    """

    def __init__(
        self, step: Callable[[Tensor, KVCache], Tensor], token: Tensor, cache: KVCache, pool: tuple[int, int]
    ) -> None:
        self._token, self._graph = token.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.device(token.device), torch.cuda.graph(self._graph, pool=pool):
            self._logits = step(self._token, cache)

    def __call__(self, token: Tensor) -> Tensor:
        """Decode tokens (B, 1) on the cache: logits (B, 1, V)."""
        self._token.copy_(token)
        self._graph.replay()
        return self._logits.clone()  # the next graph overwrites them
