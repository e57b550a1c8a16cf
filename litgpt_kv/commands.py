"""The commands of `litgpt_kv`. Text goes to standard output, everything else to standard error. Floor 6."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from litgpt_kv import checkpoint, registry
from litgpt_kv.api import LLM
from litgpt_kv.cache import KVCache
from litgpt_kv.cli import cache_args, describe
from litgpt_kv.config import SamplingArgs
from litgpt_kv.generate import Stats
from litgpt_kv.generate.base import PREFILLS
from litgpt_kv.parallel import quiet

SMALL_MODEL = 20_000_000  # weights
MANY_STEPS = 256  # prompt tokens read one at a time, from which on the user is told of a faster way


def generate(
    checkpoint_dir: str,
    prompt: list[str] | str = "What food do llamas eat?",
    *,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float | None = None,
    seed: int = 1234,
    kv_cache: dict[str, Any] | str = "dense",
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    ignore_eos: bool = False,
    precision: str | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    generate_strategy: str | None = None,
    threads: int | None = None,
    compile: bool = False,
) -> None:
    """Continue one prompt, or several in one batch.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        prompt: The text to continue; give the option several times for a batch.
        sys_prompt: The system prompt, for prompt styles that have one.
        num_samples: How many texts to make of each prompt.
        max_new_tokens: The most new tokens of a text.
        top_k: Sample among so many most probable tokens; null for all.
        top_p: Sample among the most probable tokens that together have this probability; 0 takes the most probable one.
        temperature: Higher is more random; 0 takes the most probable token. By default what the checkpoint's
            generation_config.json says, else 0.8.
        seed: Of the random choices.
        kv_cache: What to keep: a strategy of `litgpt_kv strategies`, or "none" to compute the whole text at every step.
            With --kv-cache.budget, .sinks, .recent, .storage, .positions and the strategy's own options;
            `--kv-cache.help h2o` explains one.
        prefill: How prompts are read: "min-length", in one pass up to the shortest and then token by token; or "full",
            in one padded pass.
        prefill_chunk: Read what prompts have beyond the first pass in blocks of so many tokens; by default in blocks
            for strategies whose results do not depend on it (dense, window, sink), one at a time for others.
        ignore_eos: Go on when the model ends its text.
        precision: Lightning Fabric's name; by default 32-true on a CPU and bf16-true on a GPU.
        accelerator: cpu, cuda, mps, or auto.
        devices: How many devices on each machine, or "auto" for all; more than one needs --generate-strategy.
        num_nodes: How many machines; each runs this command, under torchrun, SLURM or with Fabric's MASTER_ADDR and
            NODE_RANK.
        generate_strategy: How devices share the work: tensor_parallel (every layer over all), sequential (layers over
            the devices of one machine) or data_parallel (the whole model on each, and some of the prompts).
        threads: CPU threads; by default one for a small model, whose steps are over before a second one has begun, and
            torch's own choice for others.
        compile: Compile the decode step: slow to start, fast to run.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    args = cache_args(kv_cache)
    if temperature is None:
        temperature = checkpoint.own_temperature(checkpoint.find(checkpoint_dir))
    samplings = [SamplingArgs(temperature, top_k, top_p, seed + i) for i in range(num_samples)]
    if prefill not in PREFILLS:
        raise ValueError(f"prefill must be one of {', '.join(PREFILLS)}, got {prefill!r}.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if "" in prompts or not prompts:
        raise ValueError("The prompt is empty.")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")
    began = time.perf_counter()
    many = devices != 1 or num_nodes != 1 or generate_strategy is not None
    way = None if many else "auto"
    llm = LLM.load(checkpoint_dir, precision=precision, accelerator=accelerator, distribute=way)
    if many:
        llm.distribute(accelerator, devices, num_nodes, precision, generate_strategy)
        quiet(llm.fabric.global_rank)
    _say(f"Loaded {checkpoint_dir} on {llm.fabric.device} in {time.perf_counter() - began:.2f} s.")
    if threads is None and llm.fabric.device.type == "cpu":
        threads = 1 if sum(p.numel() for p in llm.model.parameters()) < SMALL_MODEL else None
    if threads is not None:
        torch.set_num_threads(threads)
    if compile:
        llm.compile()
    ids = [llm.encode(text, sys_prompt) for text in prompts]
    for sampling in samplings:
        steps = llm.steps(ids, args, max_new_tokens, sampling, prefill, prefill_chunk, ignore_eos)
        if args is not None and prefill == "min-length" and prefill_chunk is None and not llm.cache.exact_blocks:
            singly = max(map(len, ids)) - min(llm.cache.first_chunk, *map(len, ids))
            if singly >= MANY_STEPS:
                _say(f"{singly:,} prompt tokens will be read one at a time; --prefill full reads all in one pass.")
        pieces = llm.pieces(ids, steps)
        if len(ids) == 1:  # shown as it is made
            first = next(pieces)
            print(llm.decode(ids[0].tolist()) + first[0], end="", flush=True)
            for (piece,) in pieces:
                print(piece, end="", flush=True)
            print()
        else:
            texts = [llm.decode(row.tolist()) for row in ids]
            for step in pieces:
                texts = [text + piece for text, piece in zip(texts, step)]
            for text in texts:
                print(text)
        report(llm.stats, llm.cache)


def strategies() -> None:
    """List every registered strategy: what it keeps, its parameters and defaults, its paper."""
    for name in registry.names("strategy"):
        print(describe(name))


def report(stats: Stats, cache: KVCache | None) -> None:
    """What a run did, on standard error."""
    prefill = f"{stats.prefill_seconds:.2f} s ({_rate(stats.prefill_tokens, stats.prefill_seconds)})"
    if (later := stats.prompt_tokens - stats.prefill_tokens) > 0:
        prefill += f" and {later:,} beside decoding"
    decode = f"{stats.decode_seconds:.2f} s ({_rate(stats.decode_tokens, stats.decode_seconds)})"
    _say(f"Read {stats.prompt_tokens:,} prompt tokens in {prefill}, made {stats.new_tokens:,} in {decode}.")
    if cache is not None:
        size, tokens = cache.allocated(), cache.tokens()
        kept = ", ".join(f"{k:,} of {s:,}" for k, s in zip(tokens["kept"], tokens["seen"]))
        names = cache.args.strategy if isinstance(cache.args.strategy, (list, tuple)) else [cache.args.strategy]
        budgets = sorted({slots.size for slots in cache.slots})
        parts = ", ".join(f"{what} {n:,}" for what, n in size.items() if n and what != "total")
        budget = " to ".join(f"{b:,}" for b in dict.fromkeys([budgets[0], budgets[-1]]))
        what = f"Cache {', '.join(dict.fromkeys(names))}: budget {budget} tokens, {size['total']:,} bytes ({parts})"
        _say(f"{what}; kept {kept} tokens seen.")


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 and tokens else "not measured"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
