"""Prompts from files: settings of a line, bad lines, interrupts, --resume, order."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litgpt_kv import LLM
from litgpt_kv.__main__ import main
from litgpt_kv.cli.answers import Answers
from litgpt_kv.cli.prompt_files import PromptFile
from tests import warm


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu")


def write(path: Path, records: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def run(*args: object) -> int:
    """Run a command; return its exit code."""
    try:
        main(["generate", "demo", "--accelerator", "cpu", "--threads", "1", *map(str, args)])
    except SystemExit as end:
        return end.code
    return 0


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_has_its_settings_and_answers_come_in_order(llm: LLM, tmp_path: Path) -> None:
    lines = [
        {"prompt": "def fib(n):", "max_new_tokens": 30, "temperature": 0, "id": "a"},
        {"prompt": "import os\nimport sys\n", "max_new_tokens": 3, "seed": 7},
        {"prompt": "class Parser:", "temperature": 0, "stop": ["typ", " "], "id": 3},
        {"prompt": "x = 1", "top_k": None, "top_p": 0.8, "seed": 3, "repetition_penalty": 1.2, "min_new_tokens": 2},
        {"prompt": "for i in", "temperature": 0, "stop": "x", "max_new_tokens": 9},
    ] * 2
    questions, out = write(tmp_path / "q.jsonl", lines), tmp_path / "a.jsonl"
    common = ("--kv-cache", "h2o", "--kv-cache.budget", 16, "--batch-size", 3, "--max-new-tokens", 12, "--top-k", 20)
    assert run("--prompts", questions, "--out", out, *common, "--temperature", 0.9) == 0
    found = records_of(out)
    assert [r["line"] for r in found] == list(range(1, 11))
    assert [r.get("id") for r in found[:5]] == ["a", None, 3, None, None]
    for line, record in zip(lines, found):
        settings = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 20, "seed": 1234, **line}
        settings.pop("id", None)
        expected = llm.generate(settings.pop("prompt"), kv_cache="h2o", budget=16, **settings)
        assert record["text"] == expected
        assert record["finish_reason"] in ("stop", "length")
        assert record["seconds"] >= record["first_token_seconds"] > 0
        assert record["prompt_tokens"] == len(llm.encode(record["prompt"]))
    assert {r["finish_reason"] for r in found} == {"stop", "length"}


def test_bad_lines_are_named_and_the_exit_code_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = {
        2: "rubbish",
        4: '{"prompt": ""}',
        5: '{"prompt": "a", "temprature": 1}',
        6: '{"prompt": "a", "seed": true}',
        7: "[1]",
        8: '{"prompt": "a", "top_p": 2}',
        9: json.dumps({"prompt": "word " * 3000}),
        10: '{"prompt": "a", "max_new_tokens": 0}',
        11: '{"prompt": "a", "stop": [1]}',
        12: r'{"prompt": "a", "id": "\ud800"}',
    }
    lines = [bad.get(n, {"prompt": "def"}) for n in range(1, 14)]
    assert run("--prompts", write(tmp_path / "q.jsonl", lines), "--max-new-tokens", 2) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 3, 13]
    limit = "max_new_tokens must be at least 1, got 0"
    faults = [
        "it is not JSON",
        "no prompt",
        "'temprature'",
        "seed must be a whole number, got True",
        "must be an object",
        "top_p",
        "limit of 1024",
        limit,
    ]
    for number, says in zip(bad, [*faults, "stop", "surrogate"]):
        (line,) = [line for line in err.splitlines() if line.startswith(f"Line {number} was skipped")]
        assert says in line
    assert "3 answers; 10 of 13 lines could not be used." in err


def test_text_files_and_standard_input(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    file = tmp_path / "q.txt"
    file.write_bytes(b"def f(x):\n\n{1: 2}\n\xff\xfe\n")
    assert run("--prompts", file, "--max-new-tokens", 2) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["line"], r["prompt"]) for r in records] == [(1, "def f(x):"), (3, "{1: 2}")]
    for data, prompts in ((b"a\nb\n", ["a", "b"]), (b'{"prompt": "a"}\n{"prompt": "{"}', ["a", "{"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert [line.prompt for line in PromptFile("-")] == prompts
    with pytest.raises(ValueError, match="no prompts in standard input"):
        PromptFile("-")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        PromptFile(str(tmp_path / "none"))


def test_samples_and_logprobs(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    questions = write(tmp_path / "q.txt", ["def f(x):", "import"])
    assert run("--prompts", questions, "--num-samples", 3, "--max-new-tokens", 6, "--seed", 5, "--logprobs") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["line"], r["sample"]) for r in records] == [(n, s) for n in (1, 2) for s in range(3)]
    for r in records:
        text = llm.generate(r["prompt"], max_new_tokens=6, top_k=50, seed=5 + r["sample"], logprobs=True)
        assert r["text"] == text
        assert r["logprobs"] == pytest.approx(llm.stats.logprobs[0], abs=1e-4)
        assert len(r["tokens"]) == len(r["logprobs"]) == r["new_tokens"]
        assert max(r["logprobs"]) < 0


def test_a_run_that_was_killed_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [{"prompt": f"def f{n}(x):", "max_new_tokens": 5 + 60 * (n % 2)} for n in range(40)]
    questions, out, whole = write(tmp_path / "q.jsonl", lines), tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    settings = ["--prompts", str(questions), "--batch-size", "4", "--accelerator", "cpu", "--threads", "1"]
    command = [sys.executable, "-m", "litgpt_kv", "generate", "demo", *settings, "--out", str(out)]
    process = warm.Popen(command, stderr=subprocess.DEVNULL)
    while not (out.exists() and out.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = out.read_bytes()
    finished = before.count(b"\n")
    assert 5 <= finished < 40
    out.write_bytes(before[: before.rfind(b"\n") + 1] + b'{"line": 39, "pro')  # as a full disk may leave it
    assert run("--prompts", questions, "--batch-size", 4, "--out", out) == 2
    assert "exists: --resume continues it" in capsys.readouterr().err
    assert run("--prompts", questions, "--batch-size", 4, "--out", out, "--resume") == 0
    assert f"40 answers in {out}, {finished} of them from an earlier run" in capsys.readouterr().err
    assert run("--prompts", questions, "--batch-size", 4, "--out", whole) == 0
    drop = ("seconds", "first_token_seconds")
    first, second = ([{k: v for k, v in r.items() if k not in drop} for r in records_of(p)] for p in (out, whole))
    assert first == second
    kept = [json.loads(line) for line in before.splitlines()[:finished]]
    assert all(record in records_of(out) for record in kept), "what was finished stays as it was"
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    real, count = Answers.add, []

    def add(self: Answers, record: dict, *others: bool) -> None:
        real(self, record, *others)
        count.append(record)
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Answers, "add", add)
    questions, out = write(tmp_path / "q.txt", ["a", "b", "c", "d"]), tmp_path / "a.jsonl"
    assert run("--prompts", questions, "--out", out, "--max-new-tokens", 2) == 130
    assert f"2 answers are in {out}; continue with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert run("--prompts", questions, "--out", out, "--max-new-tokens", 2, "--resume") == 0
    assert [r["prompt"] for r in records_of(out)] == ["a", "b", "c", "d"]


def test_another_files_answers_are_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "a.jsonl"
    assert run("--prompts", write(tmp_path / "q.txt", ["a"]), "--out", out, "--max-new-tokens", 2) == 0
    before = out.read_bytes()
    other = write(tmp_path / "r.txt", ["b"])
    assert run("--prompts", other, "--out", out, "--max-new-tokens", 2, "--resume") == 2
    assert "has answers to other prompts: line 1 was 'a'" in capsys.readouterr().err
    assert out.read_bytes() == before
    for rubbish in (b"rubbish\n", b"{}\n", b"1\n", b'{"line": 1}\n', b"my diary"):
        out.write_bytes(rubbish)
        assert run("--prompts", other, "--out", out, "--resume") == 2
        assert "is not an answer of an earlier run" in capsys.readouterr().err
        assert out.read_bytes() == rubbish
    assert run("--prompts", other, "--out", tmp_path) == 2
    assert "not a file" in capsys.readouterr().err


def test_other_settings_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    questions, out = write(tmp_path / "q.txt", ["a", "b"]), tmp_path / "a.jsonl"
    common = ("--prompts", questions, "--out", out, "--max-new-tokens", 2)
    assert run(*common) == 0
    for other in (("--seed", 5), ("--kv-cache", "window"), ("--num-samples", 2), ("--prefill", "full")):
        assert run(*common, "--resume", *other) == 2
        assert "was made with other settings" in capsys.readouterr().err
    assert run(*common, "--resume", "--batch-size", 3) == 0
    assert run("--prompts", write(tmp_path / "r.txt", ["a"]), "--out", out, "--max-new-tokens", 2, "--resume") == 0
    assert "2 answers" in (err := capsys.readouterr().err) and "1 for prompts that are not in this file" in err


def test_a_share_of_the_longest_prompt_stays_what_it_was(tmp_path: Path) -> None:
    questions, out = write(tmp_path / "q.txt", ["x = ", "y", "class A:\n    pass\n" * 9]), tmp_path / "a.jsonl"
    common = ("--prompts", questions, "--out", out, "--kv-cache", "h2o", "--kv-cache.budget", "20%")
    assert run(*common) == 0
    whole = records_of(out)
    out.write_text(json.dumps(whole[2]) + "\n")
    assert run(*common, "--resume") == 0
    assert [r["text"] for r in records_of(out)] == [r["text"] for r in whole]


def test_a_refused_run_leaves_no_file(tmp_path: Path) -> None:
    questions, out = write(tmp_path / "q.txt", ["a"]), tmp_path / "a.jsonl"
    assert run("--prompts", questions, "--out", out, "--kv-cache", "sink", "--kv-cache.budget", 5000) == 2
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--out", "x.jsonl"], "--prompts FILE"),
        (["--resume"], "--prompts FILE"),
        (["--logprobs"], "--prompts FILE"),
        (["--prompts", "none.txt"], "cannot be read"),
        (["--prompts", __file__, "--resume"], "--resume continues a file"),
        (["--prompts", __file__, "--out", "no/folder/x"], "cannot be written"),
        (["--prompts", __file__, "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--prompts", __file__, "--min-new-tokens", "60"], "min_new_tokens must be 0 to 50"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty must be between 0.01 and 100, got 0"),
        (["--prompt", "a", "--stop", ""], "stop must be a text of at least one character"),
    ],
)
def test_what_is_refused(args: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert not out
    assert says in err.splitlines()[-1]


def test_long_prompts_go_through_a_small_budget(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A prompt longer than the context works only with positions in the cache, and not with prefill full."""
    questions = write(tmp_path / "q.txt", ["a = 1; " * 400])
    sink = ("--prompts", questions, "--kv-cache", "sink", "--kv-cache.budget", 64, "--max-new-tokens", 2)
    assert run(*sink) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > 1024
    h2o = ("--prompts", questions, "--kv-cache", "h2o", "--kv-cache.positions", "cache", "--kv-cache.budget", 640)
    assert run(*h2o, "--max-new-tokens", 2) == 0
    err = capsys.readouterr().err
    assert "times the budget: " in err and "will be read one at a time; --prefill-chunk 128 reads blocks" in err
    assert run(*sink, "--prefill", "full") == 1
    assert "reads it in one pass and the model's context is 1024" in capsys.readouterr().err
