"""Linear layers whose weights are whole numbers of 8 bits, by torch's own operators.

A weight (N, K) is stored as `q` int8 (N, K) and one scale a row (an output channel): `weight ≈ q * scale`. Scales are
bfloat16 because the operator takes them so; they are rounded before the weights are divided by them, so `q * scale` is
the whole error of quantizing. Inputs are rounded to bfloat16, sums are float32, outputs are rounded to bfloat16.

- Up to `MOST_ROWS` rows: `torch._weight_int8pack_mm`, which reads a byte a weight. Its sum for one row does not depend
  on the other rows: a row of a batch equals that row alone, to the bit.
- More rows: `q` becomes bfloat16 without loss (127 needs 7 bits), and a usual product follows. Where the processor has
  no bfloat16 instructions, `q` and the rounded inputs become float32 instead.

The head is the layer whose quantization changes probabilities most: its inputs differ in size by the weights g of the
norm before it, its columns differ as well. It gets a factor a column (an input channel) besides, d = sqrt(g / largest
of the column): `W * d` is quantized, and inputs are divided by d. On SmolLM2-135M this takes the divergence that the
head alone causes from 1.6e-3 to 0.9e-3; in the other layers it makes things no better.

N outputs · K inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.config import Config
from litgpt_kv.model.linear import PLAIN, Linear

MOST_ROWS = 16  # measured: with more, the product with dequantized weights is faster
ALIGNED = 16  # the operator loads 16 inputs at a time from aligned addresses; other sizes end in a segmentation fault
LARGEST = 127
MOST_FACTOR = 100.0  # of a column, above and below their mean
PART = 2**24  # weights that are quantized at a time


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale an output channel, for inference.

    Attributes:
        weight: (N, K) int8. scale: (N,) bfloat16. bias: (N,) in the model's dtype, or None.
        column: (K,), what inputs are multiplied with before they are rounded; None: nothing.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None, device: torch.device, typical: Tensor | None
    ) -> None:
        """Allocate the weights without values.

        Args:
            in_features: K, a multiple of 16. out_features: N.
            bias: (N,); kept as it is.
            device: Of the weights.
            typical: (K,) how large inputs are, relative to each other: then columns get factors. None: they do not.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        size, on = (out_features, in_features), {"device": device}
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.int8, **on), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(size[:1], dtype=torch.bfloat16, **on), requires_grad=False)
        self.typical = typical
        factors = None if typical is None else nn.Parameter(torch.ones(in_features, **on), requires_grad=False)
        self.register_parameter("column", factors)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N), in the dtype of x."""
        column, bias, dtype, size = self.column, self.bias, x.dtype, self.in_features
        rows = x.reshape(-1, size)
        if column is not None:
            rows = rows * column.to(dtype)
        if x.numel() <= MOST_ROWS * size and not (torch.is_grad_enabled() and x.requires_grad):
            if dtype == torch.bfloat16 and not torch.compiler.is_compiling() and rows.storage_offset() % ALIGNED:
                rows = rows.clone()  # compiled models make each layer's inputs anew, at aligned addresses
            rows = rows.to(torch.bfloat16).contiguous()
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).to(dtype)
        else:
            rows, exact = rows.to(torch.bfloat16), _product_dtype(x.device.type)
            y = F.linear(rows.to(exact), self.weight.to(exact)).to(dtype) * self.scale.to(dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias

    def dequantized(self) -> Tensor:
        """The weight that the layer multiplies with, (N, K) float32."""
        weight = self.weight.float() * self.scale.float().unsqueeze(1)
        return weight if self.column is None else weight * self.column.float()

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantize a weight (N, K) of any floating-point dtype on any device into this layer."""
        for name, value in self._quantized(weight).items():
            getattr(self, name).copy_(value)

    def _quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """The parameters by name that stand for a weight (N, K)."""
        if self.typical is None:
            q, scale = quantize_channels(weight)
            return {"weight": q, "scale": scale}
        factors = column_factors(weight, self.typical)
        q, scale = quantize_channels(weight, factors)
        return {"weight": q, "scale": scale, "column": 1 / factors}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Quantize a float weight when it is loaded, so that a model is quantized a layer at a time; int8 stays."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.is_floating_point() and weight.shape == self.weight.shape:
            try:
                made = self._quantized(weight)
            except ValueError as error:
                raise ValueError(f"{prefix}weight cannot be quantized: {error}") from error
            bias = {key: value for key, value in state_dict.items() if key == prefix + "bias"}
            state_dict = {**bias, **{prefix + name: value for name, value in made.items()}}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def column_factors(weight: Tensor, typical: Tensor) -> Tensor:
    """What to multiply the columns of a weight (N, K) with before it is quantized, (K,) float32 with a mean of 1.

    Args:
        weight: Of any floating-point dtype. typical: (K,) how large inputs are, relative to each other.
    """
    largest = weight.abs().amax(dim=0).float()
    wanted = (typical.to(weight.device).float().abs() / largest.clamp(min=1e-30)).sqrt()
    wanted = torch.where((largest > 0) & wanted.isfinite(), wanted, torch.zeros_like(wanted))
    mean = wanted.mean()
    return torch.where(mean > 0, wanted / mean, torch.ones_like(wanted)).clamp(1 / MOST_FACTOR, MOST_FACTOR)


