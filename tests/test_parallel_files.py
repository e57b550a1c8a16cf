"""A file of prompts over several processes: the answers of one, in order, and nothing lost when one is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from litgpt_kv.__main__ import main
from test_parallel import GENERATE, finished, linux, started

pytestmark = pytest.mark.xdist_group("parallel")
TWO = ["--devices", "2", "--generate-strategy", "data_parallel", "--batch-size", "3"]


def questions_in(path: Path, count: int = 30) -> Path:
    lines = [
        {"prompt": f"def f{n}(x):", "max_new_tokens": 4 + 50 * (n % 3 == 0), "temperature": n % 2} for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "rubbish\n")
    return path


def answers_in(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in path.read_text().splitlines()]


@linux
def test_a_file_over_two_processes_is_that_of_one_and_survives_a_killed_one(tmp_path: Path) -> None:
    questions, one, two = questions_in(tmp_path / "q.jsonl"), tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with pytest.raises(SystemExit) as end:
        main([*GENERATE[2:], "--prompts", str(questions), "--out", str(one), "--batch-size", "5"])
    assert end.value.code == 1  # for the line of rubbish
    command = [*GENERATE, "--prompts", str(questions), "--out", str(two), *TWO]
    with started(*command) as process:
        part = tmp_path / "two.jsonl.part1"
        until = time.monotonic() + 60
        while not (part.exists() and part.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        began = time.monotonic()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "process 1 of 2" in err and time.monotonic() - began < 30
    kept = [r for p in tmp_path.glob("two.jsonl.part*") for r in map(json.loads, p.read_text().splitlines()[:-1])]
    assert len(kept) >= 2
    code, _, err = finished(*command)
    assert code == 2 and "exists: --resume continues it" in err
    code, _, err = finished(*command, "--resume")
    assert code == 1 and "Line 31 was left out" in err and "30 answers" in err, err
    assert answers_in(two) == answers_in(one)
    found = [json.loads(line) for line in two.read_text().splitlines()]
    assert all(record in found for record in kept), "what was finished stays as it was, its seconds too"
    assert not list(tmp_path.glob("*.part*"))


def test_standard_output_has_the_answers_of_all_processes_in_order(tmp_path: Path) -> None:
    questions = questions_in(tmp_path / "q.jsonl", 7)
    code, out, err = finished(*GENERATE, "--prompts", str(questions), *TWO)
    assert code == 1 and [json.loads(line)["line"] for line in out.splitlines()] == list(range(1, 8)), err
    assert "made 178 in" in err, "all that was made, by both"
