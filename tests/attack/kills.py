"""Runs that are killed at random moments, or run twice at a time: no answer and no cache is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from litgpt_kv import KVCache
from tests.attack.caches import SAVED, made
from tests.attack.harness import Case, Result, command
from tests.cache.test_serialize_damaged import same
from tests.oracle.reference import tiny

RUNS, SAVES, TWINS = 40, 20, 10
WORDS = ["--accelerator", "cpu", "--threads", "1", "--batch-size", "3", "--kv-cache", "h2o", "--kv-cache.budget", "24"]
LINES = [{"prompt": f"def f{n}(x):", "max_new_tokens": 4 + 30 * (n % 3), "temperature": n % 2} for n in range(20)]
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def generate(folder: Path, *more: str) -> None:
    questions, out = folder / "q.jsonl", folder / "a.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    command("generate", "demo", *WORDS, "--prompts", questions, "--out", out, *more)(folder)


def answers(path: Path) -> list[dict]:
    """What a file has, without a last line that was not finished, and without times."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


def start(action: Callable, *args: Any, after: float = 0.0) -> int:
    """Do something in a process of its own, after so many seconds; return its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        time.sleep(after)
        action(*args)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process, and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def resumed(killed: signal.Signals, seconds: float) -> Case:
    """A run is killed; then it is resumed, and the file is that of a run that nobody killed."""

    def act(folder: Path) -> None:
        run, whole = folder / "run", folder / "whole"
        run.mkdir()
        whole.mkdir()
        pid = start(generate, run)
        killer = start(os.kill, pid, killed, after=seconds)
        ended(pid)
        ended(killer)
        before = answers(run / "a.jsonl")
        if ended(start(generate, run, "--resume")):
            raise SystemExit("it could not be resumed")
        generate(whole)
        after = answers(run / "a.jsonl")
        if after != answers(whole / "a.jsonl"):
            raise SystemExit("other answers than those of a run that was not killed")
        if any(answer not in after for answer in before):
            raise SystemExit("an answer is gone")
        if left := {p.name for p in run.iterdir()} - {"q.jsonl", "a.jsonl"}:
            raise SystemExit(f"files are left: {left}")

    return Case(f"{killed.name} after {seconds:.2f} s", act, codes=(0,))


def twins(seconds: float) -> Case:
    """Two runs on one file: one is refused, or comes when the other has ended; all answers are there."""

    def act(folder: Path) -> None:
        both = [start(generate, folder, "--resume", after=delay) for delay in (0.0, seconds)]
        if (codes := sorted(map(ended, both))) not in ([0, 0], [0, 2]):
            raise SystemExit(f"exit codes {codes}")

    def check(folder: Path, result: Result) -> str | None:
        found = [record["line"] for record in answers(folder / "a.jsonl")]
        return None if found == list(range(1, len(LINES) + 1)) else f"answers to lines {found}"

    return Case(f"two runs, {seconds:.2f} s apart", act, check, codes=(0,))


def saves(killed: signal.Signals, seconds: float, number: int) -> Case:
    """A cache is saved again and again until the process is killed; what is there can be loaded."""
    args = SAVED[number % len(SAVED)]

    def act(folder: Path) -> None:
        cache = made(tiny(), args)
        while True:
            cache.save(folder / "cache")

    def check(folder: Path, result: Result) -> str | None:
        model = tiny()
        try:
            found = KVCache.load(folder / "cache", model) if (folder / "cache").exists() else None
        except ValueError as error:
            return f"what was saved is gone: {error}"
        return None if found is None or same(found, made(model, args)) else "another cache"

    return Case(f"save, {killed.name} after {seconds:.2f} s", act, check, kill=(killed, seconds))


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for _ in range(RUNS):
        yield resumed(rng.choice(SIGNALS), rng.uniform(0.0, 2.0))
    for number in range(SAVES):
        yield saves(rng.choice((signal.SIGKILL, signal.SIGTERM)), rng.uniform(0.2, 1.5), number)
    for _ in range(TWINS):
        yield twins(rng.uniform(0.0, 1.5))
