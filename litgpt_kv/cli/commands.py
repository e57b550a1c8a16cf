"""The commands of `litgpt_kv`. Text goes to standard output, everything else to standard error. Floor 6."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from litgpt_kv import registry
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cli.output import Output
from litgpt_kv.cli.parser import cache_args, describe
from litgpt_kv.cli.prompt_files import Answers, Line, Settings, answer_file, read_prompts
from litgpt_kv.cli.terminal import talk
from litgpt_kv.config import SamplingArgs
from litgpt_kv.generate import Request, Stats
from litgpt_kv.generate.runners import PREFILLS
from litgpt_kv.generate.stopping import Row
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.llm import LLM
from litgpt_kv.parallel import ParallelStrategy

SMALL_MODEL = 20_000_000  # weights
QUESTION = "What food do llamas eat?"
MANY_STEPS = 256  # prompt tokens read one at a time, from which on the user is told of a faster way


def generate(
    checkpoint_dir: str,
    prompt: list[str] | str | None = None,
    *,
    prompts: str | None = None,
    out: str | None = None,
    resume: bool = False,
    batch_size: int | None = None,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    min_new_tokens: int = 0,
    stop: list[str] | str | None = None,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 1234,
    logprobs: bool = False,
    kv_cache: dict[str, Any] | str = "dense",
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    ignore_eos: bool = False,
    quantize: str | None = None,
    precision: str | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    generate_strategy: str | None = None,
    threads: int | None = None,
    compile: bool = False,
) -> None:
    """Continue one prompt, several in one batch, or all of a file.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        prompt: The text to continue (default: "What food do llamas eat?"); give the option several times for a batch.
        prompts: A file of prompts: .jsonl with {"prompt": ...} and, if it likes, settings of its own on each line, or
            text with one prompt a line; - is standard input.
        out: A file that takes the answers as JSON lines; by default they go to standard output.
        resume: Go on with an interrupted run's file.
        batch_size: Prompts at a time; one that ends makes room for the next. By default 8 for a file, else all.
        sys_prompt: The system prompt, for prompt styles that have one.
        num_samples: How many texts to make of each prompt.
        max_new_tokens: The most new tokens of a text.
        min_new_tokens: The end of the model's text and `stop` count only after so many.
        stop: A text that ends the output and is not part of it; give the option several times for several.
        top_k: Sample among so many most probable tokens; null for all.
        top_p: Sample among the most probable tokens that together have this probability; 0 takes the most probable one.
        temperature: Higher is more random; 0 takes the most probable token. By default what the checkpoint's
            generation_config.json says, else 0.8.
        repetition_penalty: Over 1 makes tokens that the text has already less probable.
        seed: Of the random choices.
        logprobs: With `prompts`, also give each new token and its log-probability.
        kv_cache: What to keep: a strategy of `litgpt_kv strategies`, or "none" to compute the whole text at every step.
            With --kv-cache.budget, .sinks, .recent, .storage, .positions and the strategy's own options;
            `--kv-cache.help h2o` explains one.
        prefill: How prompts are read: "min-length", each in one pass as far as the budget allows and then in blocks or
            token by token; or "full", all in one padded pass and then compressed to the budget.
        prefill_chunk: Read what prompts have beyond the first pass in blocks of so many tokens; by default in blocks
            for strategies whose results do not depend on it (dense, window, sink), one at a time for others.
        ignore_eos: Go on when the model ends its text.
        quantize: Quantize the weights with bitsandbytes, which needs an NVIDIA GPU: bnb.nf4, bnb.nf4-dq, bnb.fp4,
            bnb.fp4-dq or bnb.int8.
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
    args = cache_args(kv_cache)
    if temperature is None:
        temperature = checkpoint.own_temperature(checkpoint.find(checkpoint_dir))
    ends = max_new_tokens, min_new_tokens
    settings = Settings(sys_prompt, *ends, temperature, top_k, top_p, repetition_penalty, seed, stop or (), ignore_eos)
    SamplingArgs(temperature, top_k, top_p, seed, repetition_penalty)  # raises before anything is loaded
    Request((), *ends)
    if prefill not in PREFILLS:
        raise ValueError(f"prefill must be one of {', '.join(PREFILLS)}, got {prefill!r}.")
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if prompts is None and (out is not None or resume or logprobs):
        raise ValueError("--out, --resume and --logprobs go with a file of prompts: --prompts FILE.")
    if prompts is not None and prompt is not None:
        raise ValueError("Give either --prompt or --prompts.")
    if prompts == "-" and (devices != 1 or num_nodes != 1):
        raise ValueError("Standard input reaches one process only: give a file of prompts.")
    lines = read_prompts(prompts) if prompts is not None else []
    prompt = QUESTION if prompt is None else prompt
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if "" in texts or not texts:
        raise ValueError("The prompt is empty.")
    made = [checkpoint_dir, asdict(settings), None if args is None else asdict(args), prefill, prefill_chunk, logprobs]
    digest = hashlib.sha256(json.dumps([*made, num_samples > 1, precision, quantize]).encode()).hexdigest()[:8]
    answers = Answers(out, resume, digest) if prompts is not None else None
    place = devices, num_nodes, generate_strategy
    llm = load(checkpoint_dir, precision, accelerator, threads, quantize, place)
    if compile:
        llm.compile()
    how = {"batch_size": batch_size, "prefill": prefill, "prefill_chunk": prefill_chunk}
    if answers is not None:
        how |= {"batch_size": batch_size or 8, "num_samples": num_samples, "logprobs": logprobs}
        _answer(llm, lines, answers, settings, args, **how)
        return
    for sample in range(num_samples):
        rows = [settings.row(llm, {"prompt": text}, b, sample) for b, text in enumerate(texts)]
        steps = llm.run(rows, args, **how)
        _announce(llm, rows, prefill, prefill_chunk)
        show(llm, rows, steps)
        report(Output.of(llm), llm.stats, llm.cache, parallel=llm.parallel)


