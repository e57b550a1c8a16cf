"""`litgpt_kv benchmark_serve`: what clients of a server wait for, and what HTTP costs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch

from litgpt_kv.arguments import DeviceArgs, Without, check_count
from litgpt_kv.benchmark import load
from litgpt_kv.config import KVCacheArgs, SamplingArgs, shown
from litgpt_kv.generate import Engine, Request
from litgpt_kv.llm.llm import LLM

MOST = 1_000_000  # of everything that is counted
START_SECONDS = 300
ONE_DEVICE = Without("devices", "num_nodes", "generate_strategy", "compile", "check_weights")
PERCENTS = (50, 90, 99)


@dataclass
class Measured:
    """What one way to answer all requests took.

    Attributes:
        seconds: Of all. tokens: New ones. first, between, whole: Seconds of each request or token. good: Requests
            within the limits. failed: Requests without an answer.
    """

    name: str
    seconds: float = 0.0
    tokens: int = 0
    requests: int = 0
    good: int = 0
    failed: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def add(self, timing: load.Timing, limits: tuple[float, float]) -> None:
        """Take an answered request; `limits` are seconds to the first token and, on average, between tokens."""
        self.requests += 1
        self.first.append(timing.first - timing.sent)
        self.whole.append(timing.ended - timing.sent)
        self.between += timing.gaps
        gap = sum(timing.gaps) / len(timing.gaps) if timing.gaps else 0.0
        self.good += timing.first - timing.sent <= limits[0] and gap <= limits[1]


def benchmark_serve(
    checkpoint_dir: str = "demo",
    *,
    url: str | None = None,
    against_litgpt: bool = False,
    requests: int = 64,
    clients: int = 8,
    rate: float | None = None,
    rows: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    max_tokens: int = 1024,
    first_limit: float = 1.0,
    between_limit: float = 0.1,
    repeats: int = 2,
    seed: int = 1,
    kv_cache: KVCacheArgs = KVCacheArgs(),
    device: Annotated[DeviceArgs, ONE_DEVICE] = DeviceArgs(threads=1),
) -> None:
    """Measure a server: time to first token, between tokens and end to end, tokens/s, and how many requests were
    answered within limits; beside it the engine without HTTP, and litgpt's own server.

    Args:
        checkpoint_dir: A checkpoint, or "demo" for the shipped model.
        url: A server that runs already, http://127.0.0.1:8000; None: start `litgpt_kv serve`.
        against_litgpt: Also start `litgpt serve`, which needs litserve.
        requests: How many.
        clients: Requests at a time.
        rate: Requests a second at random times instead, whether or not others were answered.
        rows: Of the cache.
        prompt_tokens: Random tokens of each prompt, about.
        new_tokens: Tokens of each answer.
        max_tokens: What a row may see.
        first_limit: Seconds to the first token that count as good.
        between_limit: Seconds between two tokens, on average of an answer, that count as good.
        repeats: Of everything; the best one is shown.
        seed: Of prompts and times.
        kv_cache: What to keep.
        device: Where to run.
    """
    for name, value in (("requests", requests), ("clients", clients), ("rows", rows), ("repeats", repeats)):
        check_count(name, value, 1, MOST)
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("max_tokens", max_tokens)):
        check_count(name, value, 1, MOST)
    if rate is not None and not 0 < rate < MOST:
        raise ValueError(f"rate must be requests a second, over 0, got {shown(rate)}.")
    if url is not None and not url.startswith("http://"):
        raise ValueError(f"url must begin with http://, got {shown(url)}.")
    args = KVCacheArgs.of(kv_cache)
    llm = LLM.load(checkpoint_dir, precision=device.precision, accelerator=device.accelerator, quantize=device.quantize)
    if device.threads is not None:
        torch.set_num_threads(device.threads)
    rng, size = random.Random(seed), llm.model.lm_head.out_features
    texts = [llm.decode([rng.randrange(3, size) for _ in range(prompt_tokens)]) for _ in range(requests)]
    bodies = [{"prompt": text, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True} for text in texts]
    bodies = [{**body, "stream": True, "stream_options": {"include_usage": True}} for body in bodies]
    limits = first_limit, between_limit
    at_a_time = requests if rate is not None else clients
    load_of = bodies, clients, rate, seed, limits
    with contextlib.ExitStack() as servers:
        if url is None:
            command = _our_command(checkpoint_dir, kv_cache, rows, max_tokens, requests, device)
            url = servers.enter_context(_started(command, "/health"))
        ways: list[Callable[[], Measured]] = [
            lambda: _engine(llm, args, texts, rows, new_tokens, max_tokens, at_a_time, limits),
            lambda: _measured("litgpt_kv serve", f"{url}/v1/completions", *load_of),
        ]
        if against_litgpt:
            if importlib.util.find_spec("litserve") is None:
                raise ValueError("litgpt serve needs litserve: pip install litserve.")
            command = ["-m", "litgpt", "serve", str(llm.checkpoint_dir), "--accelerator", "cpu"]
            command += ["--precision", "32-true", "--max_new_tokens", str(new_tokens), "--top_k", "1", "--port"]
            other = servers.enter_context(_started(command, "/health"))
            plain = [{"prompt": text} for text in texts]
            ways.append(lambda: _measured("litgpt serve", f"{other}/predict", plain, *load_of[1:], llm))
        runs = [[way() for way in ways] for _ in range(repeats)]  # in turns: whatever else runs here disturbs all alike
    _show([min(of_way, key=lambda measured: measured.seconds) for of_way in zip(*runs)], clients, rate, limits)


def _engine(
    llm: LLM,
    args: KVCacheArgs | None,
    texts: Sequence[str],
    rows: int,
    new_tokens: int,
    max_tokens: int,
    clients: int,
    limits: tuple[float, float],
) -> Measured:
    """The engine alone, with `clients` requests at a time; a request's time begins when the engine gets it."""
    cache = None if args is None else llm.build_cache(args, rows, max_tokens)
    engine = Engine(llm.model, cache, rows=rows, decoder=llm.decoder, decode_text=llm.decode)
    greedy = SamplingArgs(temperature=0)
    measured, began = Measured("engine alone"), time.perf_counter()
    waiting, timings = deque(texts), dict[int, load.Timing]()
    while waiting or engine.unfinished:
        while waiting and engine.unfinished < clients:
            timing = load.Timing(time.perf_counter())
            timings[engine.add(Request(llm.encode_text(waiting.popleft()), new_tokens, sampling=greedy))] = timing
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            timing = timings[output.id]
            timing.gaps += [now - timing.ended] if timing.first else []
            timing.first, timing.ended = timing.first or now, now
    measured.seconds, measured.tokens = time.perf_counter() - began, engine.stats.new_tokens
    for timing in timings.values():
        measured.add(timing, limits)
    return measured


