"""`litgpt_kv benchmark`: compare our caches and litgpt's cache on the same weights, in interleaved runs."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

import litgpt
from litgpt.config import Config
from litgpt_kv.arguments import DeviceArgs, Without, check_count
from litgpt_kv.benchmark.parallel import DEFAULT, cache_args, compare, name_width
from litgpt_kv.benchmark.peers.base import float_state
from litgpt_kv.benchmark.peers.picture import check_picture, draw_costs
from litgpt_kv.benchmark.peers.report import Settings, compare_peers
from litgpt_kv.benchmark.peers.run import named_peers
from litgpt_kv.benchmark.processor import bandwidth, now, processor
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import shown
from litgpt_kv.disk import check_target, write_text
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.check_config import LIMITS
from litgpt_kv.llm.check_weights import check_memory
from litgpt_kv.llm.quantize import OWN
from litgpt_kv.model.packed import pack
from litgpt_kv.model.quantized import head_inputs, to_int8
from litgpt_kv.parallel import DeviceRequest
from litgpt_kv.parallel.weights import full_shapes

MB = 1_000_000
MOST = 1_000_000  # the limit of all counts
STATUS = Path("/proc/self/status")  # on Linux, the memory of this process


@dataclass(frozen=True)
class Shape:
    """The sizes of a random model in Llama's architecture; its context is as long as the longest run.

    Args:
        n_layer: Layers.
        n_embd: Elements of a hidden state.
        n_head: Query heads.
        n_query_groups: Key/value heads.
        intermediate_size: Hidden elements of an MLP.
        vocab_size: Tokens of the vocabulary.
    """

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    n_query_groups: int = 3
    intermediate_size: int = 2048
    vocab_size: int = 2048

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_count(name, value, 1, LIMITS[name])
        if self.n_embd % self.n_head or self.n_head % self.n_query_groups:
            sizes = f"{self.n_embd}, {self.n_head}, {self.n_query_groups}"
            raise ValueError(f"n_embd must be a multiple of n_head, and n_head of n_query_groups, got {sizes}.")

    def config(self, context: int) -> Config:
        """Return the config of such a model with a context of `context` tokens."""
        return Config(
            name="benchmark",
            block_size=context,
            padded_vocab_size=self.vocab_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            **asdict(self),
        )


@dataclass
class Contender:
    """A model with one kind of cache, and its measurements.

    Attributes:
        name: A strategy, "none" or "litgpt".
        reset, prefill, step: Empty the cache, read a prompt, decode the token at a position.
        formula, allocated: Bytes of the cache, computed from shapes and counted.
        read: Bytes of the cache that a decode step must read.
        prefill_seconds, step_seconds: Of each repetition; a step's are the mean over the steps.
        peak: The most bytes allocated during a repetition, without those before it.
    """

    name: str
    reset: Callable[[], None]
    prefill: Callable[[Tensor], Any]
    step: Callable[[Tensor, int], Any]
    formula: int
    allocated: int
    read: int
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    peak: int | None = None


def benchmark(
    *,
    checkpoint_dir: str | None = None,
    shape: Shape = Shape(),
    contexts: list[int] | None = None,
    strategies: list[str] | None = None,
    budget: int | str = "25%",
    batch_size: int = 1,
    steps: int = 16,
    repeats: int = 5,
    litgpt: bool = True,
    peers: str | list[str] | None = None,
    ragged: bool = False,
    gguf: str | list[str] | None = None,
    prefills: int | None = None,
    prefill_chunk: int | None = None,
    plot: str | None = None,
    out: str | None = None,
    device: Annotated[DeviceArgs, Without("generate_strategy")] = DeviceArgs(),
) -> None:
    """Measure prefill, decode and memory of strategies and of litgpt's cache at several context lengths.

    With peers, ragged or plot, another table compares speed with other libraries, on the same weights and tokens.

    Args:
        checkpoint_dir: A checkpoint, or "demo" for the shipped model; by default a random model of the given shape.
        shape: The sizes of the random model.
        contexts: Prompt lengths in tokens (default: 1024 and 4096; for a checkpoint, half and most of its context; with
            peers, 1024, 4096 and 16384, as far as they fit).
        strategies: The caches (default: dense, h2o, sink, window): NAME, NAME:pool, NAME@STORAGE or
            my_file.py:MyStrategy; "none" computes the whole text at every step.
        budget: The budget of strategies that evict: tokens, or a percentage of the context.
        batch_size: The number of rows.
        steps: Decode steps timed together in each repetition.
        repeats: Repetitions of everything, interleaved; the table shows the best and the median.
        litgpt: Also measure litgpt's cache; with peers, name it there instead.
        peers: Other libraries: litgpt, transformers, llama.cpp, openvino. Strategies are then by default dense alone.
            The row of a library that is not installed, or that cannot load the model, says so.
        ragged: Rows have different lengths, from a tenth of the context up to it; takes a batch_size of 2 or more.
        gguf: What llama.cpp reads: GGUF files of the same model, or types to which its weights are converted for it
            (f32, f16, bf16, q8_0); default: the model's own type.
        prefills: How often prompts are read (default: as often as repeats; once if longer than 4096 tokens).
        prefill_chunk: Tokens of a block, in which strategies that evict read the rest of a prompt after a first pass
            of as many tokens as they keep (default: one pass over the whole prompt).
        plot: Draw the cost of a token against the context into this PNG, SVG or PDF file.
        out: Write all measurements to this JSON file.
        device: Where to run. With several devices, tensor parallel processes are compared with one process, and the
            time of computation and of communication is shown.
    """
    for name, value in {"batch_size": batch_size, "steps": steps, "repeats": repeats}.items():
        check_count(name, value, 1, MOST)
    for context in contexts or ():
        check_count("contexts", context, 1, LIMITS["block_size"])
    for name, value in {"prefills": prefills, "prefill_chunk": prefill_chunk}.items():
        if value is not None:
            check_count(name, value, 1, MOST)
    if ragged and batch_size == 1:
        raise ValueError("ragged needs rows of different lengths: a batch_size of 2 or more, got 1.")
    for path in filter(None, (out, plot)):
        check_target(path)  # fail before minutes of measuring
    picture = None if plot is None else check_picture(plot)
    named = named_peers(peers or ())
    comparing = bool(named) or ragged or picture is not None
    if device.quantize not in (None, *OWN):
        raise ValueError(f"benchmark measures quantize {', '.join(OWN)}, got {shown(device.quantize)}.")
    if device.threads is not None:
        torch.set_num_threads(device.threads)
    if device.many:
        if comparing:
            raise ValueError("Other libraries, ragged rows and plots are measured on one device.")
        if device.compile:
            raise ValueError("With several devices, the benchmark cannot be compiled: leave out --compile.")
        if checkpoint_dir is None:
            contexts = contexts or [1024, 4096]
            config, weights = shape.config(max(contexts) + steps + 1), None
        else:
            folder = checkpoint.find(checkpoint_dir)
            config, weights = checkpoint.load_config(folder), checkpoint.load_weights(folder)
            contexts = contexts or [config.block_size // 2]
        _check_contexts(contexts, steps, config)
        precision = checkpoint.precision_for(device.precision, device.accelerator)
        request = DeviceRequest(device.accelerator, device.devices, device.num_nodes, precision)
        numbers = batch_size, steps, repeats, device.threads
        report = compare(config, weights, request, contexts, strategies, budget, *numbers)
        if out is not None and report is not None:
            write_text(out, json.dumps(report, indent=2) + "\n")
        return
    new = steps * (repeats + 1) if comparing else steps
    fabric = checkpoint.fabric_for(device.precision, device.accelerator, device.quantize)
    if checkpoint_dir is None:
        contexts = contexts or [1024, 4096, *([16384] if comparing else [])]
        config = shape.config(2 * max(contexts) + new + 1)  # room for strategies that read prompts twice
        model = random_model(config, fabric, device.quantize)
    else:
        folder = checkpoint.find(checkpoint_dir)
        config = checkpoint.load_config(folder)
        model = checkpoint.load_model(folder, config, fabric, device.quantize)
        usual = [n for n in (1024, 4096, 16384) if comparing and n + new < config.block_size]
        contexts = contexts or usual or [config.block_size // 2, config.block_size - new - 1]
    pack(model)
    _check_contexts(contexts, new, config)
    if comparing:
        settings = Settings(
            peers=tuple(named),
            strategies=tuple(strategies or ["dense"]),
            budget=budget,
            chunk=prefill_chunk,
            rows=batch_size,
            ragged=ragged,
            steps=steps,
            repeats=repeats,
            prefills=prefills,
            compiled=device.compile,
            gguf=tuple([gguf] if isinstance(gguf, str) else gguf or ()),
        )
        report = compare_peers(model, contexts, settings)
        if picture is not None:
            draw_costs(report["rows"], picture)
        if out is not None:
            write_text(out, json.dumps(report, indent=2) + "\n")
        return
    limit = bandwidth(fabric.device)
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "wte" not in n)
    report = {
        "machine": f"{processor()}, on {fabric.device}",
        "torch": torch.__version__,
        "model": config.name,
        "batch_size": batch_size,
        "weight_bytes": weights,
        "read_GB_per_s": limit / 1e9,
        "rows": [],
    }
    print(f"{report['machine']}; memory reads at most {limit / 1e9:.1f} GB/s")
    with tqdm(total=len(contexts) * repeats, file=sys.stderr, disable=None, leave=False) as bar, torch.inference_mode():
        for context in contexts:
            compared = contenders(model, context, steps, batch_size, strategies, budget, litgpt, device.compile)
            tokens = torch.randint(config.vocab_size, (batch_size, context + steps), device=fabric.device)
            for i in range(repeats + 1):  # the first round warms up
                for contender in compared:
                    _measure(contender, tokens, context, steps, keep=i > 0)
                bar.update(i > 0)
            rows = [_row(c, context, steps, batch_size, weights, limit) for c in compared]
            report["rows"] += rows
            bar.clear()
            _print(rows, repeats)
    if out is not None:
        write_text(out, json.dumps(report, indent=2) + "\n")


def random_model(config: Config, fabric: L.Fabric, quantize: str | None = None) -> GPT:
    """Return a model with random weights, always the same ones, on the fabric's device and in its precision.

    Args:
        config: Of the model. fabric: See `checkpoint.fabric_for`. quantize: One of `OWN`, or None.
    """
    check_memory(config, 4 * sum(weight.numel() for weight in full_shapes(config).values()))
    torch.manual_seed(0)
    with fabric.init_module():
        model = GPT(config).eval()
    if quantize is not None:
        model.unquantized = to_int8(model, head_inputs(config, model.state_dict()))
    return model


def _check_contexts(contexts: list[int], steps: int, config: Config) -> None:
    if bad := [c for c in contexts if not 1 <= c < config.block_size - steps]:
        raise ValueError(f"A context of {bad[0]} and {steps} steps do not fit the model's {config.block_size} tokens.")


def contenders(
    model: GPT,
    context: int,
    steps: int,
    batch_size: int,
    strategies: list[str] | None,
    budget: int | str,
    with_litgpt: bool,
    compiled: bool,
) -> list[Contender]:
    device = model.lm_head.weight.device
    decoder = CompiledDecoder(model) if compiled else model
    length = torch.full((batch_size,), context, device=device)
    made = []
    for name in strategies or DEFAULT:
        if name == "none":
            made.append(_none(model))
            continue
        args = cache_args(name, budget)
        total = context + steps
        cache = KVCache.build(model, args, batch_size, total, static=compiled)
        dtype = model.transformer.wte.weight.dtype
        formula = KVCache.nbytes(model.config, args, batch_size, total, dtype)["total"]
        held = cache.allocated()

        def prefill(tokens: Tensor, cache: KVCache = cache) -> Tensor:
            return model(tokens, cache, length)

        def step(token: Tensor, pos: int, cache: KVCache = cache) -> Tensor:
            with cache.expect(pos):
                return decoder(token, cache)

        read = held["keys"] + held["values"]
        made.append(Contender(name, cache.reset, prefill, step, formula, held["total"], read))
    if with_litgpt:
        made.append(_litgpt(model, context, steps, batch_size))
    return made


def _none(model: GPT) -> Contender:
    """Compute the whole text at every step, without a cache."""
    text: list[Tensor] = []

    def prefill(tokens: Tensor) -> Tensor:
        text[:] = [tokens]
        return model(tokens)[:, -1]

    def step(token: Tensor, _: int) -> Tensor:
        text.append(token)
        return model(torch.cat(text, dim=1))[:, -1]

    return Contender("none", lambda: None, prefill, step, 0, 0, 0)


def _litgpt(model: GPT, context: int, steps: int, batch_size: int) -> Contender:
    """Run litgpt's model with the same weights, in the way of its `generate`."""
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    with torch.device("meta"):
        other = litgpt.GPT(model.config).eval()
    other.load_state_dict(float_state(model), assign=True)
    other.cos, other.sin = model.cos, model.sin
    other.max_seq_length = context + steps
    other.set_kv_cache(batch_size, device=device, dtype=dtype)
    buffers = [b for block in other.transformer.h for b in (block.attn.kv_cache.k, block.attn.kv_cache.v)]
    kv_bytes = sum(b.numel() * b.element_size() for b in buffers)
    total = kv_bytes + other.mask_cache.numel() * other.mask_cache.element_size()
    positions = torch.arange(context + steps, device=device)

    def prefill(tokens: Tensor) -> Tensor:
        return other(tokens, positions[:context], input_pos_maxp1=context)

    def step(token: Tensor, pos: int) -> Tensor:
        return other(token, positions[pos : pos + 1], input_pos_maxp1=pos + 1)

    return Contender("litgpt", lambda: None, prefill, step, total, total, kv_bytes)


