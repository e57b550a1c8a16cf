"""One run of an `LLM`: its steps, statistics and cache."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace

from litgpt_kv.arguments import RunArgs
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs, check_type
from litgpt_kv.generate import Engine, Request, Sequence, Stats, begin, fill, raise_failed, serve_steps
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.generate.limits import Limits
from litgpt_kv.llm.text_model import TextModel
from litgpt_kv.llm.threads import cpu_threads


class Run:
    """Answer a list of requests, as many at a time as the cache has rows.

    Iterate over it: each step yields the sequences that got a token. With "data_parallel", a process answers a share of
    the requests, and its last step yields the sequences of the other processes.

    Args:
        llm: The model and its tokenizer.
        requests: The requests; one without an id gets its index in this list.
        args: The cache; None: no cache.
        batching: How prompts are read and batched; without a batch size, every request has its own row.
        tokens: The most tokens of a row, prompt and new ones; None: the most of these requests.

    Attributes:
        stats: Tokens and seconds of the run.
        cache: The cache, or None.

    Raises:
        ValueError: If an argument is out of range, or one of the first requests does not fit.
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
        tokens = tokens or max((request.cache_tokens for request in requests), default=1)
        own = requests
        if llm.parallel is not None:
            if llm.parallel.divides_prompts:  # check all requests, so that all processes raise the same error
                limits = Limits.of(llm.model, args, batching.prefill, tokens)
                for request in requests:
                    limits.check(request, f"Prompt {request.id}")
            own = llm.parallel.own_requests(requests)
        rows = max(1, min(len(own), batching.batch_size or len(own)))
        self.cache: KVCache | None = None if args is None else llm.build_cache(args, rows, tokens)
        engine = build_engine(llm, self.cache, rows, batching, self.stats)
        is_idle = bool(requests) and not own  # all requests belong to other processes
        waiting = iter(()) if is_idle else begin(engine, self.cache, own)
        decodes = self.cache is not None and any(request.max_new_tokens > 1 for request in own)
        if decodes and isinstance(llm.decoder, CompiledDecoder):
            longest = max(len(request.prompt) for request in own)
            with cpu_threads(llm.threads):
                self.stats.compile_seconds += llm.decoder.warm_up(self.cache, longest)
        self._steps = _run_steps(llm, requests, RunResult(self.stats, self.cache), engine, waiting)

    def __iter__(self) -> Iterator[list[Sequence]]:
        return self._steps

    def close(self) -> None:
        """Stop the run."""
        self._steps.close()

    def sequences(self) -> list[Sequence]:
        """Run to the end, and return all sequences in the order of the requests."""
        ended = {sequence.index: sequence for step in self for sequence in step if sequence.reason is not None}
        return [ended[request.id] for request in self.requests]

    def pieces(self) -> Iterator[list[str]]:
        """Yield for each step the new text of each request, in their order."""
        failed: list[Sequence] = []
        for step in self:
            texts = {sequence.index: sequence.new_text for sequence in step}
            failed += [sequence for sequence in step if sequence.error is not None]
            yield [texts.get(request.id, "") for request in self.requests]
        raise_failed(failed)


@dataclass(frozen=True)
class RunResult:
    """The `stats` of a run that ended, and its `cache` or None."""

    stats: Stats
    cache: KVCache | None


def _run_steps(
    llm: TextModel,
    requests: abc.Sequence[Request],
    result: RunResult,
    engine: Engine,
    waiting: Iterator[Request],
) -> Iterator[list[Sequence]]:
    """Yield the steps of a run, and tell the other processes how it ended.

    This generator must not refer to the `Run`: a run that is dropped in the middle must end at once and not when the
    garbage collector finds a cycle, because other processes wait for it.
    """
    parallel, stats, answered = llm.parallel, result.stats, []
    index_of = {request.id: n for n, request in enumerate(requests)}
    stats.reasons, stats.logprobs = [None] * len(index_of), [[] for _ in index_of]

    def note(sequences: abc.Sequence[Sequence]) -> None:
        for sequence in sequences:
            if sequence.reason is not None:
                answered.append(sequence)
                n = index_of[sequence.index]
                stats.reasons[n], stats.logprobs[n] = sequence.reason, sequence.logprobs

    try:
        try:
            while engine.unfinished:
                with cpu_threads(llm.threads):
                    outputs = engine.step()
                if outputs:
                    sequences = [output.sequence for output in outputs]
                    note(sequences)
                    yield sequences
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
    """Answer requests from an iterator, each taken only when a row is free; iterate over it as over a `Run`.

    With "data_parallel" use `Run`: to divide the requests, the processes must know all of them.

    Args:
        llm: The model and its tokenizer.
        requests: The requests; those without an id are numbered in their order.
        args: The cache; None: no cache.
        batching: How prompts are read and batched; its batch size is the number of rows, and must be given.
        tokens: The most tokens of a row, prompt and new ones.

    Attributes:
        stats: Tokens and seconds of the run; `reasons` and `logprobs` stay empty.
        cache: The cache, or None.

    Raises:
        ValueError: If an argument is out of range, or one of the first requests does not fit.
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
            raise ValueError("answer() needs a batch_size, the number of rows of the cache.")
        if llm.parallel is not None and llm.parallel.divides_prompts:
            raise ValueError("data_parallel needs all requests at once: use run().")
        self.stats = Stats()
        self.cache: KVCache | None = None if args is None else llm.build_cache(args, rows, tokens)
        if llm.parallel is not None:
            requests = (request for request in requests for request in llm.parallel.own_requests([request]))
        engine = build_engine(llm, self.cache, rows, batching, self.stats)
        waiting = begin(engine, self.cache, requests)
        self._steps = _noted_at_the_end(llm, RunResult(self.stats, self.cache), serve_steps(engine, waiting))

    def __iter__(self) -> Iterator[list[Sequence]]:
        return self._steps

    def close(self) -> None:
        """Stop the run."""
        self._steps.close()


def _noted_at_the_end(llm: TextModel, result: RunResult, steps: Iterator[list[Sequence]]) -> Iterator[list[Sequence]]:
    try:
        while True:
            with cpu_threads(llm.threads):
                step = next(steps, None)
            if step is None:
                return
            yield step
    finally:
        steps.close()
        llm.last_run = result


def check_loaded(llm: TextModel) -> None:
    """Raise ValueError if the model has no weights yet."""
    if llm.model is None:
        raise ValueError("No weights are loaded: call distribute() first, or load without distribute=None.")


def build_engine(llm: TextModel, cache: KVCache | None, rows: int, batching: RunArgs, stats: Stats) -> Engine:
    """Build an engine on the rows of a cache, or on `rows` rows without one; it reads whole prompts between steps."""
    options = {name: getattr(batching, name) for name in ("prefill", "prefill_chunk", "logprobs")}
    options |= {"pieces": None, "stats": stats, "decoder": llm.decoder, "decode_text": llm.decode}
    return Engine(llm.model, cache, rows=rows, **options)


class Pieces(Iterator):
    """Iterate over the text of a run, piece by piece as it is generated.

    Attributes:
        stats: Tokens and seconds so far.
        cache: The cache, or None.
    """

    def __init__(self, run: Run, single: bool) -> None:
        self.stats, self.cache = run.stats, run.cache
        self._pieces, self._single = run.pieces(), single

    def __next__(self) -> str | list[str]:
        pieces = next(self._pieces)
        return pieces[0] if self._single else pieces

    def close(self) -> None:
        """Stop the run."""
        self._pieces.close()
