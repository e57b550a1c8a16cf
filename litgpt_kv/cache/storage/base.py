"""The base of all storages.

B rows · G key/value heads (or pools of them) · S slots · T tokens · D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Storage(nn.Module):
    """A fixed buffer of slots for the keys or the values of one layer. Empty slots read as finite numbers.

    A subclass makes its buffers in `__init__(role, shape, dtype, device, **options)`, where `role` is "keys" or
    "values", `shape` is (B, G, S, D) and `dtype` that of the model; it implements `write` and `read`.

    Attributes:
        lossless: Whether what is read equals what was written to the bit.
        bits: Bits of a stored number, scales left out; None: those of the model's dtype.
        options: Names of the keyword arguments that users may set.
    """

    row_dim: ClassVar[int] = 0
    lossless: ClassVar[bool] = True
    bits: ClassVar[float | None] = None
    options: ClassVar[tuple[str, ...]] = ()

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        """Put tokens into slots.

        Args:
            slot: (B, P, T) int64, P being G or 1. The slots of a head must differ.
            x: (B, G, T, D) keys or values.
            live: (B,) bool; rows where it is False keep what they have. None: all are written.
        """
        raise NotImplementedError

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots, (B, G, extent, D)."""
        raise NotImplementedError

    def reset(self, rows: Tensor | slice) -> None:
        """Zero rows: what a masked slot holds must be finite."""
        for buffer in self.buffers():
            buffer[rows] = 0

    @staticmethod
    def put(buffer: Tensor, slot: Tensor, x: Tensor, live: Tensor | None) -> None:
        """Write x (B, G, T, n) into the slots (B, P, T) of a buffer (B, G, S, n), in the buffer's dtype."""
        index, x = slot.unsqueeze(-1).expand(x.shape), x.to(buffer.dtype)
        if live is not None:
            x = torch.where(live.view(-1, 1, 1, 1), x, buffer.gather(2, index))
        buffer.scatter_(2, index, x)
