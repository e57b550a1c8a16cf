"""The base of all storages.

B rows · G key/value heads (or pools of them) · P sets of slots, G or 1 · S slots · T tokens · D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Storage(nn.Module):
    """A fixed buffer of slots for the keys or the values of one layer. Empty slots read as finite numbers.

    A subclass makes its buffers in `__init__(role, shape, dtype, device, **options)`, where `role` is "keys" or
    "values", `shape` is (B, G, S, D) and `dtype` that of the model; it implements `write` and `read`. Rows are the
    first dimension of every buffer.

    A storage that can multiply what it holds without reading it first also has `products` and `sums` (see
    `litgpt_kv.attention.eager.Factors`) and `sets`; the kernel "products" then uses them.

    Attributes:
        lossless: Whether what is read equals what was written to the bit.
        bits: Bits of a stored number, scales left out; None: those of the model's dtype. The mean over keys and values
            where they differ; an instance says its own.
        in_order: Whether tokens may only leave in the order in which they came (but for a beginning that stays), one
            at a time. Strategies that score by recency do that; the cache refuses others by name.
        divisible: Whether some of its slots are a storage, too: slots are the third dimension of every buffer. If not,
            layers cannot share one (`select` "model").
        needs_accelerator: Whether it makes sense beside a processor only, and is refused for a model on the CPU.
        capturable: Whether a compiled step, or a CUDA graph, can contain its work. A storage that waits for copies
            between devices cannot; static caches refuse it by name.
        options: Names of the keyword arguments that users may set.
    """

    row_dim: ClassVar[int] = 0
    lossless: ClassVar[bool] = True
    bits: float | None = None
    in_order: ClassVar[bool] = False
    divisible: ClassVar[bool] = True
    needs_accelerator: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ()

    @property
    def device(self) -> torch.device:
        """Where it takes tokens from and gives them to."""
        return next(self.buffers()).device

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        """Put tokens into slots.

        Args:
            slot: (B, P, T) int64. The slots of a head must differ.
            x: (B, G, T, D) keys or values.
            live: (B,) bool, False for rows that keep what they have; or, for prompts, (B, P, T) bool, False for pads,
                whose slots are empty and stay so. None: all are written.
        """
        raise NotImplementedError

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots, (B, G, extent, D)."""
        raise NotImplementedError

    def reset(self, rows: Tensor | slice) -> None:
        """Zero rows: what a masked slot holds must be finite."""
        for buffer in self.buffers():
            buffer[rows] = 0

    def before(self, following: Storage) -> None:
        """Learn the storage of the same role of the layer that comes next; called once, when a cache is built."""

    def changed(self) -> None:
        """Learn that buffers were written from outside: nothing that was read before is true."""

    def check(self) -> None:
        """Raise ValueError if the buffers, read from a file, hold what reading them cannot take."""

    @staticmethod
    def put(buffer: Tensor, slot: Tensor, x: Tensor, live: Tensor | None) -> None:
        """Write x (B, G, T, n) into the slots (B, P, T) of a buffer (B, G, S, n), in the buffer's dtype."""
        index, x = slot.unsqueeze(-1).expand(x.shape), x.to(buffer.dtype)
        if live is not None and live.dim() == 3:  # of a prompt, whose pads leave their slots as they are: empty
            x = x.masked_fill(~live.unsqueeze(-1), 0)
        elif live is not None:
            x = torch.where(live.view(-1, 1, 1, 1), x, buffer.gather(2, index))
        scatter(buffer, 2, index, x)


def scatter(buffer: Tensor, dim: int, index: Tensor, x: Tensor) -> None:
    """Do `buffer.scatter_(dim, index, x)`, where only `dim` of the buffer is larger than `index`.

    A compiled step uses `index_put_`: inductor (torch 2.13) copies the whole buffer for `scatter_`. Eagerly that takes
    12 microseconds more a call, so it is not used there.

    Args:
        buffer: Of any shape and dtype. dim: The dimension of slots.
        index: int64. x: Of the shape of `index`, in the buffer's dtype.
    """
    if torch.compiler.is_compiling():
        dims = buffer.dim()
        where = [torch.arange(n, device=index.device).view(-1, *[1] * (dims - d - 1)) for d, n in enumerate(x.shape)]
        where[dim] = index
        buffer.index_put_(tuple(where), x)
        return
    if buffer.is_floating_point() and buffer.element_size() == 2:  # torch 2.13 scatters 16-bit floats slowly (CPU)
        buffer, x = buffer.view(torch.int16), x.contiguous().view(torch.int16)
    buffer.scatter_(dim, index, x)
