"""Copy a checkpoint's parameters, or parts of them, into a model, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.scripts.convert_hf_checkpoint import qkv_reassemble
from litgpt_kv.model.gpt import GPT

OLD, NEW = (
    ".attn.attn.",
    ".attn.qkv.",
)  # the stacked projection has another name and order of heads before litgpt 0.5


def full_shapes(config: Config) -> dict[str, Tensor]:
    """Return the whole model's parameters on the meta device, by litgpt's names."""
    with torch.device("meta"):
        return GPT(config).state_dict()


def names_in(shapes: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each parameter of a model its name in a checkpoint, which differs in older versions of litgpt.

    Raises:
        ValueError: If a weight is missing, unknown or of another shape.
    """
    names = {name.replace(OLD, NEW): name for name in weights}
    if wrong := sorted(shapes.keys() ^ names.keys()):
        what = "is missing" if wrong[0] in shapes else "is unknown"
        raise ValueError(f"{wrong[0]!r:.100} {what}.")
    for name, shape in shapes.items():
        if weights[names[name]].shape != shape.shape:
            sizes = f"{tuple(weights[names[name]].shape)}, not {tuple(shape.shape)}"
            raise ValueError(f"{name!r} has shape {sizes}.")
    return names


def load_weights(
    model: GPT,
    config: Config,
    shapes: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    part: Callable[[str, Tensor], Tensor],
    device: torch.device | Callable[[str], torch.device] | None,
    dtype: torch.dtype | None,
) -> None:
    """Set the parameters and buffers of a model on the meta device.

    Args:
        model: The model, on the meta device.
        config, shapes: Config and parameter shapes of the whole model.
        weights: The whole model's parameters by name.
        part: Returns this model's part of a parameter, from its name and the whole parameter.
        device: The device of the parameters, or a function from a name to a device; None: torch's default.
        dtype: The dtype of floating-point parameters; None: torch's default.

    Raises:
        ValueError: If a weight is missing, unknown or has another shape; then nothing is copied.
    """
    try:
        names = names_in(shapes, weights)
    except ValueError as error:
        raise ValueError(f"The weights do not fit the model's config: {error}") from error
    device_of = device if callable(device) else lambda name: device
    dtype = dtype or torch.get_default_dtype()
    for name in shapes:
        whole = weights[names[name]]
        if names[name] != name:
            whole = qkv_reassemble(whole, config)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        is_parameter = leaf in module._parameters
        target = dtype if is_parameter and whole.is_floating_point() else whole.dtype
        copied = part(name, whole).to(device_of(name), target, copy=True).contiguous()
        if is_parameter:
            module._parameters[leaf] = nn.Parameter(copied, requires_grad=False)
        else:
            module._buffers[leaf] = copied
    root = device_of("transformer.wte.weight") or torch.get_default_device()
    model.cos, model.sin = model.rope_cache(device=root)
