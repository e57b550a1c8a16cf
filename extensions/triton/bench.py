"""Check and time the Triton kernels on an NVIDIA GPU: python extensions/triton/bench.py --out result.json

Three parts, each against what the same run measures: the bandwidth of a copy. (1) One decode step of attention equals
the plain PyTorch one in float64, for each storage. (2) Attention alone, at the shapes of Llama-3-8B. (3) A whole model
of these shapes with random weights, bfloat16: its decode steps wait for nothing (`torch.cuda.set_sync_debug_mode`), and
take so long, from a CUDA graph. All times are of events on the device, best and median of `repeats` interleaved runs.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from jsonargparse import auto_cli
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # the extension need not be installed

import litgpt_kv_triton

from litgpt_kv import GPT, KVCache, KVCacheArgs, Storage, registry
from litgpt_kv.attention.kernels import Eager
from litgpt_kv.benchmark.decode import Shape
from litgpt_kv.generate.compiled import CompiledDecoder

STORAGES = ("plain", "int8", "int4", "int4-hadamard", "k8v4", "float8")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of the largest number
HEAD = 128  # elements of Llama-3-8B's heads
CONTENDERS = (
    ("dense", "dense", "triton"),
    ("dense, compiled", "dense", "triton"),
    ("window", "window", "triton"),
    ("h2o", "h2o", "triton"),
    ("h2o, compiled", "h2o", "triton"),
    ("h2o, eager", "h2o", "eager"),
)
MOST_EAGER = 16384  # tokens of a prompt; plain PyTorch takes minutes for what longer ones receive
MOST = 4_000_000_000  # bytes of the keys and values that attention alone is timed with, of a plain storage


class Spec:
    """What a kernel reads of a layer."""

    scale, softcap, latent, rope_size = HEAD**-0.5, None, False, HEAD


class View:
    """What a kernel reads of a step; see `litgpt_kv.cache.views.DecodeView`."""

    spec, key_angles, sink_queries, value_padding = Spec(), None, None, False

    def __init__(self, extent: int, mask: Tensor | None, per_group: int) -> None:
        self.extent, self.mask, self.per_group = extent, mask, per_group


class Clock:
    """Times calls by events on a GPU, on a processor by its clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def compare(self, calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, dict[str, float]]:
        """Seconds of each call, best and median of interleaved runs, the first of which does not count."""
        times: dict[Any, list[float]] = {name: [] for name in calls}
        for number in range(repeats + 1):
            for name, call in calls.items():
                took = self.seconds(call)
                if number:
                    times[name].append(took)
        return {name: {"best_s": min(t), "median_s": statistics.median(t)} for name, t in times.items()}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"device": card.name, "multiprocessors": card.multi_processor_count, "bytes": card.total_memory}
        found |= {"capability": f"{card.major}.{card.minor}"}
    return found


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as a CUDA graph, so that no time is spent on launching; on a processor the call."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(kept: Callable[[], Any] = call) -> None:  # the graph needs the memory that the call refers to
        graph.replay()

    return replay


def copy_bandwidth(clock: Clock, repeats: int) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB (on a processor 16 MiB)."""
    x = torch.ones(2**30 if clock.device.type == "cuda" else 2**24, dtype=torch.uint8, device=clock.device)
    y = torch.empty_like(x)
    return 2 * x.numel() / clock.compare({"": lambda: y.copy_(x)}, repeats)[""]["best_s"]


def storages(name: str, batch: int, sets: int, slots: int, dtype: torch.dtype, device: torch.device) -> list[Storage]:
    """Keys and values, filled with random numbers."""
    made = []
    for role in ("keys", "values"):
        store = registry.build("storage", name, role, (batch, sets, slots, HEAD), dtype, device)
        slot = torch.arange(slots, device=device).expand(batch, 1, -1)
        store.write(slot, torch.randn(batch, sets, slots, HEAD, dtype=dtype, device=device))
        made.append(store)
    return made


@torch.no_grad()
def check(device: torch.device, slots: int) -> Iterator[dict[str, Any]]:
    """Compare a step with the plain PyTorch one in float64: rows of errors, as shares of the largest number."""
    kernel = litgpt_kv_triton.Triton()
    half = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16
    for dtype in (torch.float32, half):
        for name in STORAGES:
            for pooled in (False, True):
                sets, heads, extent = (1 if pooled else 8), 32, slots - 5
                keys, values = storages(name, 2, sets, slots, dtype, device)
                if pooled:
                    owner = torch.randint(8, (2, 1, 1, extent), device=device)
                    mask = owner == torch.arange(heads, device=device).view(-1, 1) // 4
                else:
                    mask = torch.rand(2, 8, 1, extent, device=device) < 0.9
                q = torch.randn(2, heads, 1, HEAD, dtype=dtype, device=device)
                view = View(extent, mask, 4)
                y, received = kernel.attend(q, keys, values, view, ("mass",))
                exact = [_Exact(store.read(slots).double()) for store in (keys, values)]
                expected, masses = Eager().attend(q.double(), *exact, view, ("mass",))
                pairs = (y, expected), (received["mass"], masses["mass"])
                errors = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
                row = {"dtype": str(dtype), "storage": name, "pooled": pooled, "error": errors[0], "mass": errors[1]}
                yield row | {"limit": TOLERANCE[dtype], "ok": max(errors) <= TOLERANCE[dtype]}


class _Exact:
    """Numbers that "eager" reads."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def read(self, extent: int) -> Tensor:
        return self.data[:, :, :extent]


