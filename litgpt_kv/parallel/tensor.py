"""Tensor parallel: every layer is divided among all devices.

In attention, a device has whole key/value heads with their query heads; in an MLP, some of the columns. Both give a
part of the output, and two sums a layer over the devices complete it. The vocabulary head gives some of the logits,
which are gathered. Everything else (embedding, norms, routers) is on every device.

In latent attention, a device has some of the heads: their rows of the projections from the latents of queries and
tokens, and their columns of the output projection. The latents, and so the cache, are the same on every device.

H query heads · G key/value heads · D head size · C embedding size · V vocabulary.
"""

from __future__ import annotations

import copy
from collections import abc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import litgpt.model as base
from litgpt.config import Config
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.model.gpt import GPT
from litgpt_kv.model.linear import Linear, speed_up
from litgpt_kv.parallel.base import DeviceRequest, Weights, seed_requests
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.heads import Heads, Sharing, divide_heads, split_range
from litgpt_kv.parallel.launch import launch
from litgpt_kv.parallel.weights import full_shapes, load_weights


class TensorParallel:
    """Divide every layer among all devices."""

    divides_prompts = False

    def __init__(self, config: Config, weights: Weights, request: DeviceRequest) -> None:
        if isinstance(request.devices, int):  # raises before any process is started
            divide_heads(config, request.devices * request.num_nodes)
        run = launch(request)
        self.fabric, self.collectives, self.close = run.fabric, run.collectives, run.end
        with run.fabric.init_tensor():
            self.model = load_tensor_parallel(config, run.collectives, weights, device=run.fabric.device)

    def own_requests(self, requests: abc.Sequence[Request]) -> list[Request]:
        return seed_requests(self.collectives, requests)

    def exchange_answers(
        self, requests: abc.Sequence[Request], answered: abc.Sequence[Sequence], stats: Stats
    ) -> list[Sequence]:
        return []

    def synchronize(self, failure: str | None = None) -> None:
        """Do nothing: processes wait for each other in every layer."""


MLP_COLUMNS = ("fc", "fc_1", "fc_2")  # parameters of an MLP that are divided by hidden elements


def local_config(config: Config, heads: Heads) -> Config:
    """Return the config of one device's part, which differs only in the numbers of heads, not in `n_embd`."""
    own = copy.copy(config)
    own.n_head = len(heads.queries)
    own.n_query_groups = own.n_head if config.latent_attention else len(heads.groups)  # litgpt counts expanded heads
    return own


