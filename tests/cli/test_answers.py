"""Answers are never overwritten: one run at a time, full disks, damaged files."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litgpt_kv.cli.answers import Answers
from tests import warm
from tests.cli.test_prompt_files import records_of, run, write

SETTINGS = ["--accelerator", "cpu", "--threads", "1", "--batch-size", "2", "--temperature", "0"]
COMMAND = [sys.executable, "-m", "litgpt_kv", "generate", "demo", *SETTINGS]


def answer(line: int, **other: object) -> dict:
    return {"line": line, "prompt": f"p{line}", "text": "t", "finish_reason": "stop", **other}


def texts(path: Path) -> list[tuple]:
    return [(r["line"], r["prompt"], r["text"]) for r in records_of(path)]


def test_two_runs_on_one_file_are_refused_and_the_first_ones_answers_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = [{"prompt": f"def f{n}(x):", "max_new_tokens": 300, "min_new_tokens": 300} for n in range(6)]
    questions, out = write(tmp_path / "q.jsonl", lines), tmp_path / "a.jsonl"
    options = ("--prompts", questions, "--batch-size", 2, "--temperature", 0)
    with warm.Popen([*COMMAND, "--prompts", questions, "--out", out], stderr=subprocess.DEVNULL) as first:
        while not (out.exists() and out.stat().st_size):
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # so that it cannot end meanwhile; its lock stays
        for second in ([], ["--resume"]):
            assert run(*options, "--out", out, *second) == 2
            err = capsys.readouterr().err
            assert (
                err
                == f"litgpt_kv: error: {out} is being written by another run: wait for it, or choose another name.\n"
            )
        first.send_signal(signal.SIGKILL)
    finished = texts(out)
    assert run(*options, "--out", out, "--resume") == 0, "the lock went with the process"
    assert run(*options, "--out", tmp_path / "whole.jsonl") == 0
    assert texts(out) == texts(tmp_path / "whole.jsonl") and set(finished) <= set(texts(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl", "whole.jsonl"]


def test_two_runs_that_start_together(tmp_path: Path) -> None:
    """Both find no file; the second one is refused while the first one runs, and after it has ended."""
    path = tmp_path / "a.jsonl"
    first, second, third = (Answers(str(path)) for _ in range(3))
    first.begin(None)
    with pytest.raises(ValueError, match="being written by another run"):
        second.begin(None)
    first.add(answer(1))
    first.close()
    with third, pytest.raises(ValueError, match="was changed by another run while this one started: start it again"):
        third.begin(None)
    assert [r["line"] for r in records_of(path)] == [1]
    assert not list(tmp_path.glob(".*")), "no lock stays"


def test_links_and_modes_stay(tmp_path: Path) -> None:
    questions, real, link = write(tmp_path / "q.txt", ["a", "b"]), tmp_path / "real.jsonl", tmp_path / "a.jsonl"
    link.symlink_to("real.jsonl")
    assert run("--prompts", questions, "--out", link, "--max-new-tokens", 2) == 0
    assert stat.S_IMODE(real.stat().st_mode) == 0o666 & ~os.umask(os.umask(0o022))
    real.chmod(0o600)
    real.write_text("".join(reversed(real.read_text().splitlines(keepends=True))))
    assert run("--prompts", questions, "--out", link, "--max-new-tokens", 2, "--resume") == 0
    assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert [r["line"] for r in records_of(real)] == [1, 2]


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full"])
def test_a_device_is_refused(path: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--prompts", write(tmp_path / "q.txt", ["a"]), "--out", path) == 2
    assert f"{path} cannot be written: it is a device, not a file." in capsys.readouterr().err


SMALL_DISK = """
import resource
from litgpt_kv.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # Python ignores SIGXFSZ: writes fail
main()
"""


def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    questions = write(tmp_path / "q.txt", [f"def f{n}(x):" for n in range(9)])
    out, whole = tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, "-c", SMALL_DISK, *COMMAND[3:], "--prompts", questions, "--max-new-tokens", "9"]
    done = warm.run([*command, "--out", out], capture_output=True, text=True)
    kept = len(records_of(out))
    assert done.returncode == 2 and 0 < kept < 9
    assert done.stderr.splitlines()[-1] == (
        f"litgpt_kv: error: {out} cannot be written: File too large; the {kept} answers before it are kept; "
        "make room, and continue with --resume."
    )
    options = ("--prompts", questions, "--max-new-tokens", 9, "--batch-size", 2, "--temperature", 0)
    assert run(*options, "--out", out, "--resume") == 0
    assert f"{kept} of them from an earlier run" in capsys.readouterr().err
    assert run(*options, "--out", whole) == 0
    assert texts(out) == texts(whole)


def test_a_full_disk_while_answers_are_put_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    answers = Answers(str(path))
    answers.begin(None)
    for line in (2, 1):
        answers.add(answer(line))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"make room and try again\. All 2 answers are in it, .*--resume sorts them"):
        answers.close()
    assert [r["line"] for r in records_of(path)] == [2, 1]
    monkeypatch.undo()
    with Answers(str(path), resume=True) as again:
        again.begin(None)
        again.close()
    assert [r["line"] for r in records_of(path)] == [1, 2]


def test_a_full_standard_output_says_so(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.txt", ["a", "b"])
    with open("/dev/full", "w") as full:
        command = [*COMMAND, "--prompts", questions, "--max-new-tokens", "2"]
        done = warm.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "litgpt_kv: error: Standard output cannot be written: No space left on device; 0 answers were "
        "written; a run with --out FILE can be continued."
    )


GOOD = json.dumps(answer(1)).encode()
DAMAGED = {
    "not JSON": b"rubbish",
    "no object": b"[1]",
    "no line": b'{"prompt": "a", "text": "", "finish_reason": "stop"}',
    "a line in words": json.dumps(answer(1) | {"line": "1"}).encode(),
    "line 0": json.dumps(answer(0)).encode(),
    "a true line": json.dumps(answer(1) | {"line": True}).encode(),
    "a huge line": json.dumps(answer(10**30)).encode(),
    "a line beyond what is read": b'{"line": ' + b"9" * 5000 + b', "prompt": ""}',
    "an endless line": json.dumps(answer(1) | {"line": 1e999}).encode(),
    "no sample": json.dumps(answer(1, sample=None)).encode(),
    "a sample below 0": json.dumps(answer(1, sample=-1)).encode(),
    "a huge sample": json.dumps(answer(1, sample=2**62)).encode(),
    "no text": json.dumps(answer(1) | {"text": 5}).encode(),
    "a prompt of lists": json.dumps(answer(1) | {"prompt": [["a"]]}).encode(),
    "another run": json.dumps(answer(1, run=7)).encode(),
    "deep nesting": b'{"line": 1, "prompt": ' + b"[" * 100_000,
    "deep nesting, closed": b'{"line": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "UTF-16": GOOD.decode().encode("utf-16"),
    "Latin-1": GOOD.replace(b"p1", b"p\xe9"),
    "a NUL": b"\0" * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_and_stays_as_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "a.jsonl"
    out.write_bytes(before := GOOD + b"\n" + DAMAGED[name] + b"\n" + GOOD + b"\n")
    assert run("--prompts", write(tmp_path / "q.txt", ["p1"]), "--out", out, "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out} cannot be continued: line 2 is not an answer of an earlier run" in line and len(line) < 500
    assert out.read_bytes() == before


def test_flipped_bits_of_a_file_never_end_in_another_error(tmp_path: Path) -> None:
    out, rng = tmp_path / "a.jsonl", random.Random(15)
    whole = b"".join(json.dumps(answer(n, seconds=0.5, tokens=[1])).encode() + b"\n" for n in range(1, 6))
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        out.write_bytes(damaged)
        try:
            with Answers(str(out), resume=True) as answers:
                answers.begin(None)
                for n in range(1, 6):
                    answers.matches((n, 0), f"p{n}")
                answers.close()
        except ValueError as error:
            refused += 1
            assert str(out) in str(error)
    assert refused > 200


def test_an_answer_that_failed_is_tried_again(tmp_path: Path) -> None:
    questions, out = write(tmp_path / "q.txt", ["def a", "def b"]), tmp_path / "a.jsonl"
    common = ("--prompts", questions, "--out", out, "--max-new-tokens", 3, "--temperature", 0)
    assert run(*common) == 0
    whole = texts(out)
    for failed in (0, 1):
        records = records_of(out)
        records[failed] |= {"finish_reason": "error", "text": ""}
        write(out, records)
        assert run(*common, "--resume") == 0
        assert texts(out) == whole
