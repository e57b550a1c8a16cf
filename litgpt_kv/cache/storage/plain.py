"""Keys and values as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from litgpt_kv.cache.storage.base import Storage
from litgpt_kv.registry import register


@register("storage", "plain")
class Plain(Storage):
    """Keys or values as they are, in the model's dtype."""

    def __init__(self, role: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("data", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        self.put(self.data, slot, x, live)

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots, (B, G, extent, D), as a view."""
        return self.data[:, :, :extent]