def slice_parameter(
    config: Config, heads: Heads, rank: int, devices: int, split_head: bool, name: str, whole: Tensor
) -> Tensor:
    """Return device `rank`'s part of the parameter `name`, as a view if possible."""
    *_, module, leaf = name.split(".")
    D, H, G = config.head_size, config.n_head, config.n_query_groups
    if config.latent_attention:
        D = config.v_head_dim  # the width of a head's output
        widths = {"q_b_proj": config.qk_head_dim, "kv_b_proj": config.qk_nope_head_dim + config.v_head_dim}
        if width := widths.get(module):
            return whole[heads.queries.start * width : heads.queries.stop * width]
    queries = slice(heads.queries.start * D, heads.queries.stop * D)
    groups = slice(heads.groups.start * D, heads.groups.stop * D)
    if module == "qkv":  # stacked [Q; K; V]: each is divided by heads
        parts = whole.split((H * D, G * D, G * D))
        return torch.cat([part[rows] for part, rows in zip(parts, (queries, groups, groups))])
    if module in ("norm_q", "norm_k") and config.norm_qk_type == "olmo2":
        return whole[queries if module == "norm_q" else groups]
    if module == "proj" and leaf == "bias":  # the parts are summed, so only one has the bias
        return whole if rank == 0 else torch.zeros_like(whole)
    if module == "proj":
        return whole[:, queries if ".attn." in name else slice(*split_range(whole.size(1), devices, rank))]
    if module in MLP_COLUMNS:
        return whole[slice(*split_range(whole.size(0), devices, rank))]
    if module == "lm_head" and split_head:  # padded, so that all parts have one size and can be gathered
        size = -(-whole.size(0) // devices)
        part = whole[rank * size : (rank + 1) * size]
        return part if len(part) == size else torch.cat((part, whole.new_zeros(size - len(part), *whole.shape[1:])))
    return whole


def load_tensor_parallel(
    config: Config,
    collectives: Collectives,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    split_head: bool = True,
) -> GPT:
    """Load this process' part of a model, for inference.

    Parameters are copied one at a time, so this process never holds the parts of the others.

    Args:
        config: The config of the whole model.
        collectives: The processes that share the model.
        weights: The whole model's parameters by name; if they are mapped from a file, only this part is read.
        device, dtype: The device and dtype of the copies; None: torch's defaults.
        split_head: Divide the vocabulary head as well, and gather the logits.

    Returns:
        A `GPT` whose forward gives the whole model's logits, the same on every process. All processes must call it
        together.

    Raises:
        ValueError: If the model cannot be divided over so many devices, or the weights do not fit the config.
    """
    heads = divide_heads(config, collectives.size)[collectives.rank]
    shapes = full_shapes(config)
    part = partial(slice_parameter, config, heads, collectives.rank, collectives.size, split_head)
    model = empty_part(config, heads, shapes, part)
    load_weights(model, config, shapes, weights, part, device, dtype)
    speed_up(model)
    for block in model.transformer.h:
        block.attn.register_forward_hook(partial(_change_output, collectives.all_reduce))
        block.mlp.register_forward_hook(partial(_change_output, collectives.all_reduce))
        if config.norm_qk and config.norm_qk_type == "olmo2" and not config.latent_attention:
            attn = block.attn
            attn.norm_q = ShardedRMSNorm(attn.norm_q, collectives, config.n_head * config.head_size, 1.0)
            attn.norm_k = ShardedRMSNorm(
                attn.norm_k, collectives, config.n_query_groups * config.head_size, heads.weight
            )
    if split_head:
        gather = partial(_whole_vocabulary, collectives.all_gather, config.padded_vocab_size)
        model.lm_head.register_forward_hook(partial(_change_output, gather))
    model.sharing = Sharing(collectives, heads) if collectives.size > 1 else None
    return model.eval().requires_grad_(False)


def empty_part(
    config: Config, heads: Heads, shapes: Mapping[str, Tensor], part: Callable[[str, Tensor], Tensor]
) -> GPT:
    """Build one device's modules with parameters of the right shapes, on the meta device."""
    with torch.device("meta"):
        model = GPT(local_config(config, heads))
    for name, whole in shapes.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(part(name, whole), requires_grad=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
            if type(module) is Linear:  # `speed_up` decides again, with the sizes of the parts
                module.__class__ = nn.Linear
    model.lm_head.out_features = config.padded_vocab_size  # callers see the whole vocabulary
    return model


def _change_output(change: Callable[[Tensor], Tensor], module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return change(output)


def _whole_vocabulary(gather: Callable[[Tensor], Tensor], size: int, logits: Tensor) -> Tensor:
    return gather(logits)[..., :size]


class ShardedRMSNorm(nn.Module):
    """litgpt's RMSNorm over a projection whose heads are on several devices: the mean square is taken over all.

    `share` is the weight of this device's heads in the mean; it is below 1 for key heads that other devices have, too.
    """

    def __init__(self, norm: nn.Module, collectives: Collectives, size: int, share: float) -> None:
        super().__init__()
        if not isinstance(norm, base.RMSNorm):
            raise ValueError(f"A {type(norm).__name__} over the whole projection cannot be divided; use 'sequential'.")
        self.weight, self.eps, self.offset = norm.weight, norm.eps, norm.add_unit_offset
        self.collectives, self.size, self.share = collectives, size, share

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        square = self.collectives.all_reduce((exact * exact).sum(dim=-1, keepdim=True) * self.share)
        weight = self.weight.to(exact.dtype) + (1.0 if self.offset else 0.0)
        return (exact * torch.rsqrt(square / self.size + self.eps) * weight).to(x.dtype)
