"""The ways to use several devices, by litgpt's names. Floor 5.

A way loads the model, or this process' part of it, and runs a batch. A new one is a class here and a line in `WAYS`.

B rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor

from litgpt.config import Config
from litgpt_kv.config import SamplingArgs, per_row
from litgpt_kv.generate import Stats
from litgpt_kv.model import GPT
from litgpt_kv.parallel.heads import divide
from litgpt_kv.parallel.launch import launch
from litgpt_kv.parallel.sequential import places, spread
from litgpt_kv.parallel.team import Team
from litgpt_kv.parallel.tensor import shard

Steps = Iterator[list[list[int]]]
Work = Callable[[list[Tensor], SamplingArgs], tuple[Steps, Stats]]  # some prompts: `stream`'s steps, and what they did


Weights = Mapping[str, Tensor]


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
        if self.num_nodes < 1:
            raise ValueError(f"num_nodes must be at least 1, got {self.num_nodes}.")
        if "mixed" in self.precision:
            raise ValueError(f"precision {self.precision!r} is for one device; use 'bf16-true' or '16-true'.")


class Way(Protocol):
    """One way to use several devices.

    Attributes:
        fabric: This process' device and precision. model: What it runs. team: The processes.
    """

    fabric: L.Fabric
    model: GPT
    team: Team

    def __init__(self, config: Config, weights: Weights, place: Place) -> None: ...

    def steps(self, work: Work, prompts: list[Tensor], sampling: SamplingArgs) -> Steps:
        """Runs a batch; every process gives the same tokens."""

    def close(self) -> None:
        """Ends the run; all processes must call it."""


class TensorParallel:
    """Every layer over all devices."""

    def __init__(self, config: Config, weights: Weights, place: Place) -> None:
        if isinstance(place.devices, int):  # said before anything is started
            divide(config, place.devices * place.num_nodes)
        run = launch(place.accelerator, place.devices, place.num_nodes, place.precision)
        self.fabric, self.team, self.close = run.fabric, run.team, run.end
        with run.fabric.init_tensor():
            self.model = shard(config, run.team, weights, device=run.fabric.device)

    def steps(self, work: Work, prompts: list[Tensor], sampling: SamplingArgs) -> Steps:
        return work(prompts, seeded(self.team, sampling, len(prompts)))[0]


class Sequential:
    """Layers over the devices of one process."""

    def __init__(self, config: Config, weights: Weights, place: Place) -> None:
        if place.num_nodes != 1:
            raise ValueError(f"'sequential' runs in one process on one machine, not on {place.num_nodes}.")
        self.team = Team()
        self.fabric = L.Fabric(accelerator=place.accelerator, devices=1, precision=place.precision)
        devices = local_devices(self.fabric.device, place.devices)
        places(config.n_layer, len(devices))
        with self.fabric.init_tensor():
            self.model = spread(config, devices, weights)

    def steps(self, work: Work, prompts: list[Tensor], sampling: SamplingArgs) -> Steps:
        return work(prompts, sampling)[0]

    def close(self) -> None:
        """One process has nobody to wait for."""


class DataParallel:
    """The whole model on every device, and some of the prompts."""

    def __init__(self, config: Config, weights: Weights, place: Place) -> None:
        run = launch(place.accelerator, place.devices, place.num_nodes, place.precision)
        self.fabric, self.team, self.close = run.fabric, run.team, run.end
        with run.fabric.init_tensor():
            self.model = shard(config, Team(), weights, device=run.fabric.device)

    def steps(self, work: Work, prompts: list[Tensor], sampling: SamplingArgs) -> Steps:
        sampling = seeded(self.team, sampling, len(prompts))
        mine = assign([len(p) for p in prompts], self.team.size)[self.team.rank]
        rows = mine or [0]  # one without work repeats another's, unheard, so that all go the same way
        steps, stats = work([prompts[b] for b in rows], _of_rows(sampling, rows, len(prompts)))
        return self._gathered(steps, stats, mine, len(prompts))

    def _gathered(self, steps: Steps, stats: Stats, mine: list[int], count: int) -> Steps:
        """All rows' tokens in one step, in the order of the prompts."""
        made: list[list[int]] = [[] for _ in mine or [0]]
        for step in steps:
            for row, tokens in zip(made, step):
                row += tokens
        parts = [part for part in self.team.collect((mine, made, vars(stats))) if part[0]]
        _total(stats, [theirs for *_, theirs in parts])
        out: list[list[int]] = [[] for _ in range(count)]
        stats.reasons = [None] * count
        for rows, tokens, theirs in parts:
            for b, row, reason in zip(rows, tokens, theirs["reasons"]):
                out[b], stats.reasons[b] = row, reason
        yield out


def _total(stats: Stats, parts: list[dict[str, Any]]) -> None:
    """What several processes did side by side, as one run."""
    for name in ("prompt_tokens", "new_tokens", "prefill_tokens", "decode_tokens"):
        setattr(stats, name, sum(part[name] for part in parts))
    for name in ("prefill_seconds", "decode_seconds"):
        setattr(stats, name, max(part[name] for part in parts))


WAYS: dict[str, type[Way]] = {
    "tensor_parallel": TensorParallel,
    "sequential": Sequential,
    "data_parallel": DataParallel,  # one batch a process; a file of prompts in turns belongs to `generate.batching`
}


def way_of(name: str | None) -> type[Way]:
    """The way called `name`; an unknown or missing one is refused with their list."""
    if name is None:
        raise ValueError(f"Several devices need a generate_strategy: {', '.join(WAYS)}.")
    if name not in WAYS:
        raise ValueError(f"generate_strategy must be one of {', '.join(WAYS)}, got {name!r}.")
    return WAYS[name]


def seeded(team: Team, sampling: SamplingArgs, batch_size: int) -> SamplingArgs:
    """With a seed all processes draw alike; without one, process 0 draws seeds for all, one a row."""
    seeds = per_row("seed", sampling.seed, batch_size)
    if None not in seeds:
        return sampling
    drawn = [random.SystemRandom().randrange(2**63) if s is None else s for s in seeds]
    return replace(sampling, seed=team.same(drawn))


def _of_rows(sampling: SamplingArgs, rows: list[int], batch_size: int) -> SamplingArgs:
    values = {n: per_row(n, getattr(sampling, n), batch_size) for n in ("temperature", "top_k", "top_p", "seed")}
    return SamplingArgs(**{name: [value[b] for b in rows] for name, value in values.items()})


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
