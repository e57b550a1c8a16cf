"""What all parallel strategies have in common: the request for devices, and their interface."""

from __future__ import annotations

import os
import random
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import lightning as L
from torch import Tensor

from litgpt.config import Config
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel.collectives import Collectives

Weights = Mapping[str, Tensor]
MOST_DEVICES = 16  # of one machine, unless it has more processor cores: on a CPU each is a process of its own
MOST_NODES = 4096


@dataclass(frozen=True)
class DeviceRequest:
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
            raise ValueError(f"devices must be at most {most} on this machine, got {self.devices!r:.20}.")
        if not isinstance(self.num_nodes, int) or self.num_nodes < 1:
            raise ValueError(f"num_nodes must be at least 1, got {self.num_nodes!r:.20}.")
        if self.num_nodes > MOST_NODES:
            raise ValueError(f"num_nodes must be at most {MOST_NODES}, got {self.num_nodes!r:.20}.")
        if "mixed" in self.precision:
            raise ValueError(f"precision {self.precision!r} is for one device; use 'bf16-true' or '16-true'.")


class ParallelStrategy(Protocol):
    """One way to use several devices.

    Attributes:
        fabric: This process' device and precision. model: What it runs. collectives: The processes.
        divides_prompts: Whether each process answers prompts of its own; otherwise all answer all of them together.
    """

    divides_prompts: ClassVar[bool]
    fabric: L.Fabric
    model: GPT
    collectives: Collectives

    def __init__(self, config: Config, weights: Weights, request: DeviceRequest) -> None: ...

    def own_requests(self, requests: abc.Sequence[Request]) -> list[Request]:
        """Those of the requests that this process answers; all have an id."""

    def exchange_answers(
        self, requests: abc.Sequence[Request], answered: abc.Sequence[Sequence], stats: Stats
    ) -> list[Sequence]:
        """When its own requests were answered: the answers of the other processes; `stats` then count all."""

    def synchronize(self, failure: str | None = None) -> None:
        """Waits for the other processes, or tells them that this one failed."""

    def close(self) -> None:
        """Ends the run; all processes must call it."""


def seed_requests(collectives: Collectives, requests: abc.Sequence[Request]) -> list[Request]:
    """With a seed all processes draw alike; requests without one get a seed that process 0 draws."""
    free = [request for request in requests if request.sampling.seed is None]
    seeds = [random.SystemRandom().randrange(2**63) for _ in free]
    drawn = iter(collectives.broadcast_object(seeds) if free else [])
    return [
        replace(r, sampling=replace(r.sampling, seed=next(drawn))) if r.sampling.seed is None else r for r in requests
    ]
