"""What strategies read of the model itself, gathered when a cache is built: angles, output weights, calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from litgpt_kv.cache.calibration import read_tensors
from litgpt_kv.cache.door import check_one_device
from litgpt_kv.cache.plan import LayerPlan
from litgpt_kv.cache.spec import LayerSpec
from litgpt_kv.cache.strategies.base import LayerConstants, Strategy


def connect(cache: Any, model: Any) -> None:
    """Give a new `KVCache` what it reads of its model while it runs: angles, other devices' heads, layers' constants.

    Raises:
        ValueError: If a calibration file is missing or is not of this model.
    """
    if model.sharing is not None:
        check_one_device(cache.plans, model.sharing.groups_and_devices[1])
    reading = any(plan.strategy.needs or plan.strategy.reads_on_entry for plan in cache.plans)
    if reading or any(plan.endless for plan in cache.plans):
        cache.theta = model.theta()
    for slots in cache.slots:
        slots.sharing = model.sharing
    if reading:
        cache.rope = model.rope()
        exact = torch.promote_types(cache.dtype, torch.float32)
        set_constants(cache.layers, cache.plans, model, cache.theta, exact)


def set_constants(
    layers: Iterable[Any],
    plans: Sequence[LayerPlan],
    model: Any,
    theta: Sequence[tuple[Tensor, Tensor, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Set the `constants` of each layer of a cache whose strategy reads the model.

    Args:
        layers: `LayerCache`s. plans: Theirs. model: The `GPT`.
        theta: What one position turns, of each rope base. dtype: Of scores.

    Raises:
        ValueError: If a calibration file is missing or is not of this model.
    """
    which, sharing = model.rope().which, model.sharing
    for layer, plan, block in zip(layers, plans, model.transformer.h):
        strategy, spec = plan.strategy, plan.spec
        if not (strategy.needs or strategy.reads_on_entry):
            continue
        constants = LayerConstants(theta[which[spec.index]], dtype)
        if sharing is not None:
            constants.largest, constants.mean = sharing.largest, partial(sharing.score, per_head=True)
            constants.first_head = 0 if plan.select == "layer" else sharing.heads.groups.start
        if "output_weight" in strategy.needs:
            weight = weight_of(block.attn.proj)  # (C, H * Dv)
            constants.output_weight = weight.unflatten(1, (spec.heads, -1))
        if "calibration" in strategy.needs:
            heads = range(spec.heads) if sharing is None else sharing.heads.queries
            total = spec.heads if sharing is None else sharing.heads.all_queries
            found = read_calibration(strategy, spec, total)
            device = layer.device
            constants.calibration = {name: x[heads.start : heads.stop].to(device) for name, x in found.items()}
        layer.constants = constants


def weight_of(layer: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer; of a quantized or adapted one, what it amounts to."""
    if hasattr(layer, "dequantized"):
        with torch.no_grad():
            return layer.dequantized()
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear) and isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:
        return weight.detach()
    with torch.no_grad():
        width = layer.in_features if hasattr(layer, "in_features") else layer.linear.in_features
        device = next(layer.parameters()).device
        dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)
        eye = torch.eye(width, dtype=dtype, device=device)
        return (layer(eye) - layer(torch.zeros_like(eye[:1]))).mT


def read_calibration(strategy: Strategy, spec: LayerSpec, heads: int) -> dict[str, Tensor]:
    """What a strategy's calibration file says of one layer.

    Args:
        strategy: With the path as its option `calibration`, and `calibration_shapes`.
        spec: The layer. heads: Query heads of the whole model.

    Returns:
        Tensors by name, (heads, ...) each.

    Raises:
        ValueError: If the file cannot be read, or has not what the strategy needs of this model.
    """
    path = strategy.calibration  # type: ignore[attr-defined]
    shapes = strategy.calibration_shapes(spec)  # type: ignore[attr-defined]
    try:
        found = {}
        for key, tensor in read_tensors(path, [f"layers.{spec.index}.{name}" for name in shapes]).items():
            name = key.rpartition(".")[2]
            if list(tensor.shape) != [heads, *shapes[name]]:
                raise ValueError(f"{key} must be {[heads, *shapes[name]]} numbers, got {list(tensor.shape)}")
            found[name] = tensor
        return found
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no calibration for this model: {error}.") from error
