"""Files for `--resume` that are damaged: refused as they are, or continued without losing an answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.attack.harness import Case, Result, command, flipped
from tests.cli.test_answers import DAMAGED

PROMPTS = ["def a", "def b", "def c"]
WORDS = ["--accelerator", "cpu", "--threads", "1", "--max-new-tokens", "2", "--temperature", "0"]


def run(folder: Path, *more: str) -> None:
    command("generate", "demo", *WORDS, "--prompts", folder / "q.txt", "--out", folder / "a.jsonl", *more)(folder)


def case(what: str, damage: Callable[[bytes, random.Random], bytes], seed: int) -> Case:
    def act(folder: Path) -> None:
        (folder / "q.txt").write_text("\n".join(PROMPTS))
        run(folder)
        out = folder / "a.jsonl"
        out.write_bytes(damage(out.read_bytes(), random.Random(seed)))
        (folder / "before").write_bytes(out.read_bytes())
        run(folder, "--resume")

    return Case(what, act, check=nothing_lost)


def nothing_lost(folder: Path, result: Result) -> str | None:
    """A refused file is as it was; in one that was continued there are all prompts, and every answer that was good."""
    before, after = (folder / "before").read_bytes(), (folder / "a.jsonl").read_bytes()
    if result.code == 2:
        return None if before == after else "a refused file was changed"
    records = [json.loads(line) for line in after.splitlines()]
    if [prompt for prompt in PROMPTS if prompt not in [r["prompt"] for r in records]]:
        return "an answer is missing"
    kept = after.splitlines()
    for line in before.splitlines(keepends=True):
        if line.endswith(b"\n") and line.rstrip(b"\n") not in kept and b'"error"' not in line:
            return f"an answer is gone: {line[:100]!r}"
    return None


def cases(seed: int) -> Iterator[Case]:
    for what, line in DAMAGED.items():
        yield case(what, lambda whole, rng, line=line: whole + line + b"\n", seed)
        yield case(f"{what}, first", lambda whole, rng, line=line: line + b"\n" + whole, seed)
    for n in range(250):
        yield case(f"flip {n}", flipped, seed * 1000 + n)
    for n in range(30):
        yield case(f"cut {n}", lambda whole, rng: whole[: rng.randrange(len(whole))], seed + n)
    for n in range(20):
        yield case(f"lines {n}", lambda whole, rng: b"".join(rng.choices(whole.splitlines(True), k=7)), seed + n)
    yield case("10 MB in a line", lambda whole, rng: whole.replace(b'"text": "', b'"text": "' + b"x" * 10**7, 1), seed)