def _measure(contender: Contender, tokens: Tensor, context: int, steps: int, keep: bool) -> None:
    """Read `context` tokens (B, T) and decode `steps` more; with `keep`, add the measurements to the contender."""
    device = tokens.device
    contender.reset()
    before = _resident(device, reset=True)
    began = now(device)
    contender.prefill(tokens[:, :context])
    read = now(device)
    for pos in range(context, context + steps):
        contender.step(tokens[:, pos : pos + 1], pos)
    end = now(device)
    peak = _resident(device)
    if keep:
        contender.prefill_seconds.append(read - began)
        contender.step_seconds.append((end - read) / steps)
        if peak is not None and before is not None:
            contender.peak = max(contender.peak or 0, peak - before)


def _row(c: Contender, context: int, steps: int, batch_size: int, weights: int, limit: float) -> dict[str, Any]:
    """Return a contender's row of the report."""
    best, median = min(c.step_seconds), statistics.median(c.step_seconds)
    return {
        "cache": c.name,
        "context": context,
        "prefill_tokens_per_s": [
            batch_size * context / t for t in (min(c.prefill_seconds), statistics.median(c.prefill_seconds))
        ],
        "decode_ms": [1e3 * best, 1e3 * median],
        "decode_GB_per_s": (weights + c.read) / best / 1e9,
        "of_limit": (weights + c.read) / best / limit,
        "cache_bytes": c.allocated,
        "cache_bytes_formula": c.formula,
        "peak_bytes": c.peak,
    }


