"""`litgpt_kv benchmark --devices 2`: compare one process with several, and measure their communication."""

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
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs, split_name
from litgpt_kv.model.packed import pack
from litgpt_kv.parallel import DeviceRequest
from litgpt_kv.parallel.collectives import Collectives, CollectiveTimer
from litgpt_kv.parallel.heads import divide_heads
from litgpt_kv.parallel.launch import launch
from litgpt_kv.parallel.tensor import load_tensor_parallel

MB = 1_000_000

DEFAULT = ["dense", "h2o", "sink", "window"]  # strategies that run unless others are named


@dataclass
class Contender:
    """A model on one process or divided among several, with one kind of cache, and its measurements.

    Attributes:
        step_seconds: Seconds a token, of each repetition.
        communication_seconds: The part of them that was spent in collectives.
        calls, bytes: Collectives a token, and the bytes passed to them.
    """

    strategy: str
    processes: int
    model: GPT
    cache: KVCache
    collectives: Collectives
    threads: int
    step_seconds: list[float] = field(default_factory=list)
    communication_seconds: list[float] = field(default_factory=list)
    calls: float = 0.0
    bytes: float = 0.0

    @torch.inference_mode()
    def run(self, tokens: Tensor, context: int, keep: bool) -> None:
        """Read `context` of the tokens (B, T) and decode the others; with `keep`, keep the measurements."""
        torch.set_num_threads(self.threads)
        steps, device = tokens.size(1) - context, tokens.device
        self.cache.reset()
        self.model(tokens[:, :context], self.cache, torch.full((len(tokens),), context, device=device))
        self.collectives.barrier()
        _synchronise(device)
        timer = self.collectives.timer = CollectiveTimer(device)
        began = time.perf_counter()
        for pos in range(context, tokens.size(1)):
            self.model(tokens[:, pos : pos + 1], self.cache)
        _synchronise(device)
        seconds, self.collectives.timer = time.perf_counter() - began, None
        if keep:
            self.step_seconds.append(seconds / steps)
            self.communication_seconds.append(timer.seconds / steps)
            self.calls, self.bytes = timer.calls / steps, timer.bytes / steps

    def row(self, context: int) -> dict[str, Any]:
        """Return the row of the report."""
        best = min(range(len(self.step_seconds)), key=self.step_seconds.__getitem__)
        seconds, communication = self.step_seconds[best], self.communication_seconds[best]
        return {
            "cache": self.strategy,
            "context": context,
            "processes": self.processes,
            "token_ms": [1e3 * seconds, 1e3 * statistics.median(self.step_seconds)],
            "compute_ms": 1e3 * (seconds - communication),
            "communication_ms": 1e3 * communication,
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
    """Start the processes, measure, and print a table; return the report on process 0, None on the others."""
    if isinstance(request.devices, int):
        divide_heads(config, request.devices * request.num_nodes)
    run = launch(request)
    collectives, device = run.collectives, run.fabric.device
    hidden = True if collectives.rank else None  # None: show the bar if standard error is a terminal
    with run.fabric.init_tensor():
        if weights is None:
            torch.manual_seed(0)
            weights = GPT(config).state_dict()
        part = load_tensor_parallel(config, collectives, weights, device=device)
        whole = load_tensor_parallel(config, Collectives(), weights, device=device) if collectives.rank == 0 else None
    for model in (part, whole):
        if model is not None:
            pack(model)
    tokens = torch.randint(config.vocab_size, (batch_size, max(contexts) + steps), device=device)
    tokens = collectives.all_reduce(tokens if collectives.rank == 0 else torch.zeros_like(tokens))
    own_threads = threads or torch.get_num_threads()  # this process' share of the cores
    report = {"model": config.name, "device": str(device), "processes": collectives.size, "rows": []}
    names = strategies or DEFAULT
    if "none" in names:
        raise ValueError("The strategy 'none' keeps nothing that several devices could share: leave it out.")
    with tqdm(total=len(contexts) * len(names) * repeats, file=sys.stderr, disable=hidden, leave=False) as bar:
        for context in contexts:
            rows = []
            for name in names:
                args = cache_args(name, budget)

                def contender(
                    model: GPT,
                    group: Collectives,
                    threads: int,
                    args: KVCacheArgs = args,
                    size: int = context,
                    label: str = name,
                ) -> Contender:
                    cache = KVCache.build(model, args, batch_size, size + steps)
                    return Contender(label, group.size, model, cache, group, threads)

                alone = None if whole is None else contender(whole, Collectives(), threads or os.cpu_count() or 1)
                together = contender(part, collectives, own_threads)
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


def cache_args(name: str, budget: int | str) -> KVCacheArgs:
    """Return the arguments for a cache's name: NAME[:SELECT][@STORAGE], as in h2o:pool, dense@int8 or my_file.py:Mine.

    Raises:
        ValueError: For an unknown name, or options that there are not.
    """
    strategy, select, storage = split_name(name)
    size = budget if registry.get("strategy", strategy).evicts else None
    return KVCacheArgs(strategy, size, select=select, storage=storage or "plain")


def name_width(rows: list[dict[str, Any]]) -> int:
    """Return the width of a table's first column."""
    return max(10, *(len(row["cache"]) + 1 for row in rows))


def _largest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return process 0's row, with the most bytes of any process."""
    return {**rows[0], **{k: max(row[k] for row in rows) for k in ("weight_bytes", "cache_bytes")}}


def _print(rows: list[dict[str, Any]], repeats: int) -> None:
    title = f"{rows[0]['context']:,} tokens of context; token time, best and median of {repeats}; parts of the best"
    print(f"\n{title}")
    layout = f"{{:<{name_width(rows)}}}" + "{:>10}{:>18}{:>12}{:>15}{:>13}{:>10}{:>13}{:>11}"
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
