"""Load the model of `generate` and `chat`; their sampling defaults."""

from __future__ import annotations

import time

import torch

from litgpt_kv import registry
from litgpt_kv.arguments import DeviceArgs
from litgpt_kv.cli.output import Output
from litgpt_kv.cli.progress import loading
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate.compiled import keep_compiled
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.llm import LLM
from litgpt_kv.llm.threads import SMALL_MODEL, best_threads
from litgpt_kv.llm.turns import check_system_prompt
from litgpt_kv.model.quantized import describe_refused, has_bf16_products

CLI_SAMPLING = SamplingArgs(temperature=None, top_k=50, seed=1234)  # litgpt's defaults on the command line
BF16_HINT = (
    "This processor multiplies in bfloat16: --precision bf16-true reads prompts and makes steps faster, --quantize "
    "int8 makes steps faster still; both round more than float32."
)


def load(checkpoint_dir: str, device: DeviceArgs, sys_prompt: str | None = None) -> LLM:
    """Load a model onto the devices that `device` names, and set the number of CPU threads.

    Raises:
        ValueError: If it cannot be loaded, or its prompt style has no place for a system prompt.
    """
    if sys_prompt:  # before minutes of loading
        folder = checkpoint.find(checkpoint_dir)
        check_system_prompt(checkpoint.load_prompt(folder, checkpoint.load_config(folder)), sys_prompt)
    began = time.perf_counter()
    with loading(checkpoint_dir) as on_progress:
        llm = LLM.load(
            checkpoint_dir,
            precision=device.precision,
            accelerator=device.accelerator,
            quantize=device.quantize,
            distribute=None if device.many else "auto",
            check_weights=device.check_weights,
            threads=device.threads,
            on_progress=on_progress,
        )
    if device.many:
        where = device.accelerator, device.devices, device.num_nodes, device.precision, device.generate_strategy
        llm.distribute(*where, check_weights=device.check_weights)
    Output.of(llm).note(f"Loaded {checkpoint_dir} on {llm.fabric.device} in {time.perf_counter() - began:.2f} s.")
    if not device.many and llm.model.unquantized:
        Output.of(llm).note(describe_refused(llm.model.unquantized))
    large = not device.many and sum(p.numel() for p in llm.model.parameters()) >= SMALL_MODEL
    default = device.precision is None and device.quantize is None and llm.fabric.device.type == "cpu"
    if large and default and has_bf16_products():
        Output.of(llm).note(BF16_HINT)
    threads = best_threads(llm.model, llm.fabric.device) if device.threads is None else device.threads
    if threads is not None:
        torch.set_num_threads(threads)
    if device.compile:
        folder = keep_compiled()
        Output.of(llm).note(f"Compiled steps are kept in {folder or 'a temporary folder'}.")
        llm.compile(Output.of(llm).note)
    return llm


def budget_note(args: KVCacheArgs | None) -> str | None:
    """Return a note for strategies that evict without a budget, so that every token is kept; None for others."""
    if args is None or args.budget not in (None, [None]):
        return None
    names = args.strategy if isinstance(args.strategy, (list, tuple)) else [args.strategy]
    evicting = [name for name in dict.fromkeys(names) if registry.get("strategy", name).evicts]
    if not evicting:
        return None
    until = " up to the model's context" if args.positions == "cache" or "sink" in evicting else ""
    return (
        f"Without a budget, {', '.join(evicting)} evicts nothing{until}: "
        "--kv-cache.budget 128 keeps 128 tokens, 25% a quarter."
    )
