"""Sequential: the layers of a model are divided among the devices of one process, and the caches with them.

The rows of a batch run in several pieces: while the second device works on the first piece, the first device works on
the second piece. One thread is enough, because GPU work is asynchronous.

B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt_kv.attention.rope import RopeTables
from litgpt_kv.cache.door import check_prompt, check_step
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel.base import DeviceRequest, Weights
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.heads import split_range
from litgpt_kv.parallel.weights import full_shapes, load_weights


class Sequential:
    """Divide the layers among the devices of one process."""

    divides_prompts = False

    def __init__(self, config: Config, weights: Weights, request: DeviceRequest) -> None:
        if request.num_nodes != 1:
            raise ValueError(f"'sequential' runs in one process on one machine, not on {request.num_nodes}.")
        self.collectives = Collectives()
        self.fabric = L.Fabric(accelerator=request.accelerator, devices=1, precision=request.precision)
        devices = local_devices(self.fabric.device, request.devices)
        layer_devices(config.n_layer, len(devices))
        with self.fabric.init_tensor():
            self.model = load_sequential(config, devices, weights)

    def own_requests(self, requests: abc.Sequence[Request]) -> list[Request]:
        return list(requests)

    def exchange_answers(
        self, requests: abc.Sequence[Request], answered: abc.Sequence[Sequence], stats: Stats
    ) -> list[Sequence]:
        return []

    def synchronize(self, failure: str | None = None) -> None:
        """Do nothing: there is only one process."""

    def close(self) -> None:
        """Do nothing: there is only one process."""


def layer_devices(n_layer: int, devices: int) -> list[int]:
    """Return the device index of each layer: consecutive layers, whose numbers differ by at most one a device."""
    if not 1 <= devices <= n_layer:
        raise ValueError(f"{n_layer} layers can be laid over 1 to {n_layer} devices, not {devices}.")
    ranges = [split_range(n_layer, devices, d) for d in range(devices)]
    return [d for d, (first, end) in enumerate(ranges) for _ in range(first, end)]


class SequentialGPT(GPT):
    """A `GPT` whose layers are on several devices. Tokens and results are on the first device.

    Args:
        config: The model's config.
        devices: The devices, in the order of the layers. The first one also has the embedding, the last one the final
            norm and the head.
        pieces: The number of pieces in which the rows of a batch with a cache run; None: one for each device.
    """

    def __init__(self, config: Config, devices: abc.Sequence[torch.device], pieces: int | None = None) -> None:
        super().__init__(config)
        self.devices, self.pieces = list(devices), len(devices) if pieces is None else pieces
        self.layer_devices = layer_devices(config.n_layer, len(devices))
        for before, device, block in zip(self.layer_devices, self.layer_devices[1:], self.transformer.h[1:]):
            if device != before:  # tensors move between devices only here
                block.register_forward_pre_hook(partial(_move_inputs, self.devices[device]))
        if len(self.devices) > 1:
            self.lm_head.register_forward_hook(partial(_move_output, self.devices[0]))

    def device_of(self, name: str) -> torch.device:
        """Return the device of the parameter `name`."""
        kind, *rest = name.split(".")
        if kind == "transformer" and rest[0] == "h":
            return self.devices[self.layer_devices[int(rest[1])]]
        return self.devices[0 if rest[0] == "wte" else -1]

    def forward(
        self, idx: Tensor, cache: KVCache | None = None, length: Tensor | None = None, **options: Any
    ) -> Tensor | list[Tensor]:
        """Return the logits, as `GPT.forward`; run the rows of a batch with a cache in pieces."""
        count = min(self.pieces, len(idx)) if idx.dim() == 2 else 1
        if not isinstance(cache, KVCache) or count < 2 or cache.batch_size != len(idx):
            return super().forward(idx, cache, length, **options)
        if length is None:  # check the whole batch before the first piece changes the cache
            check_step(cache, idx.size(1))
        else:
            check_prompt(cache, idx.size(1), length)
        rows = [slice(*split_range(len(idx), count, i)) for i in range(count)]
        lengths = [None if length is None else length[part] for part in rows]
        views = [cache.rows(part.start, part.stop) for part in rows]
        return torch.cat([super(SequentialGPT, self).forward(idx[r], c, n) for r, c, n in zip(rows, views, lengths)])

    def theta(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the result of `GPT.theta` for each base on each device."""
        bases = super().theta()
        tables = len(self.rope().tables)
        if len(bases) == tables:  # they come from the tables, which are on the devices
            return bases
        return [tuple(part.to(d) for part in base) for base in bases for d in self.devices]

    def make_rope(self, cos: Tensor, sin: Tensor) -> RopeTables:
        """Return the rope tables of each base on each device."""
        rope = super().make_rope(cos, sin)
        if cos is not self.cos:
            return rope
        copies = [(cos.to(d), sin.to(d)) for cos, sin in rope.tables for d in self.devices]
        which = [base * len(self.devices) + device for base, device in zip(rope.which, self.layer_devices)]
        return RopeTables(copies, which)


def load_sequential(
    config: Config,
    devices: abc.Sequence[torch.device],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    pieces: int | None = None,
) -> SequentialGPT:
    """Load a model for inference with its layers on several devices; weights are copied one at a time.

    Raises:
        ValueError: If there are more devices than layers, or the weights do not fit the config.
    """
    with torch.device("meta"):
        model = SequentialGPT(config, devices, pieces)
    load_weights(model, config, full_shapes(config), weights, lambda name, whole: whole, model.device_of, dtype)
    return model.eval().requires_grad_(False)


def local_devices(root: torch.device, devices: int | str) -> list[torch.device]:
    """Return the devices of one process, from a number or "auto"; the CPU counts as any number of devices."""
    available = torch.cuda.device_count() if root.type == "cuda" else 1
    count = available if devices == "auto" else int(devices)
    if count < 1 or (count > available and root.type != "cpu"):
        raise ValueError(f"There are {available} devices of type {root.type!r}, got {devices}.")
    return [torch.device("cuda", i) if root.type == "cuda" else root for i in range(count)]


def _move_inputs(device: torch.device, module: nn.Module, args: tuple) -> tuple:
    return tuple(a.to(device, non_blocking=True) if isinstance(a, Tensor) else a for a in args)


def _move_output(device: torch.device, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.to(device, non_blocking=True)
