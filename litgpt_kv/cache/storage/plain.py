"""How keys and values are stored: a storage is a fixed buffer of slots with `write` and `read`. Floor 1.

B rows · G key/value heads · S slots · T tokens · D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from litgpt_kv.registry import register


@register("storage", "plain")
class Plain(nn.Module):
    """Keys or values as they are, in the model's dtype. Unused slots hold zeros."""

    def __init__(self, batch_size: int, groups: int, slots: int, width: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        data = torch.zeros(batch_size, groups, slots, width, dtype=dtype, device=device)
        self.register_buffer("data", data, persistent=False)

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        """Puts x (B, G, T, D) into the slots (B, P, T), P being G or 1. The slots of a head must differ.

        With `live` (B,), rows where it is False keep what they have.
        """
        index, x = slot.unsqueeze(-1).expand(x.shape), x.to(self.data.dtype)
        if live is not None:
            x = torch.where(live.view(-1, 1, 1, 1), x, self.data.gather(2, index))
        self.data.scatter_(2, index, x)

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots, (B, G, extent, D), as a view."""
        return self.data[:, :, :extent]

    def reset(self, rows: Tensor | slice) -> None:
        """Zeroes rows: what a masked slot holds must be finite."""
        self.data[rows] = 0
