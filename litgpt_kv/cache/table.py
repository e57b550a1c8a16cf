"""One table of slots for all layers: every head of every layer competes for them when a prompt is compressed.

KVzip's budget (Kim et al. 2025, arXiv 2505.23416): one threshold for the scores of all layers, heads and tokens. A
prompt longer than the budget deals out the slots of its row; from then on each layer is a pool of what it got, so that
shapes stay as they are. A layer's slots are a segment of the table, which only that layer reads. As every row has
segments of its own, rows decode one after the other, each as if it were alone.

L layers of a table · B rows · G key/value heads of a layer · S slots of a head on average, the budget · N = L * G * S
slots of a row · T tokens of a prompt · D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from litgpt_kv import registry
from litgpt_kv.cache import pool
from litgpt_kv.cache.plan import LayerPlan
from litgpt_kv.cache.slots import Slots
from litgpt_kv.cache.spec import LayerSpec
from litgpt_kv.cache.storage.base import Storage
from litgpt_kv.config import KVCacheArgs


def build_storages(
    plan: LayerPlan, args: KVCacheArgs, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Storage, Storage]:
    """Storages of keys and values of `shape` (B, P, S)."""
    known = registry.options("storage", plan.storage)
    options = {name: value for name, value in args.storage_options.items() if name in known}
    keys, values = (
        # latent attention without rotation has keys of no width, which nothing can make smaller
        registry.build("storage", plan.storage, role, (*shape, width), dtype, device, **options)
        if width
        else registry.build("storage", "plain", role, (*shape, 0), dtype, device)
        for role, width in (("keys", plan.spec.key_size), ("values", plan.spec.value_size))
    )
    return keys, values


class Table(Slots):
    """The slots of several layers in one set, (1, B, 1, N); `owner` numbers the heads of a layer.

    Attributes:
        sizes: (1, B, L) int64 slots of each layer, whose segments follow each other. The host knows them, too: see
            `HostRows.sizes`.
        keys, values: Storages of (B, 1, N, D).
    """

    sizes: Tensor
    keys: Storage
    values: Storage

    def __init__(
        self,
        plan: LayerPlan,
        layers: tuple[LayerSpec, ...],
        args: KVCacheArgs,
        batch_size: int,
        exact: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(plan, layers, batch_size, exact, device)
        sizes = torch.tensor(self.equal_sizes, device=device).repeat(1, batch_size, 1)
        self.register_buffer("sizes", sizes, persistent=False)
        self.keys, self.values = build_storages(plan, args, (batch_size, 1, self.size), dtype, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:
        for storage in self.children():
            storage._apply(fn)
        super()._apply(fn, recurse)
        return self

    @property
    def equal_sizes(self) -> tuple[int, ...]:
        """Slots of each layer until a prompt deals them out otherwise."""
        return (self.size // len(self.layers),) * len(self.layers)

    def reset(self, rows: Tensor | slice) -> None:
        """Empty rows; their layers have equal sizes again."""
        super().reset(rows)
        self.sizes[:, rows] = self.size // len(self.layers)

    def kept_per_head(self) -> Tensor:
        """(B,) the most tokens of each row that any head of any layer holds (a device sync)."""
        rows = []
        for b, sizes in enumerate(self.sizes[0].tolist()):
            rows.append(torch.stack([slots.kept_per_head() for slots in self.segments(b, sizes)]).amax(0))
        return torch.cat(rows)

    def read_sizes(self) -> list[tuple[int, ...] | None]:
        """The sizes of each row's layers, None where they are equal (a copy from the device)."""
        found = [tuple(sizes) for sizes in self.sizes[0].tolist()]
        return [None if sizes == self.equal_sizes else sizes for sizes in found]

    # -- a row's layers as layers of their own, which share this table's memory ----------------------------------------

    def segments(self, row: int, sizes: Sequence[int] | None) -> list[Slots]:
        """The slots of each layer of one row."""
        found = []
        for i, (start, end) in enumerate(self._bounds(sizes)):
            slots = Slots.__new__(Slots)
            slots.__dict__.update(self.__dict__)
            slots._modules = {}
            slots._buffers = {
                name: buffer[:, row : row + 1, :, start:end]
                for name, buffer in self._buffers.items()
                if name != "sizes" and buffer is not None
            }
            slots.layers, slots.heads, slots.size = (self.layers[i],), self.layers[i].groups, end - start
            found.append(slots)
        return found

    def part(self, layers: Sequence[Any], row: int, sizes: Sequence[int] | None) -> tuple[list[Slots], list[Any]]:
        """The slots and the `LayerCache`s of the layers of one row.

        Args:
            layers: Those of this table, in order, of all rows. sizes: Of this row; None: equal ones.
        """
        found = []
        for layer, (start, end) in zip(layers, self._bounds(sizes)):
            one = layer.__new__(type(layer))
            one.__dict__.update(layer.__dict__)
            one.stack_index = 0

            def segment(buffer: Tensor, start: int = start, end: int = end) -> Tensor:
                return buffer[row : row + 1, :, start:end]

            one._modules = {"keys": _changed(self.keys, segment), "values": _changed(self.values, segment)}
            if layer.ring is not None:
                one._modules["ring"] = _changed(layer.ring, lambda buffer: buffer[row : row + 1])
            found.append(one)
        return self.segments(row, sizes), found

    def _bounds(self, sizes: Sequence[int] | None) -> list[tuple[int, int]]:
        return list(pairwise(accumulate(sizes or self.equal_sizes, initial=0)))

    # -- prompts -------------------------------------------------------------------------------------------------------

    def seed_rows(self, step: Any, lengths: Sequence[int]) -> list[tuple[int, ...] | None]:
        """Take what stays of prompts, after all layers have read them.

        Args:
            step: The `PrefillMetadata` of these layers. lengths: Tokens of each row's prompt.

        Returns:
            Of each row the slots of each layer; None where the prompt fits the budget, and all have the same.
        """
        return [self._seed_row(step, b, n) for b, n in enumerate(lengths)]

    def _seed_row(self, step: Any, b: int, n: int) -> tuple[int, ...] | None:
        held = sorted(step.held, key=lambda own: own[0].spec.index)
        caches = [layer for layer, _, _ in held]
        length, sizes = step.length[b : b + 1], None
        fresh = [tokens.row(b, n) for _, tokens, _ in held]
        slots, layers = self.part(caches, b, None)
        scored = [
            layer.score_prompt(own, length, tokens, {name: x[b : b + 1, :, :n] for name, x in received.items()})
            for layer, own, tokens, (_, _, received) in zip(layers, slots, fresh, held)
        ]
        if n <= self.plan.slots:
            kept = [own.select_prompt(None, length, n) for own in slots]
        else:
            indices = self.deal([score for score, _ in scored], length, n)
            sizes = tuple(index.size(-1) for index in indices)
            kept = [(index, index % n, index // n) for index in indices]
            slots, layers = self.part(caches, b, sizes)
            self.sizes[0, b] = torch.tensor(sizes, device=self.sizes.device)
        for layer, own, chosen, tokens, (_, statistics) in zip(layers, slots, kept, fresh, scored):
            layer.fill(own, chosen, tokens, statistics)
        return sizes

    def deal(self, scores: Sequence[Tensor], length: Tensor, n: int) -> list[Tensor]:
        """Choose what stays of one row's prompt, the best of all layers together (a device sync).

        Every head is sure of its protected tokens and of its best ones, `LayerPlan.sure` in all; among equals the
        earlier token stays, then the lower layer and head.

        Args:
            scores: Of each layer (1, G, n). length: (1,), n.

        Returns:
            Of each layer (1, 1, its slots): indices into its G * n tokens, head by head, in ascending order.
        """
        score = torch.cat(list(scores), dim=1)  # (1, L * G, n)
        score = score.nan_to_num(torch.finfo(score.dtype).min, float("inf"), float("-inf"))
        pos = torch.arange(n, device=score.device).expand(score.shape)
        worth = self.worth(score, pos, length - 1, length)
        heads, each = score.size(1), score.size(1) // len(scores) * n
        index = pool.best(worth, pos, heads, self.size, self.plan.sure, self.strategy.comparable)  # (1, 1, N)
        sizes = (index // each).flatten().bincount(minlength=len(scores)).tolist()
        return [part - i * each for i, part in enumerate(index.split(sizes, dim=-1))]


def _changed(module: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A shallow copy of a module whose buffers are changed."""
    copy = module.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy._buffers = {name: None if buffer is None else change(buffer) for name, buffer in module._buffers.items()}
    return copy
