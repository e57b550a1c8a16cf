"""Linear layers for a few rows on a CPU with all its threads.

The CPU library that torch multiplies float32 with runs a product of a few rows on one thread; a decode step is nothing
but such products, and is bound by how fast weights are read. Cut into one piece of the weight a thread they run side by
side: 234 instead of 427 us for one row and 2,048 × 768 on two threads (`litgpt_kv benchmark` shows the whole step).

That library, MKL, uses AVX-512 on Intel's processors only. On AMD's, products of many rows go to oneDNN instead: 512
rows and 1,536 × 576 take 3.5 instead of 8.0 ms on one thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_kv.attention.cpu import prefers_onednn, thread_count

MOST_ROWS = 16  # with more rows the library uses its threads by itself
LEAST_WEIGHTS = 200_000  # smaller ones are over before a second thread has begun
PLAIN = nn.Linear  # itself: a quantizing plugin puts its own class in this name's place while a model is made


class Linear(PLAIN):
    """`nn.Linear`; in inference mode, float32 and float64 on a CPU run as is fastest: few rows on all threads."""

    def forward(self, x: Tensor) -> Tensor:
        weight, pieces = self.weight, thread_count()
        if (
            pieces > 1
            and x.numel() <= MOST_ROWS * weight.size(1)
            and not torch.is_grad_enabled()
            and (torch.compiler.is_compiling() or torch.is_inference_mode_enabled())
            and weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.float64)
            and x.dtype == weight.dtype
            and weight.size(0) % pieces == 0
        ):
            rows = x.reshape(1, -1, weight.size(1)).expand(pieces, -1, -1)  # (threads, rows, in)
            y = torch.bmm(rows, weight.view(pieces, -1, weight.size(1)).mT)  # (threads, rows, out / threads)
            y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        if (
            weight.dtype == x.dtype == torch.float32
            and x.numel() > MOST_ROWS * weight.size(1)
            and torch.is_inference_mode_enabled()
            and weight.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and prefers_onednn()
        ):
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        return F.linear(x, weight, self.bias)


def speed_up(model: nn.Module) -> None:
    """Makes every large plain `nn.Linear` of a model a `Linear`, its parameters and names untouched."""
    for module in model.modules():
        if (
            type(module) is PLAIN and module.weight.numel() >= LEAST_WEIGHTS
        ):  # a quantized or adapted layer keeps its own way
            module.__class__ = Linear  # the modules around it are litgpt's: they cannot be told which class to use
