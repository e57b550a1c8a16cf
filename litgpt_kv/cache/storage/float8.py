"""Keys and values as numbers of 8 bits with an exponent."""

from __future__ import annotations

import torch
from torch import Tensor

from litgpt_kv.cache.storage.coded import Coded
from litgpt_kv.registry import register


@register("storage", "float8")
class Float8(Coded):
    """float8 (e4m3: 4 bits of exponent, 3 of mantissa), with a float32 scale a token and head.

    Attributes:
        codes: (B, G, S, D) uint8, the bits of float8_e4m3fn, which few operations take as it is.
        scale: (B, G, S, 1): the largest magnitude of a token is 448, the largest of the format.
    """

    bits = 8
    codes: Tensor
    scale: Tensor

    def __init__(self, role: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(role, shape[-1], dtype)
        codes = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes, persistent=False)
        scale = torch.zeros(*shape[:-1], 1, dtype=torch.float32, device=device)
        self.register_buffer("scale", scale, persistent=False)

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        x = x.to(self.exact)
        most = torch.finfo(torch.float8_e4m3fn).max
        scale = (x.abs().amax(dim=-1, keepdim=True) / most).float()
        x = (x / scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp(-most, most)
        self.put(self.codes, slot, x.to(torch.float8_e4m3fn).view(torch.uint8), live)
        self.put(self.scale, slot, scale, live)

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots, dequantised, (B, G, extent, D)."""
        x = self.codes[:, :, :extent].view(torch.float8_e4m3fn).to(self.exact)
        return (x * self.scale[:, :, :extent].to(self.exact)).to(self.dtype)
