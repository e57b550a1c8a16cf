"""The interface of parallel strategies, and the devices that a user asks for."""

from __future__ import annotations

import random
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import lightning as L
from torch import Tensor

from litgpt.config import Config
from litgpt_kv.arguments import MOST_DEVICES, MOST_NODES, cores
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel.collectives import Collectives

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class DeviceRequest:
    """The devices of a run, in Lightning Fabric's terms; `devices` is the number on one machine, or "auto"."""

    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    precision: str = "32-true"

    def __post_init__(self) -> None:
        is_valid = self.devices == "auto" or (isinstance(self.devices, int) and self.devices >= 1)
        if not is_valid or isinstance(self.devices, bool):
            raise ValueError(f"devices must be a number or 'auto', got {self.devices!r}.")
        most = max(16, 4 * cores()) if self.accelerator == "cpu" else MOST_DEVICES
        if self.devices != "auto" and self.devices > most:
            raise ValueError(f"devices must be at most {most} on this machine, got {self.devices!r:.20}.")
        if not isinstance(self.num_nodes, int) or self.num_nodes < 1:
            raise ValueError(f"num_nodes must be at least 1, got {self.num_nodes!r:.20}.")
        if self.num_nodes > MOST_NODES:
            raise ValueError(f"num_nodes must be at most {MOST_NODES}, got {self.num_nodes!r:.20}.")
        if "mixed" in self.precision:
            raise ValueError(f"precision {self.precision!r} is for one device; use 'bf16-true' or '16-true'.")


class ParallelStrategy(Protocol):
    """A way to divide the work among several devices.

    Attributes:
        fabric: The device and precision of this process.
        model: Its model or part of the model.
        collectives: The communication with the other processes.
        divides_prompts: Whether each process answers a share of the prompts; else all work on all prompts together.
    """

    divides_prompts: ClassVar[bool]
    fabric: L.Fabric
    model: GPT
    collectives: Collectives

    def __init__(self, config: Config, weights: Weights, request: DeviceRequest) -> None: ...

    def own_requests(self, requests: abc.Sequence[Request]) -> list[Request]:
        """Return the requests that this process answers; all have an id."""

    def exchange_answers(
        self, requests: abc.Sequence[Request], answered: abc.Sequence[Sequence], stats: Stats
    ) -> list[Sequence]:
        """Return the answers of the other processes, and add their work to `stats`.

        Each process calls it when it has answered its own requests.
        """

    def synchronize(self, failure: str | None = None) -> None:
        """Wait for the other processes, or with `failure` tell them that this one failed."""

    def close(self) -> None:
        """End the run; all processes must call it."""


def seed_requests(collectives: Collectives, requests: abc.Sequence[Request]) -> list[Request]:
    """Give requests without a seed one that process 0 draws, so that all processes draw the same tokens."""
    unseeded = [request for request in requests if request.sampling.seed is None]
    seeds = [random.SystemRandom().randrange(2**63) for _ in unseeded]
    drawn = iter(collectives.broadcast_object(seeds) if unseeded else [])
    return [
        replace(r, sampling=replace(r.sampling, seed=next(drawn))) if r.sampling.seed is None else r for r in requests
    ]
