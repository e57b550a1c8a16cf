"""Peak memory of reading a prompt, of every strategy against a dense cache: `python tests/prefill_memory.py`.

What is counted is what the prefill allocates, and the cache; weights are not. The figures are exact on a processor, as
torch's profiler sees every allocation of a tensor. A random model of a few layers takes minutes for 8,192 tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # not this folder, whose `inspect` would stand for Python's

import torch
from torch.profiler import ProfilerActivity, profile

from litgpt.config import Config
from litgpt_kv import GPT, KVCache, KVCacheArgs, registry
from litgpt_kv.calibrate import query_centres, retrieval_gates, write_calibration

MOST = 1.2
MOST_OF_REREADERS = 1.5
VARIANTS = ["keydiff:pool", "keydiff:model", "kvzip:pool", "kvzip:model", "duo:model"]


def model_of(tokens: int, layers: int) -> GPT:
    """A random model, a third as wide as SmolLM2-135M with two thirds of its heads; its context is read twice."""
    torch.manual_seed(0)
    config = Config(
        name="memory", n_layer=layers, n_head=6, n_query_groups=2, n_embd=192, head_size=32, intermediate_size=512,
        padded_vocab_size=256, vocab_size=256, block_size=2 * tokens, mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm", rotary_percentage=1.0, parallel_residual=False, bias=False,
    )  # fmt: skip
    return GPT(config).eval().requires_grad_(False)


def calibrate(model: GPT, strategy: str, folder: str) -> str:
    """Write what a strategy needs to know of the model, measured on random tokens; return the file."""
    tokens = torch.randint(256, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    found = retrieval_gates(model, [(tokens, 20)]) if strategy == "duo" else query_centres(model, [tokens])
    path = Path(folder, f"{strategy}.safetensors")
    write_calibration(path, strategy, found)
    return str(path)


def peak_bytes(run: Any) -> int:
    """The most bytes that `run()` holds at once beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def measure(model: GPT, args: KVCacheArgs, tokens: int) -> tuple[int, int]:
    """Bytes of the cache, and the peak of a prefill with it."""
    cache = KVCache.build(model, args, 1, tokens + 1)
    idx = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        peak = peak_bytes(lambda: model(idx, cache, torch.tensor([tokens])))
    size = cache.allocated()["total"]
    return size, size + peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--budget", default="25%")
    parser.add_argument(
        "--caches", nargs="*", help="NAME or NAME:SELECT (default: every strategy and some ways to select)"
    )
    given = parser.parse_args()
    names = given.caches or [*registry.names("strategy"), *VARIANTS]
    model = model_of(given.tokens, given.layers)
    print(f"Prefill of {given.tokens:,} tokens, {given.layers} layers, budget {given.budget}, float32\n")
    print(f"{'cache':<22}{'cache MB':>10}{'peak MB':>10}{'of dense':>10}{'limit':>8}")
    dense, over, files = 0, [], tempfile.TemporaryDirectory()
    for name in ["dense", *(n for n in names if n != "dense")]:
        strategy, _, select = name.partition(":")
        kind = registry.build("strategy", strategy)
        options = {"calibration": calibrate(model, strategy, files.name)} if "calibration" in kind.needs else {}
        args = KVCacheArgs(strategy, given.budget if kind.evicts else None, select=select or None, options=options)
        size, peak = measure(model, args, given.tokens)
        dense = dense or peak
        limit = MOST_OF_REREADERS if kind.rereads else MOST
        over += [name] if peak > limit * dense else []
        print(f"{name:<22}{size / 1e6:>10.1f}{peak / 1e6:>10.1f}{peak / dense:>10.2f}{limit:>8}", flush=True)
    print(f"\nOver their limits: {', '.join(over) or 'none'}.")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
