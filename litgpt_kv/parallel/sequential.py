"""Sequential: layers over the devices of one process, each layer's cache beside its block. Floor 5.

A batch runs in pieces of rows one after the other: while the second device works on the first piece, the first one
works on the second piece. One thread is enough for that, as work on a GPU is only asked for, not waited for.

B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt_kv.attention.rope import Angles
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
        self._tables: tuple[Tensor, list[Angles]] | None = None
        self._views: tuple[weakref.ref[KVCache], list[KVCache]] | None = None
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
            cache._check_step(idx.size(1))
        else:
            cache._check_prompt(idx.size(1), length)
        rows = [slice(*bounds(len(idx), count, i)) for i in range(count)]
        lengths = [None if length is None else length[part] for part in rows]
        views = self._parts(cache, rows)
        return torch.cat([super(Spread, self).forward(idx[r], c, n) for r, c, n in zip(rows, views, lengths)])

    def _parts(self, cache: KVCache, rows: list[slice]) -> list[KVCache]:
        """Views of the cache's rows, kept while the cache lives: making them takes longer than a small step."""
        known = self._views
        if known is None or known[0]() is not cache or len(known[1]) != len(rows):
            views = [cache.rows(part.start, part.stop) for part in rows]
            for view in views:  # the cache must be able to go, and its views with it
                view._whole = (weakref.proxy(cache), view._whole[1])
            known = self._views = weakref.ref(cache, self._forget), views
        return known[1]

    def _forget(self, gone: weakref.ref[KVCache]) -> None:
        if self._views is not None and self._views[0] is gone:
            self._views = None

    def theta(self) -> list[Angles]:
        """As `GPT.theta`, once for each device, as the tables are."""
        bases = super().theta()
        if len(bases) == len(self._rope()[0]):  # read off the tables, which are on the devices already
            return bases
        return [(angle.to(d), amplitude.to(d)) for angle, amplitude in bases for d in self.devices]

    def _rope(self) -> tuple[list[Angles], list[int]]:
        """The rope tables of each base on each device, and which of them each layer uses."""
        tables, which = super()._rope()
        if self._tables is None or self._tables[0] is not self.cos:  # copied once, not at every step
            copies = [(cos.to(d), sin.to(d)) for cos, sin in tables for d in self.devices]
            self._tables = self.cos, copies
        return self._tables[1], [base * len(self.devices) + place for base, place in zip(which, self.places)]


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
