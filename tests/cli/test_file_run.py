"""Prompt files are streams: the first answer comes before the last line, and memory does not grow with the file."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from litgpt_kv import LLM, KVCacheArgs, SamplingArgs
from litgpt_kv.arguments import RunArgs, StoppingArgs
from litgpt_kv.cli import prompt_files
from litgpt_kv.cli.answers import Answers
from litgpt_kv.cli.file_run import answer_file
from litgpt_kv.cli.prompt_files import PromptFile
from litgpt_kv.generate import Request, Sequence, Stats
from litgpt_kv.llm.text_request import TextRequest
from tests import warm
from tests.cli.test_answers import COMMAND, texts
from tests.cli.test_prompt_files import records_of, run, write


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu")


def test_the_first_answer_comes_before_the_last_line_is_there(tmp_path: Path) -> None:
    command = [*COMMAND, "--prompts", "-", "--batch-size", "1", "--max-new-tokens", "2"]
    with warm.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for n in range(1, 4):
            print(f"def f{n}(x):", file=process.stdin, flush=True)
            if n > 1:  # the next row is looked at before one ends
                assert json.loads(process.stdout.readline())["line"] == n - 1
        process.stdin.close()
        assert json.loads(process.stdout.readline())["line"] == 3
    assert process.returncode == 0


def peak(llm: LLM, folder: Path, count: int) -> int:
    """Return the peak memory in bytes of a run over `count` lines, of which every third cannot be used."""
    kinds = ('{"prompt": "def f(x):", "seed": 1}', '{"prompt": ""}', '{"prompt": "import os", "max_new_tokens": 2}')
    questions = write(folder / f"{count}.jsonl", [kinds[n % 3] for n in range(count)])
    defaults = TextRequest(stopping=StoppingArgs(max_new_tokens=4), sampling=SamplingArgs(seed=0))
    tracemalloc.start()
    try:
        with Answers(str(folder / f"{count}.out")) as answers:
            counts = answer_file(llm, PromptFile(str(questions), defaults), answers, KVCacheArgs("dense"))
            answers.close()
            assert (counts.lines, counts.bad, len(answers)) == (count, count // 3, count - count // 3)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_lines(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InstantRun:
        """A run without a model, whose memory would be constant."""

        stats, cache = Stats(), None

        def __init__(self, requests: Iterator[Request], *_: object, **__: object) -> None:
            self.requests = requests

        def __iter__(self) -> Iterator[list[Sequence]]:
            for request in self.requests:
                sequence = Sequence(request, request.id, tokens=[1, 2], reason="stop")
                sequence.text = "some text" * 20
                yield [sequence]

    monkeypatch.setattr(LLM, "answer", InstantRun)
    few, many = peak(llm, tmp_path, 300), peak(llm, tmp_path, 6000)
    assert (many - few) / 5700 < 100, "an index of the answers is all that is kept"
    assert [r["line"] for r in records_of(tmp_path / "6000.out")] == [n for n in range(1, 6001) if n % 3 != 2]


def test_ten_thousand_bad_lines_print_twenty_and_a_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = ["rubbish" * 1000] * 10_000 + [{"prompt": "def"}]
    assert run("--prompts", write(tmp_path / "q.jsonl", lines), "--max-new-tokens", 1) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["line"] == 10_001
    notes = [line for line in err.splitlines() if "skipped" in line]
    assert [line.split(" was")[0] for line in notes[:20]] == [f"Line {n}" for n in range(1, 21)]
    assert notes[20:] == ["9,980 more lines were skipped."]
    assert "10,000 of 10,001 lines could not be used." in err and len(err) < 10_000


NASTY = [
    {"prompt": "a", "seed": -1},
    {"prompt": "a", "seed": 10**400},
    {"prompt": "a", "temperature": 10**400},
    {"prompt": "a", "top_p": 10**400},
    {"prompt": "a", "repetition_penalty": 10**400},
    {"prompt": "a", "max_new_tokens": 10**400},
    {"prompt": "a", "top_k": -(10**400)},
    {"prompt": "a", "stop": [[["x"]]]},
    {"prompt": "a", "stop": [""]},
    '{"prompt": "a", "temperature": NaN}',
    '{"prompt": "a", "temperature": 1e999}',
    '{"prompt": "a", "seed": ' + "9" * 5000 + "}",
    '{"prompt": "a", "stop": ' + "[" * 900 + "]" * 900 + "}",
    '{"prompt": "a", "stop": ' + "[" * 100_000,
    '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"prompt": "a", ' + ", ".join(f'"x{n}": 1' for n in range(10_000)) + "}",
    {"prompt": "\ud800"},
    {"prompt": {"prompt": "a"}},
    {"prompt": "a\0b" * 5000},
    {"prompt": "a", "sys_prompt": 1},
    "\0" * 100,
    "{",
]


def test_one_bad_line_never_stops_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [line for bad in NASTY for line in (bad, {"prompt": "def"})]
    assert run("--prompts", write(tmp_path / "q.jsonl", lines), "--max-new-tokens", 1, "--num-samples", 2) == 1
    out, err = capsys.readouterr()
    found = [(r["line"], r["sample"]) for r in map(json.loads, out.splitlines())]
    assert found == [(2 * n, sample) for n in range(1, len(NASTY) + 1) for sample in (0, 1)]
    assert f"{len(NASTY)} of {2 * len(NASTY)} lines could not be used." in err
    assert "Traceback" not in err and max(map(len, err.splitlines())) < 400


def test_a_cache_grows_when_a_longer_prompt_comes(llm: LLM, tmp_path: Path) -> None:
    lengths = [1, 3, 2, 40, 1, 90, 5, 150, 2]
    lines = [{"prompt": "x = 1\n" * n, "max_new_tokens": 6, "temperature": 0} for n in lengths]
    out, sizes, real = tmp_path / "a.jsonl", [], llm.build_cache
    llm.build_cache = lambda args, rows, tokens: sizes.append(tokens) or real(args, rows, tokens)
    try:
        with Answers(str(out)) as answers:
            questions = PromptFile(str(write(tmp_path / "q.jsonl", lines)))
            answer_file(llm, questions, answers, KVCacheArgs("dense"), RunArgs(batch_size=2))
            answers.close()
    finally:
        del llm.build_cache
    assert len(sizes) == 4 and sizes == sorted(sizes), "one for the first, and one whenever a prompt did not fit"
    assert llm.stats.new_tokens == sum(r["new_tokens"] for r in records_of(out)), "of all caches"
    for line, record in zip(lines, records_of(out)):
        assert record["text"] == llm.generate(line["prompt"], max_new_tokens=6, temperature=0.0)


def test_a_share_of_the_longest_prompt_of_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = write(tmp_path / "q.txt", ["", "x = ", "y", "", "class A:  # " + "pass " * 60])
    options = ("--kv-cache", "h2o", "--kv-cache.budget", "20%", "--max-new-tokens", 12)
    assert run("--prompts", questions, *options, "--out", tmp_path / "file") == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(questions.read_bytes())))
    assert run("--prompts", "-", *options, "--out", tmp_path / "pipe") == 0
    assert texts(tmp_path / "pipe") == texts(tmp_path / "file")
    assert [line for line, _, _ in texts(tmp_path / "file")] == [2, 3, 5]


def test_a_named_pipe_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with subprocess.Popen(["bash", "-c", f"printf 'def a\\ndef b\\r\\ndef c' > {pipe}"]):
        assert run("--prompts", pipe, "--max-new-tokens", 2) == 0
    found = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert found == ["def a", "def b", "def c"]


def test_a_line_that_is_too_long_is_not_held_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_files, "LONGEST_LINE", 1000)
    for end in (b"\n", b"\r"):
        text = b"def a\n" + (b"x" * 700 + end) * 9 + b"\ndef b" + b" " * 900 + b"\ndef c" + b" " * 1000
        (tmp_path / "q.txt").write_bytes(text)
        lines = list(PromptFile(str(tmp_path / "q.txt")))
        long = [line.number for line in lines if line.error == "it is longer than 1,000 bytes"]
        assert long == ([lines[-1].number] if end == b"\n" else [2, 4])
        assert [line.request.prompt[:5] for line in (lines[0], lines[-2])] == ["def a", "def b"]
    for path, says in (("/dev/zero", "a device, not a file"), (tmp_path, "a folder, not a file")):
        assert run("--prompts", path) == 2
        assert f"The prompts {str(path)!r} cannot be read: it is {says}." in capsys.readouterr().err


def test_answers_to_other_prompts_are_found_before_anything_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "a.jsonl"
    common = ("--out", out, "--max-new-tokens", 2, "--batch-size", 1)
    assert run("--prompts", write(tmp_path / "q.txt", ["a", "b", "c"]), *common) == 0
    out.write_text(before := out.read_text().splitlines(keepends=True)[2])
    assert run("--prompts", write(tmp_path / "r.txt", ["a", "b", "d"]), *common, "--resume") == 2
    assert "has answers to other prompts: line 3 was 'c'" in capsys.readouterr().err
    assert out.read_text() == before