@torch.no_grad()
def quantize_channels(weight: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a weight to int8 with a scale a row: the row's largest absolute value becomes about 127.

    Args:
        weight: (N, K), of any floating-point dtype.
        factors: (K,) of the columns, multiplied before; None: none.

    Returns:
        `q` (N, K) int8 from -127 to 127, and the scales (N,) bfloat16; a row of zeros has the scale 1.

    Raises:
        ValueError: If a weight is NaN or infinite.
    """
    q = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = torch.empty(len(weight), dtype=torch.bfloat16, device=weight.device)
    rows = max(1, PART // weight.size(1))  # in parts, so that the float32 copies of a large weight are small
    for part, q_part, scale_part in zip(weight.split(rows), q.split(rows), scale.split(rows)):
        part = part.float() if factors is None else part.float() * factors
        found = (part.abs().amax(dim=1) / LARGEST).to(torch.bfloat16)
        if not found.isfinite().all():
            raise ValueError("it has values that are not finite.")
        scale_part.copy_(torch.where(found > 0, found, torch.ones_like(found)))
        q_part.copy_((part / scale_part.float().unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST))
    return q, scale


def to_int8(model: nn.Module, typical: Mapping[str, Tensor] | None = None, *, empty: bool = False) -> list[str]:
    """Replace the linear layers of a model by `Int8Linear`, one at a time: each float weight is freed at once.

    These stay as they are: layers whose K is no multiple of 16, which the operator cannot read; routers of mixtures of
    experts, which are small and decide; `kv_b_proj` of latent attention, whose weight decoding multiplies with queries;
    and adapters' layers.

    Args:
        model: Its linear layers, in place.
        typical: How large inputs are, (K,), by the name of the layer; see `head_inputs`.
        empty: Leave the int8 weights without values: a state dict with float weights is loaded next.

    Returns:
        The names of the layers that could not be replaced because of their K.
    """
    refused = []
    for parent_name, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) not in (PLAIN, Linear) or name in ("gate", "kv_b_proj"):
                continue
            full_name = f"{parent_name}.{name}".lstrip(".")
            if layer.in_features % ALIGNED:
                refused.append(full_name)
                continue
            inputs = (typical or {}).get(full_name)
            made = Int8Linear(layer.in_features, layer.out_features, layer.bias, layer.weight.device, inputs)
            if not empty:
                made.set_weight(layer.weight)
            setattr(parent, name, made.train(layer.training))
            del layer
    return refused


def head_inputs(config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How large the inputs of a model's head are, for `to_int8`: the weight of the last norm.

    Args:
        config: Of the model. state: Its parameters by name.
    """
    weight = state.get("transformer.ln_f.weight")
    if weight is None:  # a norm without a weight
        weight = torch.ones(config.n_embd)
    elif config.norm_class_name == "RMSNorm" and "Gemma" in config.name:  # litgpt's sign of a weight that adds to 1
        weight = 1 + weight
    return {"lm_head": weight.detach().float()}


def describe_refused(names: Iterable[str]) -> str:
    """One sentence that names the kinds of layers that stay as they are, "" if there are none."""
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
    return f"Not quantized, since their inputs are no multiple of {ALIGNED}: {', '.join(kinds)}." if kinds else ""


@torch.compiler.assume_constant_result
def _product_dtype(device: str) -> torch.dtype:
    """The dtype of products of many rows: bfloat16 where it is fast."""
    return torch.bfloat16 if device != "cpu" or has_bf16_products() else torch.float32


@lru_cache
def has_bf16_products() -> bool:
    """Return whether this processor has instructions for products in bfloat16 (AVX-512 BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