def show(llm: LLM, rows: list[Row], steps: Iterator[list[Row]]) -> None:
    """Prompts and their continuations: one as it is made, several when all are."""
    output, texts = Output.of(llm), [llm.decode(row.request.prompt.tolist()) for row in rows]
    if len(rows) == 1:
        begin = texts[0]
        for _ in steps:
            output.text(begin + rows[0].piece, end="")
            begin = ""
        output.text("")
        return
    for _ in steps:
        pass
    for text, row in zip(texts, rows):
        output.text(text + row.text)


def _answer(llm: LLM, lines: list[Line], answers: Answers, *others: Any, **how: Any) -> None:
    before, output = len(answers.done), Output.of(llm)
    try:
        begun = functools.partial(_announce, llm, prefill=how["prefill"], prefill_chunk=how["prefill_chunk"])
        bad = answer_file(llm, lines, answers, *others, **how, begun=begun)
    except KeyboardInterrupt:
        if answers.path is not None:
            divided = answers.parallel is not None and answers.parallel.divides_rows
            where = f"{answers.path} and its parts" if divided else answers.path
            output.note(f"Interrupted: {len(answers.done):,} answers are in {where}; --resume goes on.")
        raise
    answers.close()
    for line in bad:
        output.note(f"Line {line.number} was left out: {line.error}")
    if llm.stats.new_tokens:
        report(output, llm.stats, llm.cache, brief=True, parallel=llm.parallel)
    where = "" if answers.path is None else f" in {answers.path}"
    resumed = f", {before:,} of them from before" if before else ""
    if orphans := len(answers.done.keys() - set(answers.expected)) if answers.path is not None else 0:
        resumed += f", {orphans:,} to no line of this file"
    count = len(answers.done) if answers.path is not None else answers.given
    output.note(f"{count:,} answers{where}{resumed}; {len(bad):,} of {len(lines):,} lines could not be used.")
    if bad:
        raise SystemExit(1)


def _announce(llm: LLM, rows: list[Row], prefill: str, prefill_chunk: int | None) -> None:
    """Says when much of a prompt will be read slowly, and what would be faster."""
    cache = llm.cache
    if not rows or cache is None or prefill != "min-length" or prefill_chunk is not None or cache.exact_blocks:
        return
    lengths = [len(row.request.prompt) for row in rows]
    longest, first = max(lengths), min(cache.first_chunk, max(lengths))
    if longest - first >= MANY_STEPS:
        budget = min(slots.size for slots in cache.slots)
        what = f"{longest:,} tokens, {longest / budget:.3g} times the budget"
        Output.of(llm).note(
            f"The longest prompt has {what}: {longest - first:,} will be read one at a time; "
            "--prefill full reads all in one pass."
        )