def _print(rows: list[dict[str, Any]], repeats: int) -> None:
    print(f"\n{rows[0]['context']:,} tokens of context; best and median of {repeats}")
    layout = f"{{:<{name_width(rows)}}}" + "{:>20}{:>20}{:>7}{:>10}{:>10}{:>9}{:>9}"
    heads = "cache", "prefill tokens/s", "decode ms a step", "GB/s", "of limit", "cache MB", "formula", "peak MB"
    print(layout.format(*heads))
    for r in rows:
        print(
            layout.format(
                r["cache"],
                "{:,.0f} {:,.0f}".format(*r["prefill_tokens_per_s"]),
                "{:.2f} {:.2f}".format(*r["decode_ms"]),
                f"{r['decode_GB_per_s']:.1f}",
                f"{r['of_limit']:.0%}",
                f"{r['cache_bytes'] / MB:.2f}",
                f"{r['cache_bytes_formula'] / MB:.2f}",
                "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / MB:.1f}",
            )
        )


def _resident(device: torch.device, reset: bool = False) -> int | None:
    """Return the peak memory in bytes since the last reset; with `reset`, reset it and return the memory in use.

    It is None if the system does not provide it.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not STATUS.is_file():
        return None
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    key = "VmRSS" if reset else "VmHWM"
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(key)), None)
    return None if line is None else int(line.split()[1]) * 1024
