"""Answer a file of prompts: a stream of lines in, an answer for each out, in memory that does not grow."""

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

ROWS = 8  # prompts at a time unless told otherwise
WINDOW = 2048  # prompts that processes divide at a time
GROWTH = 1.25  # of a cache whose size hangs on the longest row, when a longer one comes


@dataclass
class Counts:
    """What became of a file of prompts: its lines, those that could not be used, answers that ended with an error."""

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
    """Answer the prompts of a file, some at a time, reading it as it goes; a terminal shows a progress bar.

    Memory does not grow with the file. It is read once more beforehand, and only then, where a budget is a share of
    the longest prompt, where the decode step is compiled for one size of cache, or to see whether the answers of a run
    before are to these prompts.

    Args:
        on_begin: called with requests that begin, and their cache.
        on_bad: called with each line that cannot be used, with its error, as it comes.
        on_failed: called with each line whose answer ended with an error, and the error.
        run_args: how prompts are batched and read; 8 at a time unless it says otherwise.
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
    """One run over a file of prompts: from lines to requests, and from sequences to answers."""

    llm: LLM
    answers: Answers
    args: KVCacheArgs | None
    num_samples: int
    batching: RunArgs
    on_begin: Callable[[abc.Sequence[Request], KVCache | None], None]
    on_bad: Callable[[Line], None]
    on_failed: Callable[[Line, str], None]
    counts: Counts = field(default_factory=Counts)
    stats: Stats = field(default_factory=Stats)  # of all caches
    cache: KVCache | None = None  # the last one
    _running: dict[int, tuple[Line, int]] = field(default_factory=dict)  # by the request's id
    _next_id: int = 0

    def __post_init__(self) -> None:
        budget = None if self.args is None else self.args.budget
        self._budgets = list(budget) if isinstance(budget, (list, tuple)) else [budget]

    @property
    def grows(self) -> bool:
        """Whether the size of the cache hangs on the longest row, as a dense one's does."""
        return self.args is not None and None in self._budgets

    @property
    def needs_longest(self) -> bool:
        """Whether the longest row must be known before the first step."""
        compiled = self.llm.decoder is not self.llm.model
        return any(isinstance(budget, str) for budget in self._budgets) or (compiled and self.grows)

    def compare(self, prompts: Iterable[Line]) -> None:
        """Raise ValueError if the answers that are there are to other prompts, or of other settings."""
        for line in prompts:
            if line.error is None:
                for sample in range(min(self.num_samples, MOST_SAMPLES)):
                    self.answers.matches((line.number, sample), line.prompt)
        self.answers.matched = 0

    def longest(self, prompts: Iterable[Line]) -> int:
        """The most tokens that a row will see, of all usable lines, answered or not."""
        limits = Limits.of(self.llm.model, self.args, self.batching.prefill)
        requests = (self._request(line, limits) for line in prompts)
        return max((request.sees for request in requests if request is not None), default=1)

    def requests(self, prompts: Iterable[Line], tokens: int | None) -> Iterator[Request]:
        """Yield what is to be answered; bad lines are counted and told, answers that are there left out."""
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
        """The first sample's request; None, and the line is given its error, if its samples cannot be run."""
        if line.error is None:
            try:
                request = self.llm.request(line.request)
                limits.check(request)
                if self.grows and self.args.keep_prompt:  # in the smallest cache that it may get
                    Limits.of(self.llm.model, self.args, self.batching.prefill, request.sees).check(request)
                return request
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                line.error = str(error)
        return None

    def streamed(self, requests: Iterator[Request], tokens: int | None) -> Iterator[list[Sequence]]:
        """Answer requests as they come. Where the cache grows, a request that is too long for it waits until all others
        have ended; then a larger one is made."""
        ahead: deque[Request] = deque()
        size = 0

        def fill(count: int) -> bool:
            ahead.extend(islice(requests, max(0, count - len(ahead))))
            return bool(ahead)

        def fitting() -> Iterator[Request]:
            while fill(1) and (not self.grows or ahead[0].sees <= size):
                if self.cache is not None:  # the first ones begin before they are told of
                    self.on_begin([ahead[0]], self.cache)
                yield ahead.popleft()

        limit = Limits.of(self.llm.model, self.args, self.batching.prefill).limit
        while fill(self.batching.batch_size or ROWS):
            longest = max(request.sees for request in ahead)
            size = tokens or max(longest, int(size * GROWTH) if limit is None else min(limit, int(size * GROWTH)))
            first, self.cache = list(ahead), None
            run = self.llm.answer(fitting(), self.args, replace(self.batching, batch_size=len(ahead)), size)
            self.cache = run.cache
            self.on_begin(first, run.cache)
            yield from run
            self._count(run)

    def divided(self, requests: Iterator[Request], tokens: int | None) -> Iterator[list[Sequence]]:
        """Answer requests over processes, each of which takes some of a window of them."""
        while window := list(islice(requests, WINDOW)):
            run = self.llm.run(window, self.args, self.batching, tokens)
            self.on_begin(window, run.cache)
            yield from run
            self._count(run)
            self.answers.merge()

    def finish(self, sequence: Sequence) -> None:
        """Hand over an answer."""
        line, sample = self._running.pop(sequence.index)
        if sequence.reason == FAILED:
            self.counts.failed += 1
            self.on_failed(line, sequence.error or "its answer ended with an error")
        self.answers.add(_record(sequence, line, sample, many=self.num_samples > 1), sequence.elsewhere)

    def _count(self, run: Run | OpenRun) -> None:
        stats, self.cache = run.stats, run.cache
        for name in ("prompt_tokens", "new_tokens", "prefill_tokens", "decode_tokens"):
            setattr(self.stats, name, getattr(self.stats, name) + getattr(stats, name))
        self.stats.prefill_seconds += stats.prefill_seconds
        self.stats.decode_seconds += stats.decode_seconds


def _record(sequence: Sequence, line: Line, sample: int, many: bool) -> dict[str, Any]:
    """One answer; seconds count from when the prompt was admitted."""
    record: dict[str, Any] = {"line": line.number, **({"sample": sample} if many else {})}
    record |= {"id": line.request.id} if line.request.id is not None else {}
    record |= {"prompt": line.prompt}
    record |= {"text": sequence.text, "prompt_tokens": len(sequence.prompt), "new_tokens": len(sequence.tokens)}
    record |= {"finish_reason": sequence.reason} | ({} if sequence.error is None else {"error": sequence.error})
    record["first_token_seconds"] = round(sequence.first - sequence.began, 6)
    record["seconds"] = round(sequence.ended - sequence.began, 6)
    record |= {"tokens": sequence.tokens, "logprobs": sequence.logprobs} if sequence.logprobs else {}
    return record | (batch_answer(line.batch, record, f"{line.number}-{sample}") if line.batch is not None else {})
