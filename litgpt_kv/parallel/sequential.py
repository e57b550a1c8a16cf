"""Sequential: layers over the devices of one process, each layer's cache beside its block. Floor 5.

A batch runs in pieces of rows one after the other: while the second device works on the first piece, the first one
works on the second piece. One thread is enough for that, as work on a GPU is only asked for, not waited for.

B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt_kv.attention.rope import RopeTables
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel.heads import bounds
from litgpt_kv.parallel.weights import fill, full_shapes


def places(n_layer: int, devices: int) -> list[int]:
    """The device of each layer: runs of layers, whose lengths differ by one at most."""
    if not 1 <= devices <= n_layer:
        raise ValueError(f"{n_layer} layers can be laid over 1 to {n_layer} devices, not {devices}.")
    runs = [bounds(n_layer, devices, d) for d in range(devices)]
    return [d for d, (first, end) in enumerate(runs) for _ in range(first, end)]


class Spread(GPT):
    """A `GPT` whose layers are on several devices; called as any other, with tokens and results on the first device.

    Args:
        config: Of the model.
        devices: Where its layers go, in runs; the embedding is on the first one, the last norm and the head on the
            last.
        pieces: In how many pieces of rows a batch with a cache runs.
    """

    def __init__(self, config: Config, devices: Sequence[torch.device], pieces: int | None = None) -> None:
        super().__init__(config)
        self.devices, self.pieces = list(devices), len(devices) if pieces is None else pieces
        self.places = places(config.n_layer, len(devices))
        for before, here, block in zip(self.places, self.places[1:], self.transformer.h[1:]):
            if here != before:  # between devices, and only there, something moves
                block.register_forward_pre_hook(partial(_arrive, self.devices[here]))
        if len(self.devices) > 1:
            self.lm_head.register_forward_hook(partial(_return, self.devices[0]))

    def device_of(self, name: str) -> torch.device:
        """Where the parameter `name` goes."""
        kind, *rest = name.split(".")
        if kind == "transformer" and rest[0] == "h":
            return self.devices[self.places[int(rest[1])]]
        return self.devices[0 if rest[0] == "wte" else -1]

    def forward(
        self, idx: Tensor, cache: KVCache | None = None, length: Tensor | None = None, **options: Any
    ) -> Tensor | list[Tensor]:
        """As `GPT.forward`."""
        count = min(self.pieces, len(idx)) if idx.dim() == 2 else 1
        if not isinstance(cache, KVCache) or count < 2 or cache.batch_size != len(idx):
            return super().forward(idx, cache, length, **options)
        if length is None:  # no piece may move before all are known to fit
            cache.check_step(idx.size(1))
        else:
            cache.check_prompt(idx.size(1), length)
        rows = [slice(*bounds(len(idx), count, i)) for i in range(count)]
        lengths = [None if length is None else length[part] for part in rows]
        views = [cache.rows(part.start, part.stop) for part in rows]
        return torch.cat([super(Spread, self).forward(idx[r], c, n) for r, c, n in zip(rows, views, lengths)])

    def theta(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As `GPT.theta`, for each base on each device."""
        bases = super().theta()
        tables = len(self.rope().tables)
        if len(bases) == tables:  # read off the tables, which are on the devices already
            return bases
        return [tuple(part.to(d) for part in base) for base in bases for d in self.devices]

    def make_rope(self, cos: Tensor, sin: Tensor) -> RopeTables:
        """The rope tables of each base on each device."""
        rope = super().make_rope(cos, sin)
        if cos is not self.cos:
            return rope
        copies = [(cos.to(d), sin.to(d)) for cos, sin in rope.tables for d in self.devices]
        return RopeTables(copies, [base * len(self.devices) + d for base, d in zip(rope.which, self.places)])


def spread(
    config: Config,
    devices: Sequence[torch.device],
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    pieces: int | None = None,
) -> Spread:
    """A model for inference with its layers on several devices; weights are copied to each one at a time.

    Raises:
        ValueError: If there are more devices than layers, or the weights do not fit the config.
    """
    with torch.device("meta"):
        model = Spread(config, devices, pieces)
    fill(model, config, full_shapes(config), weights, lambda name, whole: whole, model.device_of, dtype)
    return model.eval().requires_grad_(False)


def _arrive(device: torch.device, module: nn.Module, args: tuple) -> tuple:
    return tuple(a.to(device, non_blocking=True) if isinstance(a, Tensor) else a for a in args)


def _return(device: torch.device, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.to(device, non_blocking=True)
