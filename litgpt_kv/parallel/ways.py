"""The ways to use several devices, by litgpt's names. Floor 5.

A way loads the model, or this process' part of it, and says which rows this process answers. A new one is a class here
and a line in `WAYS`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from torch import Tensor

from litgpt.config import Config
from litgpt_kv.generate import Stats
from litgpt_kv.generate.stopping import Row
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel.heads import divide
from litgpt_kv.parallel.launch import launch
from litgpt_kv.parallel.sequential import places, spread
from litgpt_kv.parallel.team import Team
from litgpt_kv.parallel.tensor import shard

Weights = Mapping[str, Tensor]
MOST_DEVICES = 16  # of one machine, unless it has more processor cores: on a CPU each is a process of its own
MOST_NODES = 4096


@dataclass(frozen=True)
class Place:
    """Where to run, in Lightning Fabric's terms; `devices` are those of one node, a count or "auto"."""

    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        good = self.devices == "auto" or (isinstance(self.devices, int) and self.devices >= 1)
        if not good or isinstance(self.devices, bool):
            raise ValueError(f"devices must be a count or 'auto', got {self.devices!r}.")
        most = max(MOST_DEVICES, os.cpu_count() or 1)
        if self.devices != "auto" and self.devices > most:
            raise ValueError(f"devices can be at most {most} on this machine, got {self.devices!r:.20}: give fewer.")
        if not isinstance(self.num_nodes, int) or self.num_nodes < 1:
            raise ValueError(f"num_nodes must be at least 1, got {self.num_nodes!r:.20}.")
        if self.num_nodes > MOST_NODES:
            raise ValueError(f"num_nodes must be at most {MOST_NODES}, got {self.num_nodes!r:.20}.")
        if "mixed" in self.precision:
            raise ValueError(f"precision {self.precision!r} is for one device; use 'bf16-true' or '16-true'.")


