"""Write tokens into slots, in place whether a step is compiled or not."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter(buffer: Tensor, dim: int, index: Tensor, x: Tensor) -> None:
    """Do `buffer.scatter_(dim, index, x)`, where only `dim` of the buffer is larger than `index`.

    Args:
        buffer: Of any shape and dtype. dim: The dimension of slots.
        index: int64. x: Of the shape of `index`, in the buffer's dtype.
    """
    if (
        torch.compiler.is_compiling()
    ):  # inductor (torch 2.13) copies the buffer twice for scatter_, never for index_put_
        dims = buffer.dim()
        where = [torch.arange(n, device=index.device).view(-1, *[1] * (dims - d - 1)) for d, n in enumerate(x.shape)]
        where[dim] = index
        buffer.index_put_(tuple(where), x)
        return
    if buffer.is_floating_point() and buffer.element_size() == 2:  # torch 2.13 scatters 16-bit floats slowly (CPU)
        buffer, x = buffer.view(torch.int16), x.contiguous().view(torch.int16)
    buffer.scatter_(dim, index, x)
