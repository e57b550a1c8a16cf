"""`litgpt_kv benchmark_serve`: what clients of a server wait for, and what HTTP costs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch

from litgpt_kv.arguments import DeviceArgs, Without, check_count
from litgpt_kv.benchmark import load
from litgpt_kv.benchmark.servers import LITGPT, OURS, NoServer, Peer, model_of, other_peer, our_peer
from litgpt_kv.config import KVCacheArgs, SamplingArgs, check_type, shown
from litgpt_kv.generate import Engine, Request
from litgpt_kv.llm.llm import LLM

MOST = 1_000_000  # of everything that is counted
ONE_DEVICE = Without("devices", "num_nodes", "generate_strategy", "compile", "check_weights")
PERCENTS = (50, 90, 99)
ENGINE = "engine alone"
WARM_UP = 2  # requests of each way before anything is measured
HTTP_COST, STEPS, FASTER = 0.10, 1.3, 3.0  # the goals


@dataclass
class Measured:
    """What one way to answer all requests took, once.

    Attributes:
        seconds: Of all. tokens: New ones. answered: Requests with an answer. good: Those within the limits.
        failed: Those without an answer. error: Why the first of them has none.
        first, between, whole: Seconds of each request or token. busy: Those between tokens while all rows made one.
        steps: Seconds of the engine's steps in which all rows made a token and no prompt was read.
    """

    seconds: float
    tokens: int = 0
    answered: int = 0
    good: int = 0
    failed: int = 0
    error: str = ""
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """New tokens a second."""
        return self.tokens / self.seconds

    @classmethod
    def of(cls, timings: Sequence[load.Timing], seconds: float, rows: int, limits: tuple[float, float]) -> Measured:
        """Sum up requests; `limits` are seconds to the first token and, on average, between tokens."""
        measured = cls(seconds)
        for timing in timings:
            if not timing.good:
                measured.failed, measured.error = measured.failed + 1, measured.error or timing.error
                continue
            gaps, first = timing.gaps, timing.first - timing.sent
            measured.answered += 1
            measured.tokens += timing.tokens or 0
            measured.first.append(first)
            measured.whole.append(timing.ended - timing.sent)
            measured.between += gaps
            measured.good += first <= limits[0] and (not gaps or statistics.fmean(gaps) <= limits[1])
        measured.busy = load.busy_gaps(timings, rows)
        return measured


@dataclass
class Way:
    """A way to answer requests, and what it took.

    Attributes:
        measure: Answers texts with so many new tokens; None if nothing can. runs: What was measured.
        error: Why it is measured no more.
    """

    name: str
    measure: Callable[[Sequence[str], int], Measured] | None = None
    runs: list[Measured] = field(default_factory=list)
    error: str = ""


def benchmark_serve(
    checkpoint_dir: str = "demo",
    *,
    url: str | None = None,
    against: list[str] | None = None,
    requests: int = 64,
    clients: int = 8,
    rate: float | None = None,
    rows: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    max_tokens: int = 1024,
    first_limit: float = 1.0,
    between_limit: float = 0.1,
    repeats: int = 3,
    seed: int = 1,
    kv_cache: KVCacheArgs = KVCacheArgs(),
    device: Annotated[DeviceArgs, ONE_DEVICE] = DeviceArgs(threads=1),
) -> None:
    """Measure a server: time to first token, between tokens and end to end, tokens/s, and how many requests were
    answered within limits; beside it the engine without HTTP, and other servers.

    Args:
        checkpoint_dir: A checkpoint, or "demo" for the shipped model.
        url: A server that runs already, http://127.0.0.1:8000; None: start litgpt_kv serve.
        against: Other servers, each with this option of its own: litgpt or litgpt-stream (litgpt serve, which needs
            litserve), NAME=http://HOST:PORT, or NAME=COMMAND to start, with {port} where it takes its port.
        requests: How many.
        clients: Requests at a time.
        rate: Requests a second at random times instead, whether or not others were answered; without the engine alone.
        rows: Of the cache.
        prompt_tokens: Random tokens of each prompt, about.
        new_tokens: Tokens of each answer.
        max_tokens: What a row may see.
        first_limit: Seconds to the first token that count as good.
        between_limit: Seconds between two tokens, on average of an answer, that count as good.
        repeats: Of everything in turns, each with other prompts.
        seed: Of prompts and times.
        kv_cache: What to keep.
        device: Where to run.
    """
    for name, value in (("requests", requests), ("clients", clients), ("rows", rows), ("repeats", repeats)):
        check_count(name, value, 1, MOST)
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("max_tokens", max_tokens)):
        check_count(name, value, 1, MOST)
    check_count("seed", seed, 0, 2**63 - 1)
    for name, value in (("rate", rate), ("first_limit", first_limit), ("between_limit", between_limit)):
        if value is not None and not 0 < value < MOST:
            raise ValueError(f"{name} must be over 0 and under {MOST:,}, got {shown(value)}.")
    args = KVCacheArgs.of(kv_cache)
    llm = LLM.load(checkpoint_dir, precision=device.precision, accelerator=device.accelerator, quantize=device.quantize)
    settings = dict(rows=rows, max_tokens=max_tokens, queue=requests)
    peers = [our_peer(url, checkpoint_dir, kv_cache, device, **settings)]
    for given in against or []:
        check_type("against", given, str, "a name, or NAME=URL or NAME=COMMAND")
        peers.append(other_peer(given, str(llm.checkpoint_dir), new_tokens, device))
    names = [ENGINE, *(peer.name for peer in peers)]
    if len({*names}) < len(names):
        raise ValueError(f"Each server of --against needs a name of its own, got {shown(names)}.")
    if device.threads is not None:
        torch.set_num_threads(device.threads)
    limits, ways = (first_limit, between_limit), []
    if rate is None:
        ways.append(Way(ENGINE, lambda texts, new: _engine(llm, args, texts, new, rows, max_tokens, clients, limits)))
    with contextlib.ExitStack() as servers:
        for peer in peers:
            try:
                address = servers.enter_context(peer.running(device.threads))
            except NoServer as error:
                if peer.name == OURS:
                    raise ValueError(f"{OURS}: {error}.") from error
                ways.append(Way(peer.name, error=str(error)))
            else:
                ways.append(Way(peer.name, _client(peer, address, llm, rows, clients, rate, seed, limits)))
        rng, pool = random.Random(seed), _plain_tokens(llm)
        for repeat in range(repeats + 1):  # in turns: whatever else runs here disturbs all alike
            count, new = (requests, new_tokens) if repeat else (WARM_UP, min(new_tokens, 8))
            texts = [llm.decode(rng.choices(pool, k=prompt_tokens)) for _ in range(count)]
            for way in ways:
                if way.measure is not None and not way.error:
                    way.runs.append(way.measure(texts, new))
                    way.error = way.runs[-1].error if not way.runs[-1].answered else ""
    for way in ways:
        del way.runs[:1]
    how = f"{clients} clients" if rate is None else f"{rate:g} requests/s"
    print(f"\n{requests} requests with {new_tokens} new tokens, {how}, {rows} rows; repeats in turns: {repeats}")
    _show(ways, limits)
    if rate is None:
        _show_goals(ways, rows, clients)


def _plain_tokens(llm: LLM) -> list[int]:
    """Tokens whose text is the same in every tokenizer's eyes: what is visible, or a space, and ASCII."""
    texts = ((id, llm.decode([id])) for id in range(llm.model.lm_head.out_features))
    return [id for id, text in texts if text.isascii() and text.isprintable() and text.strip(" <|>")]


