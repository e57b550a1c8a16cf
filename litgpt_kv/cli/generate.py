"""`litgpt_kv generate`: continue one prompt, a batch of prompts, or all prompts of a file."""

from __future__ import annotations

import contextlib
from collections import abc
from dataclasses import asdict
from json import dumps
from typing import Any

from litgpt_kv import registry
from litgpt_kv.arguments import DeviceArgs, RunArgs, StoppingArgs, check_count
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cli.answers import MOST_SAMPLES, Answers
from litgpt_kv.cli.file_run import answer_file
from litgpt_kv.cli.loading import CLI_SAMPLING, budget_note, load
from litgpt_kv.cli.output import Output, report, statistics
from litgpt_kv.cli.progress import Reading
from litgpt_kv.cli.prompt_files import Line, PromptFile
from litgpt_kv.cli.run_digest import digest_of
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.generate.runner import BLOCK
from litgpt_kv.llm import checkpoint
from litgpt_kv.llm.llm import LLM
from litgpt_kv.llm.text_request import TextRequest

QUESTION = "What food do llamas eat?"
MOST_BAD_LINES = 20  # as many are shown one by one, the rest as a count
MANY_STEPS = 256  # from so many steps in which prompts are read, a note names the faster option


def generate(
    checkpoint_dir: str,
    prompt: list[str] | str | None = None,
    *,
    prompts: str | None = None,
    out: str | None = None,
    resume: bool = False,
    sys_prompt: str | None = None,
    num_samples: int = 1,
    json: bool = False,
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
        prompts: A file of prompts: .jsonl with {"prompt": ...} and optional settings on each line, or in OpenAI's batch
            format, or text with one prompt a line; - is standard input.
        out: Write the answers to this file, as JSON lines; by default they go to standard output.
        resume: Continue the file of an interrupted run.
        sys_prompt: The system prompt; refused if the model's prompt style has no place for one.
        num_samples: How many texts to make of each prompt; each has the next seed.
        json: Print one JSON object instead of text: answers, statistics of the run, and the size of the cache.
        stopping: When a text ends.
        sampling: How tokens are chosen.
        kv_cache: Which tokens the cache keeps.
        run: How prompts are batched.
        device: Where to run.
    """
    args = KVCacheArgs.of(kv_cache)
    check_count("num_samples", num_samples, 1, MOST_SAMPLES)
    if prompts is None and (out is not None or resume):
        raise ValueError("--out and --resume need a file of prompts: --prompts FILE.")
    if prompts is None and run.logprobs and not json:
        raise ValueError("--logprobs needs --json, or a file of prompts: --prompts FILE.")
    if prompts is not None and json and out in (None, "-"):
        raise ValueError("--json prints the statistics: write the answers to a file, --out FILE.")
    if prompts is not None and prompt is not None:
        raise ValueError("Give either --prompt or --prompts.")
    if prompts == "-" and (device.devices != 1 or device.num_nodes != 1):
        raise ValueError("Standard input reaches one process only: give a file of prompts.")
    sampling = sampling.resolved(checkpoint.own_temperature(checkpoint.find(checkpoint_dir)))
    if prompts is not None:
        defaults = TextRequest(sys_prompt=sys_prompt, stopping=stopping, sampling=sampling)
        file = PromptFile(prompts, defaults)
        settings = answer_settings(checkpoint_dir, defaults, args, run, device, num_samples)
        usual = TextRequest(sampling=CLI_SAMPLING)
        usual_settings = answer_settings("", usual, KVCacheArgs(), RunArgs(), DeviceArgs(), 1) | {"import": []}
        answers = Answers(out, resume, digest_of(settings, usual_settings), usual_settings)
        _answer(load(checkpoint_dir, device, sys_prompt), file, answers, args, run, num_samples, json)
        return
    prompt = QUESTION if prompt is None else prompt
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if "" in texts or not texts:
        raise ValueError("The prompt is empty.")
    requests = [
        TextRequest(text, sys_prompt=sys_prompt, stopping=stopping, sampling=row_sampling)
        for text, row_sampling in zip(texts, sampling.rows(len(texts)))
    ]
    llm = load(checkpoint_dir, device, sys_prompt)
    output, total, records = Output.of(llm), Stats(), []
    output.take_notes(llm)
    failed: list[Sequence] = []
    for sample in range(num_samples):
        batch = [llm.request(request.sample(sample), b) for b, request in enumerate(requests)]
        steps = llm.run(batch, args, run)
        _announce(output, batch, steps.cache, run, args)
        prompts_read = [llm.decode(request.prompt.tolist()) for request in batch]
        reading = Reading(steps.stats, sum(len(request.prompt) for request in batch), output.shown)
        continuations = Continuations(Output(shown=False) if json else output, prompts_read)
        try:
            for sequences in steps:
                reading.close()
                continuations.add(sequences)
        finally:
            reading.close()
        sequences = continuations.end()
        report(output, llm, steps.stats, steps.cache)
        total.add(steps.stats)
        records += [_json_answer(text, s, sample if num_samples > 1 else None) for text, s in zip(texts, sequences)]
        failed += [sequence for sequence in sequences if sequence.error is not None]
    if json:
        output.text(dumps({"checkpoint": checkpoint_dir, "answers": records, **statistics(llm, total, steps.cache)}))
    for sequence in failed:
        output.note(f"Prompt {sequence.index + 1} failed: {sequence.error}")
    if failed:
        raise SystemExit(1)


def _json_answer(prompt: str, sequence: Sequence, sample: int | None) -> dict[str, Any]:
    """Return one answer of `--json`; the names are those of files of answers."""
    record: dict[str, Any] = {"prompt": prompt, "text": sequence.text} | ({} if sample is None else {"sample": sample})
    record |= {"prompt_tokens": len(sequence.prompt), "new_tokens": len(sequence.tokens)}
    record |= {"finish_reason": sequence.reason} | ({} if sequence.error is None else {"error": sequence.error})
    return record | ({"tokens": sequence.tokens, "logprobs": sequence.logprobs} if sequence.logprobs else {})


def answer_settings(
    checkpoint_dir: str,
    defaults: TextRequest,
    args: KVCacheArgs | None,
    run: RunArgs,
    device: DeviceArgs,
    num_samples: int,
) -> dict[str, Any]:
    """Return the settings that change answers, by their names on the command line; `--resume` needs the same."""
    settings: dict[str, Any] = {"checkpoint_dir": checkpoint_dir, "sys_prompt": defaults.sys_prompt}
    settings |= asdict(defaults.stopping) | asdict(defaults.sampling)
    cache = {"strategy": "none"} if args is None else asdict(args)
    settings |= {f"kv_cache.{name}": cache.get(name) for name in asdict(KVCacheArgs())}
    settings |= {name: getattr(run, name) for name in ("prefill", "prefill_chunk", "logprobs")}
    settings |= {"num_samples": num_samples > 1, "precision": device.precision, "quantize": device.quantize}
    return settings | {"import": sorted(registry.IMPORTED.values())}


class Continuations:
    """Print prompts and their continuations: a single one while it is generated, several at the end, in their order."""

    def __init__(self, output: Output, texts: list[str]) -> None:
        self.output, self.texts = output, texts
        self.ended: dict[int, Sequence] = {}
        self._unprinted = texts[0]

    def add(self, sequences: list[Sequence]) -> None:
        """Print the new text of a step."""
        if len(self.texts) == 1:
            self.output.text(self._unprinted + sequences[0].new_text, end="")
            self._unprinted = ""
        self.ended |= {sequence.index: sequence for sequence in sequences if sequence.reason is not None}

    def end(self) -> list[Sequence]:
        """Print the rest, and return the sequences."""
        answers = [self.ended[number] for number in range(len(self.texts))]
        if len(self.texts) == 1:
            self.output.text("")
        else:
            for text, sequence in zip(self.texts, answers):
                self.output.text(text + sequence.text)
        return answers


def _answer(
    llm: LLM,
    prompts: PromptFile,
    answers: Answers,
    args: KVCacheArgs | None,
    run: RunArgs,
    num_samples: int,
    json: bool,
) -> None:
    output = Output.of(llm)
    notes = _FileNotes(output, run, args)
    callbacks = {"on_begin": notes.begin, "on_bad": notes.bad, "on_failed": notes.failed}
    with answers, contextlib.closing(prompts):
        try:
            counts = answer_file(llm, prompts, answers, args, run, num_samples=num_samples, **callbacks)
        except KeyboardInterrupt:
            if answers.path is not None:
                where = f"{answers.path} and its parts" if answers.divided else answers.path
                output.note(f"Interrupted: {len(answers):,} answers are in {where}; continue with --resume.")
            raise
        answers.close()
    if counts.bad > MOST_BAD_LINES:
        output.note(f"{counts.bad - MOST_BAD_LINES:,} more lines were skipped.")
    if counts.failed > MOST_BAD_LINES:
        output.note(f"{counts.failed - MOST_BAD_LINES:,} more answers failed.")
    if llm.stats.new_tokens:
        report(output, llm, llm.stats, llm.cache, brief=True)
    where = "" if answers.path is None else f" in {answers.path}"
    before = len(answers.before)
    resumed = f", {before:,} of them from an earlier run" if before else ""
    if orphans := before - answers.matched:
        resumed += f", {orphans:,} for prompts that are not in this file"
    failed = f"; {counts.failed:,} ended with an error: --resume tries them again" if counts.failed else ""
    what = f"{counts.bad:,} of {counts.lines:,} lines could not be used"
    output.note(f"{len(answers):,} answers{where}{resumed}{failed}; {what}.")
    if json:
        about = {"lines": counts.lines, "skipped": counts.bad, "failed": counts.failed, "answers": len(answers)}
        output.text(dumps({"out": str(answers.path), **about, **statistics(llm, llm.stats, llm.cache)}))
    if counts.bad or counts.failed:
        raise SystemExit(1)


class _FileNotes:
    """Print notes while a file of prompts is answered: bad lines, failed answers, a slow way to read prompts."""

    def __init__(self, output: Output, run: RunArgs, args: KVCacheArgs | None) -> None:
        self.output, self.run, self.args = output, run, args
        self.bad_lines, self.failed_lines, self.announced = 0, 0, False

    def bad(self, line: Line) -> None:
        self.bad_lines += 1
        if self.bad_lines <= MOST_BAD_LINES:
            self.output.note(f"Line {line.number} was skipped: {line.error:.300}")

    def failed(self, line: Line, error: str) -> None:
        self.failed_lines += 1
        if self.failed_lines <= MOST_BAD_LINES:
            self.output.note(f"Line {line.number} failed: {error:.300}")

    def begin(self, requests: abc.Sequence[Request], cache: KVCache | None) -> None:
        args, self.args = self.args, None  # the note about the budget comes once
        self.announced = self.announced or _announce(self.output, requests, cache, self.run, args)


def _announce(
    output: Output, requests: abc.Sequence[Request], cache: KVCache | None, run: RunArgs, args: KVCacheArgs | None
) -> bool:
    """Print a note if nothing will be evicted for want of a budget, and if prompts will be read in many small steps;
    return whether the latter was printed."""
    if (note := budget_note(args)) is not None:
        output.note(note)
    if not requests or cache is None or run.prefill != "min-length" or run.prefill_chunk is not None:
        return False
    lengths = [len(request.prompt) for request in requests]
    longest, first = max(lengths), cache.first_chunk
    block = min(BLOCK, cache.longest_block) if cache.exact_blocks else 1
    if block == 1:  # all rows take these steps together
        steps, how = longest - first, "one at a time"
    elif longest > cache.context:  # nothing is faster
        return False
    else:  # blocks of different rows are read one after the other
        steps, how = sum(-(-max(0, length - first) // block) for length in lengths), f"in blocks of {block}"
    if steps < MANY_STEPS:
        return False
    faster = "--prefill full reads all in one pass, then evicts"
    if longest > cache.context:  # which one pass cannot read
        faster = f"--prefill-chunk {min(BLOCK, cache.longest_block)} reads blocks and evicts for each at once"
    budget = min(slots.plan.slots for slots in cache.slots)
    what = f"{longest:,} tokens, {longest / budget:.3g} times the budget"
    which = "A" if len(requests) == 1 else "The longest"
    output.note(f"{which} prompt has {what}: {longest - first:,} will be read {how}; {faster}.")
    return True
