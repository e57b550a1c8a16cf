"""Answer a file of prompts as a stream, in memory that does not grow with the file."""

from __future__ import annotations

from collections import abc, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from tqdm import tqdm

from litgpt_kv.arguments import RunArgs
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cli.answers import FAILED, MOST_SAMPLES, Answers
from litgpt_kv.cli.prompt_files import Line, PromptFile
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.generate.limits import Limits
from litgpt_kv.llm.llm import LLM
from litgpt_kv.llm.openai_batch import batch_answer
from litgpt_kv.llm.run import OpenRun, Run

ROWS = 8  # the default of batch_size
WINDOW = 2048  # prompts that are divided among the processes at a time
GROWTH = 1.25  # a cache without a budget grows by at least this factor when a longer row comes


@dataclass
class Counts:
    """Count the lines of a file, those that could not be used, and the answers that ended with an error."""

    lines: int = 0
    bad: int = 0
    failed: int = 0


def answer_file(
    llm: LLM,
    prompts: PromptFile,
    answers: Answers,
    args: KVCacheArgs | None,
    run_args: RunArgs | None = None,
    *,
    num_samples: int = 1,
    on_begin: Callable[[abc.Sequence[Request], KVCache | None], None] = lambda requests, cache: None,
    on_bad: Callable[[Line], None] = lambda line: None,
    on_failed: Callable[[Line, str], None] = lambda line, error: None,
) -> Counts:
    """Answer the prompts of a file in batches, and show a progress bar if standard error is a terminal.

    The file is read as a stream, so memory does not grow with it. It is read a second time in three cases: a budget is
    a percentage of the longest row, the decode step is compiled for one cache size, or `--resume` must compare the
    answers of an earlier run with the prompts.

    Args:
        llm: The model.
        prompts: The file.
        answers: Where to write the answers.
        args: The cache; None for none.
        run_args: How prompts are batched and read; the default batch size is 8.
        num_samples: How many answers to make for each prompt.
        on_begin: Called with the requests that start, and their cache.
        on_bad: Called with each line that cannot be used; `line.error` says why.
        on_failed: Called with each line whose answer ended with an error, and the error.

    Returns:
        The numbers of lines, bad lines and failed answers.

    Raises:
        ValueError: If `answers` does not belong to these prompts, or cannot be written.
    """
    if num_samples > MOST_SAMPLES:
        raise ValueError(f"num_samples must be at most {MOST_SAMPLES:,} for a file of prompts, got {num_samples:,}.")
    answers.begin(llm.parallel)
    run_args = replace(run_args or RunArgs(), batch_size=(run_args.batch_size if run_args else None) or ROWS)
    run = FileRun(llm, answers, args, num_samples, run_args, on_begin, on_bad, on_failed)
    if len(answers.before) and prompts.is_repeatable:
        run.compare(prompts)
    tokens = run.longest(prompts.repeatable()) if run.needs_longest else None
    divided = llm.parallel is not None and llm.parallel.divides_prompts
    steps = (run.divided if divided else run.streamed)(run.requests(prompts, tokens), tokens)
    hidden = None if llm.fabric.is_global_zero else True  # None: a bar on terminals only
    with tqdm(initial=len(answers), unit="prompt", disable=hidden) as bar:
        for sequence in (sequence for step in steps for sequence in step if sequence.reason is not None):
            run.finish(sequence)
            bar.update()
    llm.last_run = run
    return run.counts