class Way(Protocol):
    """One way to use several devices.

    Attributes:
        fabric: This process' device and precision. model: What it runs. team: The processes.
        divided: Whether each process answers prompts of its own; otherwise all answer all of them together.
    """

    divided: ClassVar[bool]
    fabric: L.Fabric
    model: GPT
    team: Team

    def __init__(self, config: Config, weights: Weights, place: Place) -> None: ...

    def mine(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the rows that this process answers."""

    def share(self, rows: Sequence[Row], mine: Sequence[Row], stats: Stats) -> list[Row]:
        """When its own rows have ended: fills the others', and returns them; `stats` then count all."""

    def meet(self, failure: str | None = None) -> None:
        """Waits for the other processes, or tells them that this one failed."""

    def close(self) -> None:
        """Ends the run; all processes must call it."""


class TensorParallel:
    """Every layer over all devices."""

    divided = False

    def __init__(self, config: Config, weights: Weights, place: Place) -> None:
        if isinstance(place.devices, int):  # said before anything is started
            divide(config, place.devices * place.num_nodes)
        run = launch(place.accelerator, place.devices, place.num_nodes, place.precision)
        self.fabric, self.team, self.close = run.fabric, run.team, run.end
        with run.fabric.init_tensor():
            self.model = shard(config, run.team, weights, device=run.fabric.device)

    def mine(self, rows: Sequence[Row]) -> list[Row]:
        return seeded(self.team, rows)

    def share(self, rows: Sequence[Row], mine: Sequence[Row], stats: Stats) -> list[Row]:
        return []

    def meet(self, failure: str | None = None) -> None:
        """They meet in every layer."""


class Sequential:
    """Layers over the devices of one process."""

    divided = False

    def __init__(self, config: Config, weights: Weights, place: Place) -> None:
        if place.num_nodes != 1:
            raise ValueError(f"'sequential' runs in one process on one machine, not on {place.num_nodes}.")
        self.team = Team()
        self.fabric = L.Fabric(accelerator=place.accelerator, devices=1, precision=place.precision)
        devices = local_devices(self.fabric.device, place.devices)
        places(config.n_layer, len(devices))
        with self.fabric.init_tensor():
            self.model = spread(config, devices, weights)

    def mine(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)

    def share(self, rows: Sequence[Row], mine: Sequence[Row], stats: Stats) -> list[Row]:
        return []

    def meet(self, failure: str | None = None) -> None:
        """One process has nobody to meet."""

    def close(self) -> None:
        """One process has nobody to wait for."""


class DataParallel:
    """The whole model on every device, and some of the prompts."""

    divided = True

    def __init__(self, config: Config, weights: Weights, place: Place) -> None:
        run = launch(place.accelerator, place.devices, place.num_nodes, place.precision)
        self._run, self.fabric, self.team, self.close = run, run.fabric, run.team, run.end
        with run.fabric.init_tensor():
            self.model = shard(config, Team(), weights, device=run.fabric.device)

    def mine(self, rows: Sequence[Row]) -> list[Row]:
        rows = seeded(self.team, rows)
        return [rows[b] for b in assign([row.sees for row in rows], self.team.size)[self.team.rank]]

    def share(self, rows: Sequence[Row], mine: Sequence[Row], stats: Stats) -> list[Row]:
        self.meet()  # however long the others take: a collective would give up
        parts = self.team.collect(([(row.index, row.answer) for row in mine], vars(stats)))
        _total(stats, [theirs for _, theirs in parts])
        by_index = {row.index: row for row in rows}
        others = []
        for rank, (answers, _) in enumerate(parts):
            for index, answer in answers if rank != self.team.rank else ():
                by_index[index].answer = answer
                others.append(by_index[index])
        return sorted(others, key=lambda row: row.index)

    def meet(self, failure: str | None = None) -> None:
        self._run.meet(failure)


def _total(stats: Stats, parts: list[dict[str, Any]]) -> None:
    """What several processes did side by side, as one run."""
    for name in ("prompt_tokens", "new_tokens", "prefill_tokens", "decode_tokens"):
        setattr(stats, name, sum(part[name] for part in parts))
    for name in ("prefill_seconds", "decode_seconds"):
        setattr(stats, name, max(part[name] for part in parts))


WAYS: dict[str, type[Way]] = {
    "tensor_parallel": TensorParallel,
    "sequential": Sequential,
    "data_parallel": DataParallel,
}


def way_of(name: str | None) -> type[Way]:
    """The way called `name`; an unknown or missing one is refused with their list."""
    if name is None:
        raise ValueError(f"Several devices need a generate_strategy: {', '.join(WAYS)}.")
    if name not in WAYS:
        raise ValueError(f"generate_strategy must be one of {', '.join(WAYS)}, got {name!r}.")
    return WAYS[name]


def seeded(team: Team, rows: Sequence[Row]) -> list[Row]:
    """With a seed all processes draw alike; rows without one get a seed that process 0 draws."""
    free = [row for row in rows if row.request.sampling.seed is None]
    drawn = team.same([random.SystemRandom().randrange(2**63) for _ in free]) if free else []
    for row, seed in zip(free, drawn):
        row.request = replace(row.request, sampling=replace(row.request.sampling, seed=seed))
    return list(rows)


def assign(lengths: Sequence[int], processes: int) -> list[list[int]]:
    """Which rows each process takes: the longest first, each to the one that has least to read so far."""
    out: list[list[int]] = [[] for _ in range(processes)]
    load = [(0, r) for r in range(processes)]
    for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        (tokens, r) = min(load)
        load[r] = (tokens + lengths[b], r)
        out[r].append(b)
    return [sorted(rows) for rows in out]


def local_devices(root: torch.device, devices: int | str) -> list[torch.device]:
    """The devices of one process, from a count or "auto"; a CPU stands in for any number."""
    there = torch.cuda.device_count() if root.type == "cuda" else 1
    count = there if devices == "auto" else int(devices)
    if count < 1 or (count > there and root.type != "cpu"):
        raise ValueError(f"There are {there} devices of type {root.type!r}, got {devices}.")
    return [torch.device("cuda", i) if root.type == "cuda" else root for i in range(count)]