@torch.no_grad()
def attention(
    clock: Clock, contexts: Sequence[int], batches: Sequence[int], layers: int, repeats: int, limit: float
) -> Iterator[dict[str, Any]]:
    """Time attention alone, in a pass over as many layers as fit `MOST`: more than the device's caches hold."""
    device = clock.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for context in contexts:
        for batch in batches:
            for name in ("plain", "int8", "int4"):
                one = 2 * batch * 8 * context * HEAD * dtype.itemsize
                made = [storages(name, batch, 8, context, dtype, device) for _ in range(min(layers, 1 + MOST // one))]
                q = torch.randn(batch, 32, 1, HEAD, dtype=dtype, device=device)
                view, calls = View(context, None, 4), {}
                for label, kernel, want in (
                    ("triton", litgpt_kv_triton.Triton(), ()),
                    ("triton with mass", litgpt_kv_triton.Triton(), ("mass",)),
                    ("eager", Eager(), ()),
                    ("eager with mass", Eager(), ("mass",)),
                ):

                    def call(kernel: Any = kernel, want: tuple = want, made: list = made, view: View = view) -> None:
                        for keys, values in made:
                            kernel.attend(q, keys, values, view, want)  # noqa: B023 (called before the next q)

                    calls[label] = graphed(call, device)
                read = sum(b.nbytes for pair in made for store in pair for b in store.buffers())
                for label, took in clock.compare(calls, repeats).items():
                    share = read / took["best_s"] / limit
                    row = {"context": context, "batch": batch, "storage": name, "kernel": label, "bytes": read}
                    row["layers"] = len(made)
                    yield row | took | {"of_copy_bandwidth": share}
                    print(f"{context:>7,} x {batch}  {name:<6}{label:<18}{1e3 * took['best_s']:9.3f} ms  {share:.0%}")
                del made, calls


def model_of(shape: Shape, context: int, device: torch.device) -> GPT:
    """A model with random weights."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = GPT(shape.config(context)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.02)
    return model


def waits(step: Callable[[], Any], steps: int, device: torch.device) -> str | None:
    """What makes decode steps wait for the device, or None."""
    step()  # the first step compiles the kernels
    if device.type != "cuda":
        return "not a GPU"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


@torch.inference_mode()
def decode(
    clock: Clock, shape: Shape, contexts: Sequence[int], budget: int, repeats: int, limit: float
) -> Iterator[dict[str, Any]]:
    """Decode with whole models: dense, window and h2o with a budget, compiled ones, and h2o without this kernel."""
    device, steps = clock.device, 16
    model = model_of(shape, max(contexts) + 8 * (repeats + 4) + 4 * steps, device)
    weights = sum(w.nbytes for name, w in model.named_parameters() if "wte" not in name)
    decoder = CompiledDecoder(model, lambda text: print(text, file=sys.stderr))
    for context in contexts:
        total, calls, found = context + 8 * (repeats + 4) + 4 * steps, {}, {}
        tokens = torch.randint(shape.vocab_size, (1, context), device=device)
        for label, name, kernel in CONTENDERS:
            if kernel == "eager" and context > MOST_EAGER:
                continue
            keep = {} if name == "dense" else {"budget": min(budget, context)}
            token = torch.zeros(1, 1, dtype=torch.long, device=device)
            args = KVCacheArgs(name, attention=kernel, **keep)
            length = torch.tensor([context], device=device)
            cache = KVCache.build(model, args, 1, total)
            if context == contexts[0]:  # compiles the kernels
                model(tokens, cache, length)
                cache.reset()
            prefill = clock.seconds(lambda cache=cache, tokens=tokens, length=length: model(tokens, cache, length))
            step = model
            if "compiled" in label:
                step, cache.static = decoder, True
                step(token, cache)
            row = {"cache": label, "context": context, "prefill_s": prefill}
            row["waits"] = waits(lambda cache=cache, token=token, step=step: step(token, cache), steps, device)
            cache.static = True
            held = cache.allocated()
            row["bytes"] = weights + held["keys"] + held["values"]
            one = lambda cache=cache, token=token, step=step: step(token, cache)  # noqa: E731
            if "compiled" not in label:  # else it is a CUDA graph already
                one = graphed(one, device)
            calls[label] = lambda one=one: [one() for _ in range(8)]
            found[label] = row
        for label, took in clock.compare(calls, repeats).items():
            took = {name: seconds / 8 for name, seconds in took.items()}
            row = found[label] | took
            row["of_copy_bandwidth"] = row["bytes"] / took["best_s"] / limit
            yield row
            share, ms = row["of_copy_bandwidth"], 1e3 * took["best_s"]
            print(
                f"{context:>7,}  {label:<16}{ms:9.3f} ms a step  {share:.0%}  prompt {row['prefill_s']:.2f} s  "
                f"waits: {row['waits'] or 'never'}"
            )
        del calls, cache


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios that matter, at the longest context: what was measured, and what was hoped for."""
    last = max(row["context"] for row in rows)
    at = {row["cache"]: row for row in rows if row["context"] == last}
    best = {name: row["best_s"] for name, row in at.items()}
    found = {
        "context": last,
        "dense, of the copy bandwidth (goal 0.75 at least)": at["dense"]["of_copy_bandwidth"],
        "dense, compiled, of the copy bandwidth (goal 0.75 at least)": at["dense, compiled"]["of_copy_bandwidth"],
        "h2o's time over window's (goal 1.1 at most)": best["h2o"] / best["window"],
        "dense's time over h2o's (goal 3 at least)": best["dense"] / best["h2o"],
        "the same, compiled": best["dense, compiled"] / best["h2o, compiled"],
    }
    without = [row for row in rows if row["cache"] == "h2o, eager"]
    if without:
        row = max(without, key=lambda row: row["context"])
        (own,) = (r for r in rows if r["cache"] == "h2o" and r["context"] == row["context"])
        text = f"h2o without this kernel over h2o with it, at {row['context']:,} tokens"
        found[f"{text}, step"] = row["best_s"] / own["best_s"]
        found[f"{text}, prompt"] = row["prefill_s"] / own["prefill_s"]
    return found | {"decode steps never wait": all(row["waits"] is None for row in rows)}


def main(
    out: str = "triton.json",
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536),
    batches: tuple[int, ...] = (1, 8),
    budget: int = 4096,
    layers: int = 32,
    repeats: int = 9,
    device: str = "cuda",
    shape: Shape = Shape(32, 4096, 32, 8, 14336, 128256),
) -> None:
    """Check and time the Triton kernels.

    Args:
        out: JSON file of all results.
        contexts: Tokens in the cache. batches: Rows, for attention alone.
        budget: Of window and h2o. layers: Of attention alone, at most. repeats: Runs that count.
        device: "cpu" tries this script in Triton's interpreter (TRITON_INTERPRET=1); its times mean nothing.
        shape: Of the model; the default is that of Llama-3-8B.

    Raises:
        SystemExit: Without such a device, or if a check fails: with 1, when all was written.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("This needs an NVIDIA GPU and a build of torch with CUDA.")
    torch.manual_seed(0)
    clock = Clock(torch.device(device))
    litgpt_kv_triton.kernel.DEVICES.add(device)
    limit = copy_bandwidth(clock, repeats)
    result: dict[str, Any] = {"machine": machine(clock.device), "copy_bytes_per_s": limit}
    print(json.dumps(result, indent=1))
    parts = {
        "checks": check(clock.device, 4099 if device == "cuda" else 37),
        "attention": attention(clock, contexts, batches, layers, repeats, limit),
        "decode": decode(clock, shape, contexts, budget, repeats, limit),
    }
    for name, rows in parts.items():
        result[name] = []
        for row in rows:  # what was measured is kept if the run breaks off
            result[name].append(row)
            Path(out).write_text(json.dumps(result, indent=1))
    result["summary"] = summary(result["decode"])
    Path(out).write_text(json.dumps(result, indent=1))
    bad = [row for row in result["checks"] if not row["ok"]]
    print(json.dumps({"failed checks": bad, **result["summary"]}, indent=1))
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    auto_cli(main)
