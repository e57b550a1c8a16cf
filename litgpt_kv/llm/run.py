"""One run of an `LLM`: its steps, statistics and cache."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace

from litgpt_kv.arguments import RunArgs
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs, check_type
from litgpt_kv.generate import Engine, Request, Sequence, Stats, begin, fill, raise_failed
from litgpt_kv.generate.limits import Limits
from litgpt_kv.llm.text_model import TextModel


class Run:
    """Answers requests, as many at a time as the cache has rows; iterate over it for the sequences that drew a token.

    With "data_parallel" a process answers some of the requests, and its last step has the answers of the others.

    Args:
        llm: The model and its tokenizer.
        requests: What to answer; one without an id gets its place in this list.
        args: What the cache keeps; None: no cache.
        batching: How prompts are read and batched; without a batch size, one row a request.
        tokens: What the longest row will see, prompt and new ones; None: as these requests ask.

    Attributes:
        stats: What the run did. cache: What it keeps, None without one.

    Raises:
        ValueError: Before the first step, if an argument is out of range or a first request does not fit.
    """

    def __init__(
        self,
        llm: TextModel,
        requests: abc.Sequence[Request],
        args: KVCacheArgs | None,
        batching: RunArgs = RunArgs(),
        tokens: int | None = None,
    ) -> None:
        check_loaded(llm)
        check_type("batching", batching, RunArgs, "RunArgs")
        check_type("requests", requests, abc.Sequence, "a list of Requests")
        for request in requests:
            check_type("requests", request, Request, "a list of Requests")
        requests = [r if r.id is not None else replace(r, id=number) for number, r in enumerate(requests)]
        self.llm, self.requests, self.stats = llm, requests, Stats()
        tokens = tokens or max((request.sees for request in requests), default=1)
        own = requests
        if llm.parallel is not None:
            if llm.parallel.divides_prompts:  # what one process would refuse, all refuse
                limits = Limits.of(llm.model, args, batching.prefill, tokens)
                for request in requests:
                    limits.check(request, f"Prompt {request.id}")
            own = llm.parallel.own_requests(requests)
        rows = max(1, min(len(own), batching.batch_size or len(own)))
        self.cache: KVCache | None = None if args is None else llm.build_cache(args, rows, tokens)
        engine = build_engine(llm, self.cache, rows, batching, self.stats)
        waiting = begin(engine, self.cache, own) if own or not requests else iter(())  # a process may have nothing
        self._steps = _noted_steps(llm, requests, RunResult(self.stats, self.cache), engine, waiting)

    def __iter__(self) -> Iterator[list[Sequence]]:
        return self._steps

    def close(self) -> None:
        """Breaks the run off."""
        self._steps.close()

    def sequences(self) -> list[Sequence]:
        """All answers, in the order of the requests."""
        ended = {sequence.index: sequence for step in self for sequence in step if sequence.reason is not None}
        return [ended[request.id] for request in self.requests]

    def pieces(self) -> Iterator[list[str]]:
        """For each step the text that it added to each answer."""
        failed: list[Sequence] = []
        for step in self:
            made = {sequence.index: sequence.piece for sequence in step}
            failed += [sequence for sequence in step if sequence.error is not None]
            yield [made.get(request.id, "") for request in self.requests]
        raise_failed(failed)


@dataclass(frozen=True)
class RunResult:
    """What a run that ended leaves: its `stats`, and its `cache` or None."""

    stats: Stats
    cache: KVCache | None


def _noted_steps(
    llm: TextModel,
    requests: abc.Sequence[Request],
    result: RunResult,
    engine: Engine,
    waiting: Iterator[Request],
) -> Iterator[list[Sequence]]:
    """The steps of a run, which tells the other processes how it ended.

    It knows nothing of the run itself: a run that is dropped in the middle must end at once, not when the garbage
    collector finds it, as other processes wait for it.
    """
    parallel, stats, answered = llm.parallel, result.stats, []
    number = {request.id: n for n, request in enumerate(requests)}
    stats.reasons, stats.logprobs = [None] * len(number), [[] for _ in number]

    def note(sequences: abc.Sequence[Sequence]) -> None:
        for sequence in sequences:
            if sequence.reason is not None:
                answered.append(sequence)
                at = number[sequence.index]
                stats.reasons[at], stats.logprobs[at] = sequence.reason, sequence.logprobs

    try:
        try:
            while engine.unfinished:
                if outputs := engine.step():
                    drew = [output.sequence for output in outputs]
                    note(drew)
                    yield drew
                fill(engine, waiting)
        except BaseException as error:
            if parallel is not None and parallel.divides_prompts:
                parallel.synchronize(f"{type(error).__name__}: {error}")
            raise
        if parallel is not None and (others := parallel.exchange_answers(requests, answered, stats)):
            note(others)
            yield others
    finally:
        llm.last_run = result


class OpenRun:
    """Answers any number of requests, each taken from an iterator only when a row is free; iterate over it as a `Run`.

    Processes that divide the requests need `Run`, which knows all of them.

    Args:
        llm: The model and its tokenizer.
        requests: What to answer; those without an id are numbered as they come.
        args: What the cache keeps; None: no cache.
        batching: How prompts are read and batched; its batch size is needed: the rows of the cache.
        tokens: What the longest row will see, prompt and new tokens.

    Attributes:
        stats: What the run did, nothing of single requests. cache: What it keeps, None without one.

    Raises:
        ValueError: Before the first step, if an argument is out of range or a first request does not fit.
    """

    def __init__(
        self,
        llm: TextModel,
        requests: abc.Iterable[Request],
        args: KVCacheArgs | None,
        batching: RunArgs,
        tokens: int,
    ) -> None:
        check_loaded(llm)
        check_type("batching", batching, RunArgs, "RunArgs")
        rows = batching.batch_size
        if rows is None:
            raise ValueError("Any number of requests needs a batch size: the rows of the cache.")
        if llm.parallel is not None and llm.parallel.divides_prompts:
            raise ValueError("Processes that divide the requests need all of them at once: use run().")
        self.stats = Stats()
        self.cache: KVCache | None = None if args is None else llm.build_cache(args, rows, tokens)
        if llm.parallel is not None:
            requests = (request for each in requests for request in llm.parallel.own_requests([each]))
        engine = build_engine(llm, self.cache, rows, batching, self.stats)
        waiting = begin(engine, self.cache, requests)
        self._steps = _steps(llm, RunResult(self.stats, self.cache), engine, waiting)

    def __iter__(self) -> Iterator[list[Sequence]]:
        return self._steps

    def close(self) -> None:
        """Breaks the run off."""
        self._steps.close()


def _steps(llm: TextModel, result: RunResult, engine: Engine, waiting: Iterator[Request]) -> Iterator[list[Sequence]]:
    try:
        while engine.unfinished:
            if outputs := engine.step():
                yield [output.sequence for output in outputs]
            fill(engine, waiting)
    finally:
        llm.last_run = result


def check_loaded(llm: TextModel) -> None:
    """Raises ValueError if there is no model."""
    if llm.model is None:
        raise ValueError("No weights are loaded: call distribute() first, or load without distribute=None.")


def build_engine(llm: TextModel, cache: KVCache | None, rows: int, batching: RunArgs, stats: Stats) -> Engine:
    """An engine on the rows of a cache, or on so many rows without one, that reads whole prompts between its steps."""
    options = {name: getattr(batching, name) for name in ("prefill", "prefill_chunk", "logprobs")}
    options |= {"pieces": None, "stats": stats, "decoder": llm.decoder, "decode_text": llm.decode}
    return Engine(llm.model, cache, rows=rows, **options)


class Pieces(Iterator):
    """Text of a run, piece by piece as it is made.

    Attributes:
        stats: What the run did so far. cache: What it keeps.
    """

    def __init__(self, run: Run, single: bool) -> None:
        self.stats, self.cache = run.stats, run.cache
        self._pieces, self._single = run.pieces(), single

    def __next__(self) -> str | list[str]:
        pieces = next(self._pieces)
        return pieces[0] if self._single else pieces

    def close(self) -> None:
        """Breaks the run off."""
        self._pieces.close()
