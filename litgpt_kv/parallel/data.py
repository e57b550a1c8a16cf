"""Data parallel: the whole model on every device, and some of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litgpt.config import Config
from litgpt_kv.generate import Stats
from litgpt_kv.generate.stopping import Row
from litgpt_kv.parallel.base import DeviceRequest, Weights, seed_rows
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.launch import launch
from litgpt_kv.parallel.tensor import load_tensor_parallel


class DataParallel:
    """The whole model on every device, and some of the prompts."""

    divides_rows = True

    def __init__(self, config: Config, weights: Weights, request: DeviceRequest) -> None:
        run = launch(request)
        self._run, self.fabric, self.collectives, self.close = run, run.fabric, run.collectives, run.end
        with run.fabric.init_tensor():
            self.model = load_tensor_parallel(config, Collectives(), weights, device=run.fabric.device)

    def own_rows(self, rows: Sequence[Row]) -> list[Row]:
        rows = seed_rows(self.collectives, rows)
        return [rows[b] for b in assign_rows([row.sees for row in rows], self.collectives.size)[self.collectives.rank]]

    def exchange_answers(self, rows: Sequence[Row], own: Sequence[Row], stats: Stats) -> list[Row]:
        self.synchronize()  # however long the others take: a collective would give up
        parts = self.collectives.all_gather_object(([(row.index, row.answer) for row in own], vars(stats)))
        _total(stats, [theirs for _, theirs in parts])
        by_index = {row.index: row for row in rows}
        others = []
        for rank, (answers, _) in enumerate(parts):
            for index, answer in answers if rank != self.collectives.rank else ():
                by_index[index].answer = answer
                others.append(by_index[index])
        return sorted(others, key=lambda row: row.index)

    def synchronize(self, failure: str | None = None) -> None:
        self._run.synchronize(failure)


def _total(stats: Stats, parts: list[dict[str, Any]]) -> None:
    """What several processes did side by side, as one run."""
    for name in ("prompt_tokens", "new_tokens", "prefill_tokens", "decode_tokens"):
        setattr(stats, name, sum(part[name] for part in parts))
    for name in ("prefill_seconds", "decode_seconds"):
        setattr(stats, name, max(part[name] for part in parts))


def assign_rows(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Which rows each process takes: the longest first, each to the one that has least to read so far."""
    out: list[list[int]] = [[] for _ in range(processes)]
    load = [(0, r) for r in range(processes)]
    for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        (tokens, r) = min(load)
        load[r] = (tokens + lengths[b], r)
        out[r].append(b)
    return [sorted(rows) for rows in out]
