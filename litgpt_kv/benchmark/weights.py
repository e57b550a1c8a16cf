"""`litgpt_kv benchmark_weights`: what weights of fewer bits gain and cost, in interleaved runs."""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

from litgpt.config import Config
from litgpt_kv.arguments import DeviceArgs, Without, check_count
from litgpt_kv.benchmark.decode import Contender, Shape, contenders, now
from litgpt_kv.benchmark.processor import processor
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs, shown
from litgpt_kv.disk import check_target, write_text
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.check_config import LIMITS
from litgpt_kv.llm.quantize import OWN
from litgpt_kv.model.packed import is_changed_to_compile, pack
from litgpt_kv.model.quantized import head_inputs, to_int8

MB = 1_000_000
MOST = 1_000_000  # the limit of all counts
BLOCK = 16  # tokens that are compared at a time: as many rows as a step of 16 texts has
KINDS = {"float32": ("32-true", None), "bfloat16": ("bf16-true", None), "int8": ("32-true", "int8")}
KINDS |= {"int8+bfloat16": ("bf16-true", "int8")}
KINDS |= {"float32 unpacked": KINDS["float32"], "bfloat16 unpacked": KINDS["bfloat16"]}
LIMITED = Without("precision", "devices", "num_nodes", "generate_strategy", "quantize", "check_weights", "compile")


@dataclass
class Kind:
    """One kind of weights and its measurements.

    Attributes:
        name: One of `KINDS`, with " compiled" after it if its steps are compiled.
        contender: The model with its cache. bytes: Of the weights that a decode step reads.
        prefill_seconds, step_seconds: Of each repetition; a step's are the mean over the steps.
        cpu_seconds: Processor time of a step, of all threads together.
    """

    name: str
    contender: Contender
    bytes: int
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def measure(self, tokens: Tensor, context: int, keep: bool) -> None:
        """Read `context` tokens (B, T) and decode the rest; with `keep`, add the measurements."""
        device, steps = tokens.device, tokens.size(1) - context
        self.contender.reset()
        began = now(device)
        self.contender.prefill(tokens[:, :context])
        read, cpu = now(device), time.process_time()
        for pos in range(context, tokens.size(1)):
            self.contender.step(tokens[:, pos : pos + 1], pos)
        end, cpu = now(device), time.process_time() - cpu
        if keep:
            self.prefill_seconds.append(read - began)
            self.step_seconds.append((end - read) / steps)
            self.cpu_seconds.append(cpu / steps)

    def row(self, context: int, batch_size: int, first: Kind) -> dict[str, Any]:
        """Return the row of the report: best and median, and how many times faster than the `first` kind."""

        def both(seconds: list[float]) -> tuple[float, float]:
            return min(seconds), statistics.median(seconds)

        def gain(name: str) -> list[float]:
            return [other / own for other, own in zip(both(getattr(first, name)), both(getattr(self, name)))]

        return {
            "weights": self.name,
            "context": context,
            "weight_bytes": self.bytes,
            "prefill_tokens_per_s": [batch_size * context / s for s in both(self.prefill_seconds)],
            "decode_ms": [1e3 * s for s in both(self.step_seconds)],
            "decode_cpu_ms": [1e3 * s for s in both(self.cpu_seconds)],
            "prefill_gain": gain("prefill_seconds"),
            "decode_gain": gain("step_seconds"),
            "decode_cpu_gain": gain("cpu_seconds"),
        }


