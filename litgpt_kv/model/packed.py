"""Linear layers whose weights are kept in the order in which oneDNN multiplies with them, for inference on a CPU.

torch gives products in float32 to MKL, which uses AVX-512 on Intel's processors only, and reorders a bfloat16 weight
for oneDNN at each product. A weight that is reordered once, when it is loaded, is read at the speed of the memory by a
product of one row. One thread of an AMD EPYC with AVX-512 BF16, microseconds for a weight of 1,536 x 576:

    rows   float32   packed   bfloat16   packed
       1       212      117        119       66
      16       446      212        174      124
     512     8,012    3,485      1,853    1,764

The results are those of `torch.nn.functional.linear` but for the order of float32 sums.

N outputs · K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_kv.attention.cpu import prefers_onednn
from litgpt_kv.cache.serialize import SAMPLE
from litgpt_kv.model.linear import PLAIN, Linear
from litgpt_kv.model.quantized import has_bf16_products

# smaller float32 weights are in the processor's cache, where MKL's call is faster; oneDNN multiplies bfloat16 anyway
LEAST_WEIGHTS = {torch.float32: 131_072, torch.bfloat16: 4_096}


class PackedLinear(PLAIN):
    """A linear layer for inference whose weight is in oneDNN's order.

    Its state dict has the weight as `nn.Linear` has it, and takes such weights. The layer cannot be trained, but
    gradients flow through it to its inputs.

    Attributes:
        weight: (N, K), with a shape, a dtype and a device, but without values that could be read: `dequantized` reads
            them, and `weight.first` has the first `SAMPLE`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        weight, bias = self.weight, self.bias
        if x.dtype != weight.dtype or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.dequantized(), bias)
        if torch.compiler.is_compiling():
            return torch.ops.litgpt_kv.packed_linear(x, weight, bias)
        return _product(x, weight, bias)

    def dequantized(self) -> Tensor:
        """The weight (N, K) with its values in the usual order; a copy."""
        return self.weight.detach().to_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        _unpack(self)._apply(fn, recurse)
        return _pack(self) if _suits(self) else self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[prefix + "weight"] = self.dequantized()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        _unpack(self)._load_from_state_dict(state_dict, prefix, *args)
        _pack(self)

    def __getstate__(self) -> dict[str, Any]:
        weight = nn.Parameter(self.dequantized(), requires_grad=False)
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": weight}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _pack(self)


def pack(model: nn.Module) -> None:
    """Make large linear layers of a model `PackedLinear`, where this processor is faster then; one at a time.

    Names, hooks and devices stay as they are. `kv_b_proj` of latent attention stays as it is: decoding multiplies its
    weight with queries.

    Args:
        model: For inference; its layers on a CPU in float32 or bfloat16 are packed.
    """
    for name, layer in model.named_modules():
        if type(layer) in (PLAIN, Linear) and not name.endswith("kv_b_proj") and _suits(layer):
            _pack(layer)


def is_changed_to_compile(model: nn.Module, rows: int) -> bool:
    """Return whether `prepare_to_compile` undoes `pack` for caches of so many rows."""
    several = rows == 1 and torch.get_num_threads() > 1
    return several and any(_is_packed_float32(layer) for layer in model.modules())


def prepare_to_compile(model: nn.Module, rows: int) -> None:
    """Undo `pack` where a compiled step is faster without: for float32 weights, one row and several threads.

    Inductor compiles such a product to a loop of its own: on two threads a step of SmolLM2-135M takes 16.9 instead of
    20.3 ms. For more rows, or on one thread, weights are packed again.

    Args:
        model: For inference. rows: Of the cache that it decodes with.
    """
    undo = rows == 1 and torch.get_num_threads() > 1
    with torch.inference_mode(False):
        for layer in model.modules():
            if undo and _is_packed_float32(layer):
                _unpack(layer).was_packed = True
            elif not undo and getattr(layer, "was_packed", False):
                layer.was_packed = False
                _pack(layer)


def _is_packed_float32(layer: nn.Module) -> bool:
    return isinstance(layer, PackedLinear) and layer.weight.dtype == torch.float32


@lru_cache
def packs(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies faster with packed weights of a dtype.

    They are bfloat16 where there are instructions for it, and float32 on AMD's processors with AVX-512, as measured.
    Intel's are left to MKL.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return has_bf16_products()
    return dtype == torch.float32 and prefers_onednn()


def _suits(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and packs(weight.dtype) and weight.numel() >= LEAST_WEIGHTS[weight.dtype]


@torch.no_grad()
def _pack(layer: nn.Linear) -> nn.Linear:
    """Make a layer a `PackedLinear`, in place."""
    weight = layer.weight.detach()
    packed = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight, None), requires_grad=False)
    packed.first = weight.flatten()[:SAMPLE].clone()
    layer.weight, layer.__class__ = packed, PackedLinear
    return layer.requires_grad_(False)


@torch.no_grad()
def _unpack(layer: PackedLinear) -> Linear:
    """Make a layer a `Linear` again, in place."""
    layer.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
    layer.__class__ = Linear
    return layer


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# Inductor takes `mkldnn::_linear_pointwise` for one of its own templates and cannot read a packed input there.
_library = torch.library.Library("litgpt_kv", "DEF")
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("packed_linear", _product, "CompositeExplicitAutograd")
_library.impl("packed_linear", _product, "MkldnnCPU")


@torch.library.register_fake("litgpt_kv::packed_linear", lib=_library)
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.size(0)))