@dataclass
class FileRun:
    """Turn the lines of a file into requests, and finished sequences into answers.

    Attributes:
        stats: The sums over all caches of the run.
        cache: The newest cache.
    """

    llm: LLM
    answers: Answers
    args: KVCacheArgs | None
    num_samples: int
    batching: RunArgs
    on_begin: Callable[[abc.Sequence[Request], KVCache | None], None]
    on_bad: Callable[[Line], None]
    on_failed: Callable[[Line, str], None]
    counts: Counts = field(default_factory=Counts)
    stats: Stats = field(default_factory=Stats)
    cache: KVCache | None = None
    _running: dict[int, tuple[Line, int]] = field(default_factory=dict)  # request id: line and sample number
    _next_id: int = 0

    def __post_init__(self) -> None:
        budget = None if self.args is None else self.args.budget
        self._budgets = list(budget) if isinstance(budget, (list, tuple)) else [budget]

    @property
    def grows(self) -> bool:
        """Return whether a layer has no budget, so that the cache must be as large as its longest row."""
        return self.args is not None and None in self._budgets

    @property
    def needs_longest(self) -> bool:
        """Return whether the longest row must be known before the first step."""
        compiled = self.llm.decoder is not self.llm.model
        return any(isinstance(budget, str) for budget in self._budgets) or (compiled and self.grows)

    def compare(self, prompts: Iterable[Line]) -> None:
        """Raise ValueError if the answers of an earlier run are for other prompts, or were made with other settings."""
        for line in prompts:
            if line.error is None:
                for sample in range(min(self.num_samples, MOST_SAMPLES)):
                    self.answers.matches((line.number, sample), line.prompt)
        self.answers.matched = 0

    def longest(self, prompts: Iterable[Line]) -> int:
        """Return the most tokens that a row will see, over all usable lines."""
        limits = Limits.of(self.llm.model, self.args, self.batching.prefill)
        requests = (self._request(line, limits) for line in prompts)
        return max((request.cache_tokens for request in requests if request is not None), default=1)

    def requests(self, prompts: Iterable[Line], tokens: int | None) -> Iterator[Request]:
        """Yield the requests that have no answer yet. Count bad lines and pass them to `on_bad`."""
        limits = Limits.of(self.llm.model, self.args, self.batching.prefill, tokens)
        for line in prompts:
            self.counts.lines += 1
            request = self._request(line, limits)
            if request is None:
                self.counts.bad += 1
                self.on_bad(line)
                continue
            for sample in range(self.num_samples):
                key = line.number, sample
                self.answers.expect(key)
                if not self.answers.matches(key, line.prompt):
                    request = request if sample == 0 else self.llm.request(line.request.sample(sample))
                    id, self._next_id = self._next_id, self._next_id + 1
                    self._running[id] = line, sample
                    yield replace(request, id=id)

    def _request(self, line: Line, limits: Limits) -> Request | None:
        """Return the request of the first sample; if it cannot be run, set `line.error` and return None."""
        if line.error is None:
            try:
                request = self.llm.request(line.request)
                limits.check(request)
                if self.grows and self.args.keep_prompt:  # the smallest cache it may run in
                    Limits.of(self.llm.model, self.args, self.batching.prefill, request.cache_tokens).check(request)
                return request
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                line.error = str(error)
        return None

    def streamed(self, requests: Iterator[Request], tokens: int | None) -> Iterator[list[Sequence]]:
        """Answer requests as they come.

        If a request is too long for a cache without a budget, it waits until the running ones have ended; then a
        larger cache is made.
        """
        ahead: deque[Request] = deque()
        size = 0

        def fill(count: int) -> bool:
            ahead.extend(islice(requests, max(0, count - len(ahead))))
            return bool(ahead)

        def fitting() -> Iterator[Request]:
            while fill(1) and (not self.grows or ahead[0].cache_tokens <= size):
                if self.cache is not None:  # `on_begin` was not called for the first ones yet
                    self.on_begin([ahead[0]], self.cache)
                yield ahead.popleft()

        limit = Limits.of(self.llm.model, self.args, self.batching.prefill).limit
        while fill(self.batching.batch_size or ROWS):
            longest = max(request.cache_tokens for request in ahead)
            size = tokens or max(longest, int(size * GROWTH) if limit is None else min(limit, int(size * GROWTH)))
            first, self.cache = list(ahead), None
            run = self.llm.answer(fitting(), self.args, replace(self.batching, batch_size=len(ahead)), size)
            self.cache = run.cache
            self.on_begin(first, run.cache)
            yield from run
            self._count(run)

    def divided(self, requests: Iterator[Request], tokens: int | None) -> Iterator[list[Sequence]]:
        """Answer requests on several processes: each one answers a share of every `WINDOW` requests."""
        while window := list(islice(requests, WINDOW)):
            run = self.llm.run(window, self.args, self.batching, tokens)
            self.on_begin(window, run.cache)
            yield from run
            self._count(run)
            self.answers.merge()

    def finish(self, sequence: Sequence) -> None:
        """Write the answer of a finished sequence."""
        line, sample = self._running.pop(sequence.index)
        if sequence.reason == FAILED:
            self.counts.failed += 1
            self.on_failed(line, sequence.error or "its answer ended with an error")
        self.answers.add(_record(sequence, line, sample, many=self.num_samples > 1), sequence.remote)

    def _count(self, run: Run | OpenRun) -> None:
        self.cache = run.cache
        self.stats.add(run.stats)


def _record(sequence: Sequence, line: Line, sample: int, many: bool) -> dict[str, Any]:
    """Return the JSON fields of one answer. Seconds count from when the prompt got a row."""
    record: dict[str, Any] = {"line": line.number, **({"sample": sample} if many else {})}
    record |= {"id": line.request.id} if line.request.id is not None else {}
    record |= {"prompt": line.prompt}
    record |= {"text": sequence.text, "prompt_tokens": len(sequence.prompt), "new_tokens": len(sequence.tokens)}
    record |= {"finish_reason": sequence.reason} | ({} if sequence.error is None else {"error": sequence.error})
    record["first_token_seconds"] = round(sequence.first_token_time - sequence.start_time, 6)
    record["seconds"] = round(sequence.end_time - sequence.start_time, 6)
    record |= {"tokens": sequence.tokens, "logprobs": sequence.logprobs} if sequence.logprobs else {}
    return record | (batch_answer(line.batch, record, f"{line.number}-{sample}") if line.batch is not None else {})
