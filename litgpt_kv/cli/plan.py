"""`litgpt_kv plan`: compute how much memory a model and its cache need on how many devices, without loading it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from litgpt.config import Config, name_to_config
from litgpt_kv.arguments import check_count
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.quantize import DTYPES
from litgpt_kv.parallel import PARALLEL_STRATEGIES
from litgpt_kv.parallel.memory import cache_bytes, weight_bytes
from litgpt_kv.registry import did_you_mean

UNITS = {"GB": 10**9, "MB": 10**6}
SMALL = 10**9  # bytes of all weights and a dense cache, below which the table has MB
CACHE = KVCacheArgs("h2o", budget="10%")
MOST_DEVICES = 65_536


def plan(
    model: str,
    *,
    devices: int = 8,
    memory: float = 80.0,
    context: int | None = None,
    batch_size: int = 1,
    kv_cache: KVCacheArgs = CACHE,
    precision: str = "bf16-true",
) -> None:
    """Show the memory that each device needs, for every parallel strategy and up to so many devices.

    Args:
        model: A checkpoint folder, or the name of one of litgpt's configs, with or without the organisation, as in
            EleutherAI/pythia-14m. Below 1 GB the table has MB.
        devices: The most devices.
        memory: The memory of one device, in GB (10^9 bytes).
        context: The most tokens of a row, prompt included; by default the model's context.
        batch_size: The number of rows.
        kv_cache: A cache to compare with the dense one; by default h2o with a tenth of the context.
        precision: The precision of weights and cache: bf16-true, 16-true or 32-true.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}.")
    check_count("devices", devices, 1, MOST_DEVICES)
    check_count("batch_size", batch_size, 1, 2**31 - 1)
    if not 0 < memory < 1e9:
        raise ValueError(f"memory must be more than 0 and less than 1e9 GB, got {memory}.")
    if context is not None:
        check_count("context", context, 1, 2**31 - 1)
    config = _config_of(model)
    context, dtype = context or config.block_size, DTYPES[precision]
    kinds = [KVCacheArgs("dense")] + ([] if kv_cache.strategy in ("none", "dense") else [kv_cache])
    unit = _unit(config, kinds, batch_size, context, dtype)
    names = [_name(args, unit) for args in kinds]
    rows = "1 row" if batch_size == 1 else f"{batch_size} rows"
    print(f"Computed, not measured: {config.name}, {precision}, {rows} of {context:,} tokens.")
    bytes_each = {"GB": "10^9 bytes", "MB": "10^6 bytes"}[unit]
    what = f"{unit} ({bytes_each}) on the device that needs most"
    print(f"{what}; rows: how many rows of that length fit into {memory:g} GB.")
    layout = "{:<16}{:>8}{:>10}" + " {:>15} {:>8} {:>7}" * len(kinds)
    print(layout.format("parallel", "devices", "weights", *(x for name in names for x in (name, "total", "rows"))))
    refused: dict[str, str] = {}
    counts = [n for n in (2**i for i in range(devices.bit_length())) if n < devices] + [devices]
    for strategy in PARALLEL_STRATEGIES:
        for count in counts if strategy == next(iter(PARALLEL_STRATEGIES)) else [n for n in counts if n > 1]:
            try:
                weights = weight_bytes(config, strategy, count, dtype)
            except ValueError as error:
                print(f"{strategy:<16}{count:>8}  {error}")
                continue
            cells: list[str] = []
            for name, args in zip(names, kinds):
                try:
                    cells += _cells(config, strategy, count, args, batch_size, context, dtype, weights, memory, unit)
                except ValueError as error:  # as a dense cache that is longer than the model's context
                    cells += ["-", "-", "-"]
                    where = "" if count == 1 else f"{strategy}, "
                    refused.setdefault(str(error), f"{where}{name.removesuffix(f' {unit}')}")
            print(
                layout.format(
                    "one device" if count == 1 else strategy, count, f"{max(weights) / UNITS[unit]:.2f}", *cells
                )
            )
    for why, what in refused.items():
        print(f"- {what}: {why}")
    print("Not counted: activations (hidden states and logits of the longest prompt), and the libraries.")


def _cells(
    config: Config,
    strategy: str,
    count: int,
    args: KVCacheArgs,
    batch_size: int,
    context: int,
    dtype: torch.dtype,
    weights: list[int],
    memory: float,
    unit: str,
) -> list[str]:
    """Return three cells of the table: size of the cache, size in total (with ! if too large), rows that fit."""
    cache = cache_bytes(config, strategy, count, args, batch_size, context, dtype)
    fullest = max(range(count), key=lambda d: weights[d] + cache[d])
    row = cache_bytes(config, strategy, count, args, 1, context, dtype)
    rows = min(int((memory * UNITS["GB"] - w) // r) for w, r in zip(weights, row))
    rows = max(0, rows) * (count if strategy == "data_parallel" else 1)
    total = weights[fullest] + cache[fullest]
    fits = "" if total <= memory * UNITS["GB"] else "!"
    return [f"{cache[fullest] / UNITS[unit]:.3f}", f"{total / UNITS[unit]:.2f}{fits}", str(rows)]


def _config_of(model: str) -> Config:
    """Return the config of a name or of a checkpoint folder.

    Raises:
        ValueError: If it is neither; the message has the most similar name.
    """
    name = model.rpartition("/")[2]
    if model in name_to_config or (name in name_to_config and not Path(model).is_dir()):
        return Config.from_name(model if model in name_to_config else name)
    try:
        return checkpoint.load_config(checkpoint.find(model))
    except ValueError as error:
        if name and not Path(model).exists():
            hint = did_you_mean(name, name_to_config) or " `litgpt_kv download list` shows the names of configs."
            raise ValueError(f"{str(error).partition(' Did you mean')[0]}{hint}") from error
        raise


def _unit(config: Config, kinds: list[KVCacheArgs], batch_size: int, context: int, dtype: torch.dtype) -> str:
    """Return the unit in which the numbers of the table can be read."""
    size = max(weight_bytes(config, "data_parallel", 1, dtype))
    for args in kinds:
        with contextlib.suppress(ValueError):  # a cache that cannot be
            size = max(size, *cache_bytes(config, "data_parallel", 1, args, batch_size, context, dtype))
    return "MB" if size < SMALL else "GB"


def _name(args: KVCacheArgs, unit: str) -> str:
    strategy = args.strategy if isinstance(args.strategy, str) else "mixed"
    budget = "" if args.budget is None or isinstance(args.budget, (list, tuple)) else f" {args.budget}"
    return f"{strategy}{budget} {unit}"