def load(
    checkpoint_dir: str,
    precision: str | None,
    accelerator: str,
    threads: int | None,
    quantize: str | None,
    place: tuple[int | str, int, str | None] | None = None,
) -> LLM:
    """A model, on one device or at a place (devices, num_nodes, generate_strategy), and CPU threads that suit it."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}.")
    began = time.perf_counter()
    many = place is not None and (place[0] != 1 or place[1] != 1 or place[2] is not None)
    if many and quantize is not None:
        raise ValueError("Quantized weights are for one device: leave out --devices, --num-nodes, --generate-strategy.")
    way = None if many else "auto"
    llm = LLM.load(checkpoint_dir, precision=precision, accelerator=accelerator, quantize=quantize, distribute=way)
    if many:
        devices, num_nodes, strategy = place
        llm.distribute(accelerator, devices, num_nodes, precision, strategy)
    Output.of(llm).note(f"Loaded {checkpoint_dir} on {llm.fabric.device} in {time.perf_counter() - began:.2f} s.")
    if threads is None and llm.fabric.device.type == "cpu":
        threads = 1 if sum(p.numel() for p in llm.model.parameters()) < SMALL_MODEL else None
    if threads is not None:
        torch.set_num_threads(threads)
    return llm


def chat(
    checkpoint_dir: str,
    *,
    sys_prompt: str | None = None,
    max_new_tokens: int = 256,
    max_tokens: int | None = None,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 1234,
    stop: list[str] | str | None = None,
    multiline: bool = False,
    kv_cache: dict[str, Any] | str = "dense",
    prefill: str = "min-length",
    quantize: str | None = None,
    precision: str | None = None,
    accelerator: str = "auto",
    threads: int | None = None,
    compile: bool = False,
) -> None:
    """Talk with a model. Only each new turn is read: the cache stays.

    /reset forgets the conversation, /cache tells what is kept, /quit ends; Ctrl-C ends a reply. A line that ends with a
    backslash goes on with the next one.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        sys_prompt: The system prompt, for prompt styles that have one.
        max_new_tokens: The most new tokens of a reply.
        max_tokens: How many tokens the conversation may have: the size of a dense cache, and the budget where none is
            given. By default the model's context, at most 8192.
        top_k: Sample among so many most probable tokens; null for all.
        top_p: Sample among the most probable tokens that together have this probability; 0 takes the most probable one.
        temperature: Higher is more random; 0 takes the most probable token. By default what the checkpoint's
            generation_config.json says, else 0.8.
        repetition_penalty: Over 1 makes tokens that the text has already less probable.
        seed: Of the random choices.
        stop: A text that ends a reply and is not part of it; give the option several times for several.
        multiline: Every input has several lines and ends with !submit on a line of its own.
        kv_cache: What to keep: a strategy of `litgpt_kv strategies`. With --kv-cache.budget, .sinks, .recent, .storage,
            .positions and the strategy's own options; `--kv-cache.help sink` explains one.
        prefill: How the first turn is read: "min-length" or "full".
        quantize: Quantize the weights with bitsandbytes, which needs an NVIDIA GPU: bnb.nf4, bnb.nf4-dq, bnb.fp4,
            bnb.fp4-dq or bnb.int8.
        precision: Lightning Fabric's name; by default 32-true on a CPU and bf16-true on a GPU.
        accelerator: cpu, cuda, mps, or auto.
        threads: CPU threads; by default one for a small model.
        compile: Compile the decode step: slow to start, fast to run.
    """
    args = cache_args(kv_cache)
    if args is None:
        raise ValueError("kv_cache 'none' keeps nothing between turns: choose a strategy.")
    if temperature is None:
        temperature = checkpoint.own_temperature(checkpoint.find(checkpoint_dir))
    llm = load(checkpoint_dir, precision, accelerator, threads, quantize)
    if compile:
        llm.compile()
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    settings |= {"max_tokens": max_tokens, "max_new_tokens": max_new_tokens, "seed": seed, "stop": stop or ()}
    talk(llm.chat(sys_prompt, kv_cache=args, prefill=prefill, **settings), multiline)


def strategies() -> None:
    """List every registered strategy: what it keeps, its parameters and defaults, its paper."""
    for name in registry.names("strategy"):
        print(describe(name))


def report(
    output: Output, stats: Stats, cache: KVCache | None, brief: bool = False, parallel: ParallelStrategy | None = None
) -> None:
    """What a run did, on standard error; `brief` without what each row keeps. The cache is that of process 0."""
    prefill = f"{stats.prefill_seconds:.2f} s ({_rate(stats.prefill_tokens, stats.prefill_seconds)})"
    if (later := stats.prompt_tokens - stats.prefill_tokens) > 0:
        prefill += f" and {later:,} beside decoding"
    decode = f"{stats.decode_seconds:.2f} s ({_rate(stats.decode_tokens, stats.decode_seconds)})"
    output.note(f"Read {stats.prompt_tokens:,} prompt tokens in {prefill}, made {stats.new_tokens:,} in {decode}.")
    if cache is not None:
        size, tokens = cache.allocated(), cache.tokens()
        kept = ", ".join(f"{k:,} of {s:,}" for k, s in zip(tokens["kept"], tokens["seen"]))
        names = cache.args.strategy if isinstance(cache.args.strategy, (list, tuple)) else [cache.args.strategy]
        budgets = sorted({slots.size for slots in cache.slots})
        parts = ", ".join(f"{what} {n:,}" for what, n in size.items() if n and what != "total")
        budget = " to ".join(f"{b:,}" for b in dict.fromkeys([budgets[0], budgets[-1]]))
        what = f"Cache {', '.join(dict.fromkeys(names))}: budget {budget} tokens, {size['total']:,} bytes ({parts})"
        if parallel is not None and parallel.collectives.size > 1:
            what += f" on process 0 of {parallel.collectives.size}"
        output.note(what + "." if brief else f"{what}; kept {kept} tokens seen.")


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 and tokens else "not measured"
