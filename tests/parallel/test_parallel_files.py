"""A file of prompts over several processes: the answers of one, in order, and nothing lost when one is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from litgpt_kv import LLM
from litgpt_kv.__main__ import main
from litgpt_kv.cli.answers import Answers
from tests.parallel.processes import GENERATE, children, finished, linux, silence, started, together

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


SCRIPT = """
import os, time
from litgpt_kv import LLM
from litgpt_kv.arguments import StoppingArgs
from litgpt_kv.llm.text_request import TextRequest

def say(*words):  # in one piece: two processes write here
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

llm = LLM.load("demo", accelerator="cpu", distribute=None)
llm.distribute(accelerator="cpu", devices=2, generate_strategy="data_parallel")
first, rank = llm.fabric.is_global_zero, llm.fabric.global_rank
texts = ["def f(x):", "class A", "import os\\n"]
try:  # what one process would refuse, all do
    llm.generate(["x " * 2000, "import os\\n"], kv_cache="h2o", budget=64, max_new_tokens=4)
except ValueError as error:
    say("refused", rank, "over the limit of 1024" in str(error))
try:  # one process fails on its own; the other one hears of it
    asked = [TextRequest(text, stopping=StoppingArgs(max_new_tokens=9)) for text in texts]
    for n, drew in enumerate(llm.run([llm.request(each, b) for b, each in enumerate(asked)], None)):
        if rank and n == 3:
            raise OSError("no space")
except (OSError, RuntimeError) as error:
    say("failed", rank, error)
found = llm.generate(texts, max_new_tokens=6, temperature=0.0)  # and both go on, with the same
say("then", rank, found == {expected!r})
if not first:
    time.sleep(17)  # longer than a silence: the process that has the store waits
llm.close()
say("closed", rank)
"""


@silence
def test_processes_fail_alike_and_go_on_alike(tmp_path: Path) -> None:
    texts = ["def f(x):", "class A", "import os\n"]
    expected = LLM.load("demo", accelerator="cpu").generate(texts, max_new_tokens=6, temperature=0.0)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("{expected!r}", repr(expected)))
    code, out, err = finished(str(script))
    lines = sorted(out.splitlines())
    assert code == 0 and lines == [
        "closed 0",
        "closed 1",
        "failed 0 process 1 of 2 failed: GeneratorExit:",
        "failed 1 no space",
        "refused 0 True",
        "refused 1 True",
        "then 0 True",
        "then 1 True",
    ], (out, err)


def test_standard_input_is_for_one_process(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main([*GENERATE[2:], "--prompts", "-", *TWO])
    assert end.value.code == 2 and "Standard input reaches one process only" in capsys.readouterr().err


def test_only_parts_of_this_file_are_its_parts(tmp_path: Path) -> None:
    for name in ("a.jsonl.partner", "a.jsonl.part0", "a.jsonl.part12", "ba.jsonl.part1"):
        (tmp_path / name).write_text("")
    assert [p.name for p in Answers(str(tmp_path / "a.jsonl")).parts()] == ["a.jsonl.part0", "a.jsonl.part12"]


@linux
def test_a_file_over_two_processes_is_that_of_one_and_survives_a_killed_one(tmp_path: Path) -> None:
    questions, one, two = questions_in(tmp_path / "q.jsonl"), tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    with pytest.raises(SystemExit) as end:
        main([*GENERATE[2:], "--prompts", str(questions), "--out", str(one), "--batch-size", "5"])
    assert end.value.code == 1  # for the line of rubbish
    command = [*GENERATE, "--prompts", str(questions), "--out", str(two), *TWO]
    with started(*command) as process:
        part = tmp_path / "two.jsonl.part1"
        until = time.monotonic() + 240
        while not (part.exists() and part.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        began = time.monotonic()
        os.kill(children(process.pid)[1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "process 1 of 2" in err and time.monotonic() - began < 30
    kept = [r for p in tmp_path.glob("two.jsonl*") for r in map(json.loads, p.read_text().splitlines()[:-1])]
    assert len(kept) >= 2
    code, _, err = finished(*command)
    assert code == 2 and "exists: --resume continues it" in err
    script = tmp_path / "windows.py"  # several windows, in each of which the processes divide 7 prompts
    script.write_text(
        "from litgpt_kv.__main__ import main\nfrom litgpt_kv.cli import file_run\nfile_run.WINDOW = 7\nmain()"
    )
    code, _, err = together(2, str(script), *command[2:], "--resume")
    script.unlink()
    assert code == 1 and "Line 31 was skipped" in err and "30 answers" in err, err
    assert answers_in(two) == answers_in(one)
    found = [json.loads(line) for line in two.read_text().splitlines()]
    assert all(record in found for record in kept), "what was finished stays as it was, its seconds too"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.jsonl", "q.jsonl", "two.jsonl"]
    assert two.stat().st_mode == one.stat().st_mode


def test_standard_output_has_the_answers_of_all_processes_in_order(tmp_path: Path) -> None:
    questions = questions_in(tmp_path / "q.jsonl", 7)
    code, out, err = together(2, *GENERATE, "--prompts", str(questions), *TWO)
    assert code == 1 and [json.loads(line)["line"] for line in out.splitlines()] == list(range(1, 8)), err
    assert "made 178 in" in err, "all that was made, by both"
