"""The commands of `litgpt_kv`. Text goes to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import abc
from dataclasses import asdict, fields
from typing import Annotated

import torch

from litgpt_kv import registry
from litgpt_kv.arguments import DeviceArgs, RunArgs, StoppingArgs, Without, check_count
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cli.answers import MOST_SAMPLES, Answers
from litgpt_kv.cli.file_run import answer_file
from litgpt_kv.cli.output import Output
from litgpt_kv.cli.prompt_files import Line, PromptFile
from litgpt_kv.cli.strategies import table
from litgpt_kv.cli.terminal import talk
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.llm import LLM
from litgpt_kv.llm.text_request import TextRequest
from litgpt_kv.parallel import ParallelStrategy

CLI_SAMPLING = SamplingArgs(temperature=None, top_k=50, seed=1234)  # litgpt's defaults on the command line
SMALL_MODEL = 20_000_000  # weights
QUESTION = "What food do llamas eat?"
MOST_BAD_LINES = 20  # that are shown
MANY_STEPS = 256  # prompt tokens read one at a time, from which on the user is told of a faster way


def generate(
    checkpoint_dir: str,
    prompt: list[str] | str | None = None,
    *,
    prompts: str | None = None,
    out: str | None = None,
    resume: bool = False,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    stopping: StoppingArgs = StoppingArgs(),
    sampling: SamplingArgs = CLI_SAMPLING,
    kv_cache: KVCacheArgs = KVCacheArgs(),
    run: RunArgs = RunArgs(),
    device: DeviceArgs = DeviceArgs(),
) -> None:
    """Continue one prompt, several in one batch, or all of a file.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        prompt: The text to continue (default: "What food do llamas eat?"); give the option several times for a batch.
        prompts: A file of prompts: .jsonl with {"prompt": ...} and, if it likes, settings of its own on each line, or
            in OpenAI's batch format, or text with one prompt a line; - is standard input.
        out: A file that takes the answers as JSON lines; by default they go to standard output.
        resume: Go on with an interrupted run's file.
        sys_prompt: The system prompt, for prompt styles that have one.
        num_samples: How many texts to make of each prompt; each has the next seed.
        stopping: When a text ends.
        sampling: How tokens are chosen.
        kv_cache: What to keep.
        run: How prompts are batched.
        device: Where to run.
    """
    args = KVCacheArgs.of(kv_cache)
    check_count("num_samples", num_samples, 1, MOST_SAMPLES)
    if prompts is None and (out is not None or resume or run.logprobs):
        raise ValueError("--out, --resume and --logprobs go with a file of prompts: --prompts FILE.")
    if prompts is not None and prompt is not None:
        raise ValueError("Give either --prompt or --prompts.")
    if prompts == "-" and (device.devices != 1 or device.num_nodes != 1):
        raise ValueError("Standard input reaches one process only: give a file of prompts.")
    sampling = sampling.resolved(checkpoint.own_temperature(checkpoint.find(checkpoint_dir)))
    if prompts is not None:
        asked = TextRequest(sys_prompt=sys_prompt, stopping=stopping, sampling=sampling)
        file = PromptFile(prompts, asked)
        answers = Answers(out, resume, digest_of(checkpoint_dir, asked, args, run, device, num_samples))
        _answer(load(checkpoint_dir, device), file, answers, args, run, num_samples)
        return
    prompt = QUESTION if prompt is None else prompt
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if "" in texts or not texts:
        raise ValueError("The prompt is empty.")
    requests = [
        TextRequest(text, sys_prompt=sys_prompt, stopping=stopping, sampling=own)
        for text, own in zip(texts, sampling.rows(len(texts)))
    ]
    llm = load(checkpoint_dir, device)
    failed: list[Sequence] = []
    for sample in range(num_samples):
        asked = [llm.request(request.sample(sample), b) for b, request in enumerate(requests)]
        steps = llm.run(asked, args, run)
        _announce(Output.of(llm), asked, steps.cache, run)
        shown = Continuations(Output.of(llm), [llm.decode(request.prompt.tolist()) for request in asked])
        for drew in steps:
            shown.add(drew)
        sequences = shown.end()
        report(Output.of(llm), steps.stats, steps.cache, parallel=llm.parallel)
        failed += [sequence for sequence in sequences if sequence.error is not None]
    for sequence in failed:
        Output.of(llm).note(f"Prompt {sequence.index + 1} failed: {sequence.error}")
    if failed:
        raise SystemExit(1)


def digest_of(
    checkpoint_dir: str,
    asked: TextRequest,
    args: KVCacheArgs | None,
    run: RunArgs,
    device: DeviceArgs,
    num_samples: int,
) -> str:
    """A digest of the settings that change answers: those of another digest are not continued."""
    how = [run.prefill, run.prefill_chunk, run.logprobs, num_samples > 1, device.precision, device.quantize]
    files = sorted(registry.IMPORTED.values())
    made = [checkpoint_dir, asdict(asked), None if args is None else asdict(args), *how, files]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:8]


class Continuations:
    """Prints prompts and their continuations: one as it is made, several when all are, in the order of the prompts."""

    def __init__(self, output: Output, texts: list[str]) -> None:
        self.output, self.texts = output, texts
        self.ended: dict[int, Sequence] = {}
        self._begin = texts[0]

    def add(self, drew: list[Sequence]) -> None:
        """Print what a step added."""
        if len(self.texts) == 1:
            self.output.text(self._begin + drew[0].piece, end="")
            self._begin = ""
        self.ended |= {sequence.index: sequence for sequence in drew if sequence.reason is not None}

    def end(self) -> list[Sequence]:
        """Print the rest; return the answers."""
        answers = [self.ended[number] for number in range(len(self.texts))]
        if len(self.texts) == 1:
            self.output.text("")
        else:
            for text, sequence in zip(self.texts, answers):
                self.output.text(text + sequence.text)
        return answers


def _answer(
    llm: LLM, prompts: PromptFile, answers: Answers, args: KVCacheArgs | None, run: RunArgs, num_samples: int
) -> None:
    output = Output.of(llm)
    notes = _FileNotes(output, run)
    callbacks = {"on_begin": notes.begin, "on_bad": notes.bad, "on_failed": notes.failed}
    with answers, contextlib.closing(prompts):
        try:
            counts = answer_file(llm, prompts, answers, args, run, num_samples=num_samples, **callbacks)
        except KeyboardInterrupt:
            if answers.path is not None:
                where = f"{answers.path} and its parts" if answers.divided else answers.path
                output.note(f"Interrupted: {len(answers):,} answers are in {where}; --resume goes on.")
            raise
        answers.close()
    if counts.bad > MOST_BAD_LINES:
        output.note(f"{counts.bad - MOST_BAD_LINES:,} more lines were left out.")
    if counts.failed > MOST_BAD_LINES:
        output.note(f"{counts.failed - MOST_BAD_LINES:,} more answers failed.")
    if llm.stats.new_tokens:
        report(output, llm.stats, llm.cache, brief=True, parallel=llm.parallel)
    where = "" if answers.path is None else f" in {answers.path}"
    before = len(answers.before)
    resumed = f", {before:,} of them from before" if before else ""
    if orphans := before - answers.matched:
        resumed += f", {orphans:,} to no line of this file"
    failed = f"; {counts.failed:,} ended with an error: --resume tries them again" if counts.failed else ""
    what = f"{counts.bad:,} of {counts.lines:,} lines could not be used"
    output.note(f"{len(answers):,} answers{where}{resumed}{failed}; {what}.")
    if counts.bad or counts.failed:
        raise SystemExit(1)


class _FileNotes:
    """Notes on standard error while a file of prompts is answered: bad lines, failed answers, a slow first read."""

    def __init__(self, output: Output, run: RunArgs) -> None:
        self.output, self.run, self.bad_lines, self.failed_lines, self.announced = output, run, 0, 0, False

    def bad(self, line: Line) -> None:
        self.bad_lines += 1
        if self.bad_lines <= MOST_BAD_LINES:
            self.output.note(f"Line {line.number} was left out: {line.error:.300}")

    def failed(self, line: Line, error: str) -> None:
        self.failed_lines += 1
        if self.failed_lines <= MOST_BAD_LINES:
            self.output.note(f"Line {line.number} failed: {error:.300}")

    def begin(self, requests: abc.Sequence[Request], cache: KVCache | None) -> None:
        self.announced = self.announced or _announce(self.output, requests, cache, self.run)


def _announce(output: Output, requests: abc.Sequence[Request], cache: KVCache | None, run: RunArgs) -> bool:
    """Say when much of a prompt will be read slowly, and what would be faster; return whether that was said."""
    if not requests or cache is None or run.prefill != "min-length" or run.prefill_chunk is not None:
        return False
    if cache.exact_blocks:
        return False
    lengths = [len(request.prompt) for request in requests]
    longest, first = max(lengths), min(cache.first_chunk, max(lengths))
    if longest - first >= MANY_STEPS:
        budget = min(slots.plan.slots for slots in cache.slots)
        what = f"{longest:,} tokens, {longest / budget:.3g} times the budget"
        output.note(
            f"{'A' if len(requests) == 1 else 'The longest'} prompt has {what}: {longest - first:,} will be read one "
            "at a time; --prefill full reads all in one pass."
        )
        return True
    return False


def load(checkpoint_dir: str, device: DeviceArgs) -> LLM:
    """A model where `device` says, and CPU threads that suit it."""
    began = time.perf_counter()
    llm = LLM.load(
        checkpoint_dir,
        precision=device.precision,
        accelerator=device.accelerator,
        quantize=device.quantize,
        distribute=None if device.many else "auto",
        check_weights=device.check_weights,
    )
    if device.many:
        where = device.accelerator, device.devices, device.num_nodes, device.precision, device.generate_strategy
        llm.distribute(*where, check_weights=device.check_weights)
    Output.of(llm).note(f"Loaded {checkpoint_dir} on {llm.fabric.device} in {time.perf_counter() - began:.2f} s.")
    threads = device.threads
    if threads is None and llm.fabric.device.type == "cpu":
        threads = 1 if sum(p.numel() for p in llm.model.parameters()) < SMALL_MODEL else None
    if threads is not None:
        torch.set_num_threads(threads)
    if device.compile:
        llm.compile()
    return llm


def chat(
    checkpoint_dir: str,
    *,
    sys_prompt: str | None = None,
    max_tokens: int | None = None,
    multiline: bool = False,
    stopping: StoppingArgs = StoppingArgs(max_new_tokens=256),
    sampling: SamplingArgs = CLI_SAMPLING,
    kv_cache: KVCacheArgs = KVCacheArgs(),
    run: Annotated[RunArgs, Without("batch_size", "prefill_chunk", "logprobs")] = RunArgs(),
    device: Annotated[DeviceArgs, Without("devices", "num_nodes", "generate_strategy")] = DeviceArgs(),
) -> None:
    """Talk with a model. Only each new turn is read: the cache stays.

    /reset forgets the conversation, /cache tells what is kept, /quit ends; Ctrl-C ends a reply. A line that ends with a
    backslash goes on with the next one.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        sys_prompt: The system prompt, for prompt styles that have one.
        max_tokens: How many tokens the conversation may have: the size of a dense cache, and the budget where none is
            given. By default the model's context, at most 8192.
        multiline: Every input has several lines and ends with !submit on a line of its own.
        stopping: When a reply ends.
        sampling: How tokens are chosen.
        kv_cache: What to keep.
        run: How the first turn is read.
        device: Where to run.
    """
    args = KVCacheArgs.of(kv_cache)
    if args is None:
        raise ValueError("kv_cache 'none' keeps nothing between turns: choose a strategy.")
    llm = load(checkpoint_dir, device)
    settings = {f.name: getattr(part, f.name) for part in (stopping, sampling) for f in fields(part)}
    talk(llm.chat(sys_prompt, kv_cache=args, max_tokens=max_tokens, prefill=run.prefill, **settings), multiline)


def strategies() -> None:
    """List every registered strategy in a table to choose from; `--kv-cache.help NAME` says all of one.

    The columns: what its score is made of; when it evicts; whether it is defined for multi-head latent attention; who
    chooses what stays, and from where positions count, unless `--kv-cache.select` and `--kv-cache.positions` say
    otherwise. Below: what it keeps, and its source.
    """
    print(table(registry.names("strategy")))


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
        budgets = sorted({slots.plan.slots for slots in cache.slots})
        parts = ", ".join(f"{what} {n:,}" for what, n in size.items() if n and what != "total")
        budget = " to ".join(f"{b:,}" for b in dict.fromkeys([budgets[0], budgets[-1]]))
        what = f"Cache {', '.join(dict.fromkeys(names))}: budget {budget} tokens, {size['total']:,} bytes ({parts})"
        if parallel is not None and parallel.collectives.size > 1:
            what += f" on process 0 of {parallel.collectives.size}"
        output.note(what + "." if brief else f"{what}; kept {kept} tokens seen.")


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 and tokens else "not measured"