def _engine(
    llm: LLM,
    args: KVCacheArgs | None,
    texts: Sequence[str],
    new_tokens: int,
    rows: int,
    max_tokens: int,
    clients: int,
    limits: tuple[float, float],
) -> Measured:
    """The engine alone, with `clients` requests at a time; a request's time begins when the engine gets it."""
    cache = None if args is None else llm.build_cache(args, rows, max_tokens)
    engine = Engine(llm.model, cache, rows=rows, decoder=llm.decoder, decode_text=llm.decode)
    greedy, steps, stats = SamplingArgs(temperature=0), [], engine.stats
    waiting, timings = deque(texts), dict[int, load.Timing]()
    began = time.perf_counter()
    while waiting or engine.unfinished:
        while waiting and engine.unfinished < clients:
            timing = load.Timing(time.perf_counter(), status=200, tokens=new_tokens)
            timings[engine.add(Request(llm.encode_text(waiting.popleft()), new_tokens, sampling=greedy))] = timing
        read, before = stats.prompt_tokens, time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        if len(outputs) == rows and stats.prompt_tokens == read:
            steps.append(now - before)
        for output in outputs:
            timings[output.id].times.append(now)
            timings[output.id].ended = now
    measured = Measured.of(list(timings.values()), time.perf_counter() - began, rows, limits)
    measured.steps = steps
    return measured