def benchmark_weights(
    checkpoint_dir: str | None = None,
    *,
    weights: list[str] | None = None,
    shape: Shape = Shape(),
    contexts: list[int] | None = None,
    kv_cache: str = "dense",
    batch_size: int = 1,
    steps: int = 16,
    repeats: int = 5,
    compiled: bool = False,
    text_tokens: int = 600,
    out: str | None = None,
    device: Annotated[DeviceArgs, LIMITED] = DeviceArgs(),
) -> None:
    """Compare a model's prefill and decode with weights of different kinds, in interleaved runs.

    With a checkpoint, a second table says what the kinds cost: the mean Kullback-Leibler divergence of the next token's
    probabilities from those of float32, on Python's manual, read in blocks of 16 tokens.

    Args:
        checkpoint_dir: A checkpoint, or "demo" for the shipped model; by default a random model of the given shape.
        weights: float32, bfloat16, int8 (the rest of the model in float32), int8+bfloat16 (the rest in bfloat16);
            default: these. "float32 unpacked" and "bfloat16 unpacked" keep weights in torch's order where others have
            them in that of the CPU. The first one is what the others are compared with.
        shape: The sizes of the random model.
        contexts: Prompt lengths in tokens (default: 512).
        kv_cache: The strategy of the cache; it keeps everything if it can.
        batch_size: The number of rows.
        steps: Decode steps timed together in each repetition.
        repeats: Repetitions of everything, interleaved; the table shows the best and the median.
        compiled: Also measure compiled steps of each kind.
        text_tokens: How much of the manual is read; 0 leaves the second table out.
        out: Write all measurements to this JSON file.
        device: Where to run.
    """
    for name, value in {"batch_size": batch_size, "steps": steps, "repeats": repeats}.items():
        check_count(name, value, 1, MOST)
    check_count("text_tokens", text_tokens, 0, MOST)
    contexts = contexts or [512]
    for context in contexts:
        check_count("contexts", context, 1, LIMITS["block_size"])
    kinds = [kind for kind in KINDS if not _unpacked(kind)] if weights is None else weights
    if not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"weights must be some of {', '.join(KINDS)}, got {shown(weights)}.")
    if out is not None:
        check_target(out)  # fail before minutes of measuring
    if device.threads is not None:
        torch.set_num_threads(device.threads)
    config, models = _models(checkpoint_dir, kinds, shape.config(max(contexts) + steps + 1), device.accelerator)
    if max(contexts) + steps > config.block_size:
        raise ValueError(
            f"A context of {max(contexts)} and {steps} steps do not fit the model's {config.block_size} tokens."
        )
    on = next(iter(models.values())).lm_head.weight.device
    print(processor())
    report: dict[str, Any] = {"processor": processor(), "model": config.name, "batch_size": batch_size, "rows": []}
    with tqdm(total=len(contexts) * repeats, file=sys.stderr, disable=None, leave=False) as bar, torch.inference_mode():
        for context in contexts:
            compared = _kinds(models, context, steps, batch_size, kv_cache, compiled)
            tokens = torch.randint(config.vocab_size, (batch_size, context + steps), device=on)
            for i in range(repeats + 1):  # the first round warms up
                for kind in compared:
                    kind.measure(tokens, context, keep=i > 0)
                bar.update(i > 0)
            rows = [kind.row(context, batch_size, compared[0]) for kind in compared]
            report["rows"] += rows
            bar.clear()
            _print(rows, repeats)
        if checkpoint_dir is not None and text_tokens:
            report["divergence"] = _divergences(models, manual(checkpoint_dir, text_tokens, config.block_size).to(on))
    if out is not None:
        write_text(out, json.dumps(report, indent=2) + "\n")


def _models(
    checkpoint_dir: str | None, kinds: list[str], random: Config, accelerator: str
) -> tuple[Config, dict[str, GPT]]:
    """Build a model of each kind, with the same weights; the random one has the config `random`."""
    models: dict[str, GPT] = {}
    state: Mapping[str, Tensor] = {}
    if checkpoint_dir is None:
        torch.manual_seed(0)
        state, config = GPT(random).state_dict(), random
    else:
        folder = checkpoint.find(checkpoint_dir)
        config = checkpoint.load_config(folder)
    for kind in kinds:
        precision, quantize = KINDS[kind]
        fabric = checkpoint.fabric_for(precision, accelerator, quantize)
        if checkpoint_dir is not None:
            model = checkpoint.load_model(folder, config, fabric, quantize)
        else:
            with fabric.init_module(empty_init=True):
                model = GPT(config).eval()
            if quantize in OWN:
                model.unquantized = to_int8(model, head_inputs(random, state), empty=True)
            model.load_state_dict(state)
        if not _unpacked(kind):
            pack(model)
        models[kind] = model
    return config, models