def _measured(
    name: str,
    url: str,
    bodies: Sequence[dict[str, Any]],
    clients: int,
    rate: float | None,
    seed: int,
    limits: tuple[float, float],
    llm: LLM | None = None,
) -> Measured:
    """A server; `llm` counts the tokens of answers that do not say how many they have."""
    began = time.perf_counter()
    timings = asyncio.run(load.run(url, bodies, clients, rate, seed))
    measured = Measured(name, time.perf_counter() - began)
    for timing in timings:
        if timing.status != 200:
            measured.failed += 1
            continue
        if llm is not None:
            timing.tokens = len(llm.tokenizer.encode(timing.text, bos=False)) if timing.text else 0
        measured.tokens += timing.tokens
        measured.add(timing, limits)
    return measured


def _our_command(
    checkpoint_dir: str, kv_cache: KVCacheArgs, rows: int, max_tokens: int, queue: int, device: DeviceArgs
) -> list[str]:
    settings = {name: value for name, value in asdict(kv_cache).items() if value != asdict(KVCacheArgs())[name]}
    command = ["-m", "litgpt_kv", "serve", checkpoint_dir, "--rows", str(rows), "--max-tokens", str(max_tokens)]
    command += ["--queue", str(queue), "--accelerator", device.accelerator]
    command += ["--kv-cache", json.dumps(settings)] if settings else []
    command += ["--precision", device.precision] if device.precision else []
    command += ["--threads", str(device.threads)] if device.threads else []
    return [*command, "--port"]


@contextlib.contextmanager
def _started(command: Sequence[str], health: str) -> Iterator[str]:
    """A server in a process of its own, once it answers; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment.pop("LITGPT_KV_API_KEY", None)  # our clients send none
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    process = subprocess.Popen([sys.executable, *command, str(port)], start_new_session=True, **quiet)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not _answers(url + health):
            if process.poll() is not None or time.monotonic() > end:
                raise ValueError(f"The server did not start: {' '.join(command)[:300]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # litserve's workers outlive their parent
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed; NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


def _show(found: Sequence[Measured], clients: int, rate: float | None, limits: tuple[float, float]) -> None:
    how = f"{clients} clients" if rate is None else f"{rate:g} requests/s"
    print(f"\n{found[0].requests} requests, {how}; the best of the repeats")
    print(f"{'':40}" + "".join(f"{measured.name:>32}" for measured in found))

    def line(name: str, values: Sequence[str]) -> None:
        print(f"{name:40}" + "".join(f"{value:>32}" for value in values))

    line("new tokens/s", [f"{m.tokens / m.seconds:,.0f}" for m in found])
    line("requests/s", [f"{m.requests / m.seconds:,.2f}" for m in found])
    for name, field_name in (("first token", "first"), ("between tokens", "between"), ("end to end", "whole")):
        values = [getattr(m, field_name) for m in found]
        shown_values = [" · ".join(f"{percentile(v, p) * 1e3:,.1f}" for p in PERCENTS) if v else "-" for v in values]
        line(f"{name}, p50 · p90 · p99 ms", shown_values)
    line(f"good/s (first {limits[0]:g} s, next {limits[1]:g} s)", [f"{m.good / m.seconds:,.2f}" for m in found])
    line("without an answer", [str(m.failed) for m in found])
    print()
