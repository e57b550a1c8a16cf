"""`litgpt_kv benchmark --devices 2`: one process beside several, computing and talking apart."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from litgpt.config import Config
from litgpt_kv import registry
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.plan import ready_strategies
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.parallel import DeviceRequest
from litgpt_kv.parallel.collectives import Collectives, CollectiveTimer
from litgpt_kv.parallel.heads import divide_heads
from litgpt_kv.parallel.launch import launch
from litgpt_kv.parallel.tensor import load_tensor_parallel

MB = 1_000_000


@dataclass
class Side:
    """A model, whole on one process or divided, with a cache of one kind."""

    strategy: str
    processes: int
    model: GPT
    cache: KVCache
    collectives: Collectives
    threads: int
    step: list[float] = field(default_factory=list)  # seconds a token
    talk: list[float] = field(default_factory=list)  # of these, in collectives
    calls: float = 0.0
    bytes: float = 0.0

    @torch.inference_mode()
    def run(self, tokens: Tensor, context: int, keep: bool) -> None:
        """Reads `context` tokens (B, T) and times the others, one at a time."""
        torch.set_num_threads(self.threads)
        steps, device = tokens.size(1) - context, tokens.device
        self.cache.reset()
        self.model(tokens[:, :context], self.cache, torch.full((len(tokens),), context, device=device))
        self.collectives.barrier()
        _synchronise(device)
        clock = self.collectives.timer = CollectiveTimer(device)
        began = time.perf_counter()
        for at in range(context, tokens.size(1)):
            self.model(tokens[:, at : at + 1], self.cache)
        _synchronise(device)
        seconds, self.collectives.timer = time.perf_counter() - began, None
        if keep:
            self.step.append(seconds / steps)
            self.talk.append(clock.seconds / steps)
            self.calls, self.bytes = clock.calls / steps, clock.bytes / steps

    def row(self, context: int) -> dict[str, Any]:
        best = min(range(len(self.step)), key=self.step.__getitem__)
        return {
            "cache": self.strategy,
            "context": context,
            "processes": self.processes,
            "token_ms": [1e3 * self.step[best], 1e3 * statistics.median(self.step)],
            "compute_ms": 1e3 * (self.step[best] - self.talk[best]),
            "communication_ms": 1e3 * self.talk[best],
            "collectives": self.calls,
            "communication_bytes": self.bytes,
            "weight_bytes": sum(p.nbytes for p in self.model.parameters()),
            "cache_bytes": self.cache.allocated()["total"],
        }


def compare(
    config: Config,
    weights: Mapping[str, Tensor] | None,
    request: DeviceRequest,
    contexts: Sequence[int],
    strategies: Sequence[str] | None,
    budget: int | str,
    batch_size: int,
    steps: int,
    repeats: int,
    threads: int | None = None,
) -> dict[str, Any] | None:
    """Launches the processes, measures, prints a table; the report, or None on all processes but the first."""
    if isinstance(request.devices, int):
        divide_heads(config, request.devices * request.num_nodes)
    run = launch(request)
    collectives, device = run.collectives, run.fabric.device
    hidden = True if collectives.rank else None  # None: a bar on terminals only
    with run.fabric.init_tensor():
        if weights is None:
            torch.manual_seed(0)
            weights = GPT(config).state_dict()
        part = load_tensor_parallel(config, collectives, weights, device=device)
        whole = load_tensor_parallel(config, Collectives(), weights, device=device) if collectives.rank == 0 else None
    tokens = torch.randint(config.vocab_size, (batch_size, max(contexts) + steps), device=device)
    tokens = collectives.all_reduce(tokens if collectives.rank == 0 else torch.zeros_like(tokens))
    share = threads or torch.get_num_threads()  # of the machine's cores
    report = {"model": config.name, "device": str(device), "processes": collectives.size, "rows": []}
    names = strategies or ready_strategies()
    with tqdm(total=len(contexts) * len(names) * repeats, file=sys.stderr, disable=hidden, leave=False) as bar:
        for context in contexts:
            rows = []
            for name in names:
                args = KVCacheArgs(name, budget=budget if registry.get("strategy", name).evicts else None)

                def side(
                    model: GPT, of: Collectives, threads: int, args: KVCacheArgs = args, size: int = context
                ) -> Side:
                    cache = KVCache.build(model, args, batch_size, size + steps)
                    return Side(args.strategy, of.size, model, cache, of, threads)

                alone = None if whole is None else side(whole, Collectives(), threads or os.cpu_count() or 1)
                together = side(part, collectives, share)
                for i in range(repeats + 1):  # the first round warms up
                    if alone is not None:
                        alone.run(tokens[:, : context + steps], context, keep=i > 0)
                    collectives.barrier()
                    together.run(tokens[:, : context + steps], context, keep=i > 0)
                    bar.update(i > 0)
                rows += [] if alone is None else [alone.row(context)]
                rows.append(_largest(collectives.all_gather_object(together.row(context))))
            report["rows"] += rows
            bar.clear()
            if collectives.rank == 0:
                _print(rows, repeats)
    return report if collectives.rank == 0 else None


def _largest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Process 0's times, and the bytes of the process that holds most."""
    return {**rows[0], **{k: max(row[k] for row in rows) for k in ("weight_bytes", "cache_bytes")}}


def _print(rows: list[dict[str, Any]], repeats: int) -> None:
    print(f"\n{rows[0]['context']:,} tokens of context; a token's time, best and median of {repeats}; the best apart")
    layout = "{:<10}{:>10}{:>18}{:>12}{:>15}{:>13}{:>10}{:>13}{:>11}"
    heads = (
        "cache",
        "processes",
        "token ms",
        "compute ms",
        "communic. ms",
        "collectives",
        "KB",
        "weights MB",
        "cache MB",
    )
    print(layout.format(*heads))
    for r in rows:
        print(
            layout.format(
                r["cache"],
                r["processes"],
                "{:.2f} {:.2f}".format(*r["token_ms"]),
                f"{r['compute_ms']:.2f}",
                f"{r['communication_ms']:.2f}",
                f"{r['collectives']:.0f}",
                f"{r['communication_bytes'] / 1e3:.1f}",
                f"{r['weight_bytes'] / MB:.1f}",
                f"{r['cache_bytes'] / MB:.2f}",
            )
        )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
