"""Data parallel: every device has the whole model and answers a share of the prompts."""

from __future__ import annotations

from collections import abc
from typing import Any

from litgpt.config import Config
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.parallel.base import DeviceRequest, Weights, seed_requests
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.launch import launch
from litgpt_kv.parallel.tensor import load_tensor_parallel


class DataParallel:
    """Run the whole model on every device, each for a share of the prompts."""

    divides_prompts = True

    def __init__(self, config: Config, weights: Weights, request: DeviceRequest) -> None:
        run = launch(request)
        self._run, self.fabric, self.collectives, self.close = run, run.fabric, run.collectives, run.end
        with run.fabric.init_tensor():
            self.model = load_tensor_parallel(config, Collectives(), weights, device=run.fabric.device)

    def own_requests(self, requests: abc.Sequence[Request]) -> list[Request]:
        requests = seed_requests(self.collectives, requests)
        shares = assign_prompts([request.cache_tokens for request in requests], self.collectives.size)
        return [requests[b] for b in shares[self.collectives.rank]]

    def exchange_answers(
        self, requests: abc.Sequence[Request], answered: abc.Sequence[Sequence], stats: Stats
    ) -> list[Sequence]:
        self.synchronize()  # without a timeout, which a collective has
        parts = self.collectives.all_gather_object(([(s.index, s.answer) for s in answered], vars(stats)))
        _set_total(stats, [part_stats for _, part_stats in parts])
        by_id = {request.id: request for request in requests}
        others = []
        for rank, (answers, _) in enumerate(parts):
            for number, answer in answers if rank != self.collectives.rank else ():
                sequence = Sequence(by_id[number], number)
                sequence.answer = answer
                others.append(sequence)
        return sorted(others, key=lambda sequence: sequence.index)

    def synchronize(self, failure: str | None = None) -> None:
        self._run.synchronize(failure)


def _set_total(stats: Stats, parts: list[dict[str, Any]]) -> None:
    """Set `stats` to those of all processes: the sums of tokens, and the longest seconds."""
    for name in ("prompt_tokens", "new_tokens", "prefill_tokens", "decode_tokens"):
        setattr(stats, name, sum(part[name] for part in parts))
    for name in ("prefill_seconds", "decode_seconds", "compile_seconds"):
        setattr(stats, name, max(part[name] for part in parts))


def assign_prompts(lengths: abc.Sequence[int], processes: int) -> list[list[int]]:
    """Assign requests to processes: the longest first, each to the process with the fewest tokens so far.

    Returns:
        For each process the indices of its requests, ascending.
    """
    out: list[list[int]] = [[] for _ in range(processes)]
    load = [(0, r) for r in range(processes)]
    for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        tokens, r = min(load)
        load[r] = (tokens + lengths[b], r)
        out[r].append(b)
    return [sorted(rows) for rows in out]