def _client(
    peer: Peer,
    address: str,
    llm: LLM,
    rows: int,
    clients: int,
    rate: float | None,
    seed: int,
    limits: tuple[float, float],
) -> Callable[[Sequence[str], int], Measured]:
    """Measures a server. Tokens of answers that do not say how many they have are counted by our tokenizer."""
    model = model_of(address) if peer.counts else None

    def measure(texts: Sequence[str], new_tokens: int) -> Measured:
        bodies = [peer.body(text, new_tokens, model) for text in texts]
        began = time.perf_counter()
        timings = asyncio.run(load.run(address + peer.path, bodies, clients, rate, seed))
        seconds = time.perf_counter() - began
        for timing in timings:
            if timing.tokens is None:
                timing.tokens = len(llm.tokenizer.encode(timing.text, bos=False)) if timing.text else 0
        return Measured.of(timings, seconds, rows, limits)

    return measure


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed; NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


def _show(ways: Sequence[Way], limits: tuple[float, float]) -> None:
    """A line a way: medians of the repeats, percentiles over all of them."""
    print("Medians of the repeats (best); times of all repeats in ms, p50 · p90 · p99; good: the first token within")
    print(f"{limits[0]:g} s, and on average {limits[1]:g} s or less between tokens\n")
    head = ["tokens/s (best)", "requests/s", "good/s", "first token", "between tokens", "end to end"]
    found = [_cells([run for run in way.runs if run.answered]) for way in ways]
    widths = [max(map(len, column)) for column in zip(head, *filter(None, found), strict=True)]
    wide = max(len(way.name) for way in ways)

    def line(name: str, cells: Sequence[str]) -> None:
        print(f"{name:{wide}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))

    line("", head)
    for way, cells in zip(ways, found, strict=True):
        if not cells:
            print(f"{way.name:{wide}}  not measured: {way.error}")
            continue
        line(way.name, cells)
        if failed := sum(run.failed for run in way.runs):
            error = next(run.error for run in way.runs if run.error)
            print(f"{'':{wide}}  {failed} requests without an answer: {error}")
    print()


def _cells(runs: Sequence[Measured]) -> list[str]:
    """What the table has of a way; nothing if it was not measured."""
    if not runs:
        return []
    speeds = [run.speed for run in runs]
    cells = [f"{statistics.median(speeds):,.1f} ({max(speeds):,.1f})"]
    for counts in ([run.answered / run.seconds for run in runs], [run.good / run.seconds for run in runs]):
        cells.append(f"{statistics.median(counts):,.2f}")
    for name in ("first", "between", "whole"):
        values = [seconds * 1e3 for run in runs for seconds in getattr(run, name)]
        shares = [percentile(values, percent) for percent in PERCENTS]
        cells.append(" · ".join(f"{v:,.{1 if v < 100 else 0}f}" for v in shares) if values else "-")
    return cells


def _show_goals(ways: Sequence[Way], rows: int, clients: int) -> None:
    """What should hold, what was measured (the median over the repeats), and whether it holds."""
    by_name = {way.name: way for way in ways}
    engine, ours = by_name[ENGINE], by_name[OURS]

    def over_repeats(ratio: Callable[..., float], *of: Way) -> float | None:
        pairs = [runs for runs in zip(*(way.runs for way in of)) if all(run.answered for run in runs)]
        return statistics.median(ratio(*runs) for runs in pairs) if pairs else None

    cost = over_repeats(lambda own, alone: 1 - own.speed / alone.speed, ours, engine)
    lines = [(f"HTTP costs at most {HTTP_COST:.0%} of the engine's tokens/s", cost, HTTP_COST, "{:.1%}", "")]
    is_busy = all(run.busy and alone.steps for run, alone in zip(ours.runs, engine.runs))

    def in_steps(run: Measured, alone: Measured) -> float:
        return percentile(run.busy, 99) / statistics.median(alone.steps)

    goal = f"p99 between tokens, all rows busy, at most {STEPS:g} of the engine's steps"
    late = over_repeats(in_steps, ours, engine) if is_busy else None
    alone = over_repeats(in_steps, engine, engine) if is_busy else None
    lines.append((goal, late, STEPS, "{:.2f}", f" (the engine alone: {alone:.2f})" if is_busy and alone else ""))
    litgpt = [by_name[name] for name in LITGPT.values() if name in by_name]
    speeds = [over_repeats(lambda own, other: own.speed / other.speed, ours, other) for other in litgpt]
    fewest = min((speed for speed in speeds if speed is not None), default=None)
    goal = f"at least {FASTER:g} times the tokens/s of litgpt serve, {clients} clients"
    lines.append((goal, fewest, FASTER, "{:.1f}", ""))
    print(f"{'goal':70}{'measured':>10}  held")
    for goal, value, limit, form, more in lines:
        if value is None:
            print(f"{goal:70}{'-':>10}  -")
            continue
        is_held = value >= limit if limit == FASTER else value <= limit
        print(f"{goal:70}{form.format(value):>10}  {'yes' if is_held else 'no'}{more}")
