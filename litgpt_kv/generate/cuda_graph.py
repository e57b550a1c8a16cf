"""A decode step recorded as a CUDA graph: the host starts all of its kernels at once.

B rows · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT


def can_record(model: GPT, cache: KVCache) -> bool:
    """Whether steps can be recorded: without gradients, of a static cache, all on one CUDA device, in one process."""
    device = cache.pos.device
    alone = model.sharing is None and all(layer.device == device for layer in cache.layers)
    return device.type == "cuda" and cache.static and alone and not torch.is_grad_enabled()


def addresses(model: GPT, cache: KVCache) -> tuple[int, ...]:
    """What changes when the weights or the cache's buffers are moved: a graph reads and writes where they were."""
    first = next(model.transformer.h.parameters())
    return cache.clock.host.moves, first.data_ptr(), model.lm_head.weight.data_ptr()


class CudaGraph:
    """Record one step of a static cache, and run it again and again.

    Recording runs nothing. A graph is valid while `addresses` are the same, and for the `evicting`, the `read_length`
    and the inference mode that it was recorded with.

    Args:
        step: Decodes tokens (B, 1) on a cache. It has run with this very tensor, so that nothing is left to compile.
        token: (B, 1) int64; the graph reads it.
        cache: A cache that `can_record`.

    Raises:
        RuntimeError: If the step waits for the device, or does something else that cannot be recorded.
    """

    def __init__(self, step: Callable[[Tensor, KVCache], Tensor], token: Tensor, cache: KVCache) -> None:
        self._graph, device = torch.cuda.CUDAGraph(), token.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            # "thread_local": other threads, those of a server, may use the device meanwhile
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = step(token, cache)

    def __call__(self) -> Tensor:
        """Decode what is in `token`: logits (B, 1, V)."""
        self._graph.replay()
        return self._logits.clone()  # the next run overwrites them