def _unpacked(kind: str) -> bool:
    return kind.endswith(" unpacked")


def _kinds(
    models: dict[str, GPT], context: int, steps: int, batch_size: int, strategy: str, compiled: bool
) -> list[Kind]:
    made = []
    for name, model in models.items():
        read = sum(p.nbytes for n, p in model.named_parameters() if "wte" not in n)
        for label, also in ((name, False), (f"{name} compiled", True))[: 1 + compiled]:
            own = copy.deepcopy(model) if also and is_changed_to_compile(model, batch_size) else model
            (one,) = contenders(own, context, steps, batch_size, [strategy], "100%", False, also)
            made.append(Kind(label, one, read))
    return made


def _print(rows: list[dict[str, Any]], repeats: int) -> None:
    first = rows[0]["weights"]
    print(f"\n{rows[0]['context']:,} tokens of context; best and median of {repeats}; times faster than {first}")
    layout = "{:<24}{:>9}{:>17}{:>12}{:>18}{:>12}{:>18}{:>12}"
    print(layout.format("weights", "MB", "prefill tokens/s", "", "decode ms a step", "", "processor ms", ""))
    for row in rows:
        print(
            layout.format(
                row["weights"],
                f"{row['weight_bytes'] / MB:,.1f}",
                "{:,.0f} {:,.0f}".format(*row["prefill_tokens_per_s"]),
                "{:.2f} {:.2f}".format(*row["prefill_gain"]),
                "{:.2f} {:.2f}".format(*row["decode_ms"]),
                "{:.2f} {:.2f}".format(*row["decode_gain"]),
                "{:.2f} {:.2f}".format(*row["decode_cpu_ms"]),
                "{:.2f} {:.2f}".format(*row["decode_cpu_gain"]),
            )
        )


def _divergences(models: dict[str, GPT], ids: Tensor) -> list[dict[str, Any]]:
    """Print and return how far each kind's next-token probabilities are from the first kind's, on the tokens `ids`."""
    first, rows = next(iter(models)), []
    expected = log_probabilities(models[first], ids)
    print(f"\n{len(ids):,} tokens of Python's manual, against {first}")
    layout = "{:<24}{:>12}{:>12}{:>14}{:>14}"
    print(layout.format("weights", "mean KL", "largest KL", "same top-1", "perplexity"))
    for name, model in models.items():
        found = expected if name == first else log_probabilities(model, ids)
        kl = (expected.exp() * (expected - found)).sum(dim=-1)
        same = (expected.argmax(dim=-1) == found.argmax(dim=-1)).double().mean()
        perplexity = found[:-1].gather(1, ids[1:].unsqueeze(1)).mean().neg().exp()
        row = {"weights": name, "kl": float(kl.mean()), "largest_kl": float(kl.max())}
        rows.append({**row, "top1": float(same), "perplexity": float(perplexity)})
        print(
            layout.format(
                name, *(f"{x:.2g}" for x in (row["kl"], row["largest_kl"])), f"{same:.1%}", f"{perplexity:.3f}"
            )
        )
    return rows


def log_probabilities(model: GPT, ids: Tensor) -> Tensor:
    """The next token's log-probabilities (N, V) float64 after each of the tokens (N,), read in blocks with a cache."""
    cache = KVCache.build(model, KVCacheArgs(), 1, len(ids))
    found = []
    for at, part in enumerate(ids.split(BLOCK)):
        if at == 0:
            model(part.unsqueeze(0), cache, torch.tensor([len(part)], device=ids.device))
            found.append(model(part.unsqueeze(0))[0])
        else:
            found.append(model(part.unsqueeze(0), cache)[0])
    return torch.cat(found).double().log_softmax(dim=-1)


def manual(folder: str, tokens: int, most: int) -> Tensor:
    """The first tokens of the reference manual that every Python carries, in a checkpoint's tokens, 1-D int64."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))[: 40 * tokens]
    return checkpoint.load_tokenizer(checkpoint.find(folder)).encode(text)[: min(tokens, most)].long()
