"""From a checkpoint's parameters to those of a part of the model, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.scripts.convert_hf_checkpoint import qkv_reassemble
from litgpt_kv.model.gpt import GPT

OLD, NEW = ".attn.attn.", ".attn.qkv."  # the stacked projection's name, and order of heads, in litgpt before 0.5


def full_shapes(config: Config) -> dict[str, Tensor]:
    """The whole model's parameters on the meta device, by litgpt's names."""
    with torch.device("meta"):
        return GPT(config).state_dict()


def names_in(shapes: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """For each parameter of a model its name in a checkpoint, which older litgpts wrote differently.

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
    """Gives a model on the meta device its parameters and buffers.

    Args:
        model: On the meta device.
        config, shapes: The whole model's, to check the weights against.
        weights: The whole model's parameters by name.
        part: What of a parameter this model takes.
        device: Where parameters go, or which device a name's does; None: torch's default.
        dtype: Of floating-point parameters; None: torch's default.

    Raises:
        ValueError: If a weight is missing, unknown or of another shape; nothing is copied then.
    """
    try:
        names = names_in(shapes, weights)
    except ValueError as error:
        raise ValueError(f"The weights do not fit the model's config: {error}") from error
    where = device if callable(device) else lambda name: device
    dtype = dtype or torch.get_default_dtype()
    for name in shapes:
        whole = weights[names[name]]
        if names[name] != name:
            whole = qkv_reassemble(whole, config)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        is_parameter = leaf in module._parameters
        kind = dtype if is_parameter and whole.is_floating_point() else whole.dtype
        copied = part(name, whole).to(where(name), kind, copy=True).contiguous()
        if is_parameter:
            module._parameters[leaf] = nn.Parameter(copied, requires_grad=False)
        else:
            module._buffers[leaf] = copied
    root = where("transformer.wte.weight") or torch.get_default_device()
    model.cos, model.sin = model.rope_cache(device=root)
