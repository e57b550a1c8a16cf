"""Every command and every Python example of the README and of docs/ is run."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from litgpt_kv.__main__ import main
from tests import warm
from tests.docs.pages import ROOT, Block, blocks, commands, own_strategies_forgotten
from tests.model import low_precision
from tests.serve.test_docs import parsed

LONG = ("litgpt_kv benchmark",)  # minutes: run with a small setting instead
COMMANDS = commands()
EXAMPLES = blocks("python")


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Forget the strategies of the examples."""
    with own_strategies_forgotten():
        yield


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) >= 30
    assert COMMANDS["make test"] == COMMANDS["make demo"] == "README.md"
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for block in EXAMPLES:
        if block.file and block.page == COMMANDS[command]:
            (tmp_path / block.file).write_text(block.text)
    said, _, piped = command.rpartition(" | ")
    text = shlex.split(said)[1] + "\n" if said else ""  # echo "..." | litgpt_kv
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    words = shlex.split(piped, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[:2] == ["python", "tests/model/low_precision.py"]:
        monkeypatch.setattr(sys, "argv", [*words[1:], "--steps", "3", "--families", "demo"])
        with pytest.raises(SystemExit, match="False"):  # nothing was too far off
            low_precision.main()
        assert capsys.readouterr().out
        return
    if words[0] == "pip":  # installing: .ci/run and tests/test_package.py do it
        assert words[1:3] in (["install", "torch==2.13.0"], ["install", "."]) or words[2].startswith(".[")
        return
    assert words[0] == "litgpt_kv"
    if words[1] == "serve":  # does not end: tests/serve starts servers
        assert parsed(command)["settings"].port == 8000
        return
    if command.startswith("litgpt_kv benchmark_batches"):
        words += ["--prompts", "5", "--rows", "2", "--longest", "30", "--new-tokens", "4", "--repeats", "1"]
        words += ["--answers", "4", "--fewest", "2"]
    elif command.startswith(LONG):
        words += ["--contexts", "[64]", "--steps", "2", "--repeats", "1"]
        words += ["--strategies", "[dense, h2o]"] if "--compile" in words else []
        words += ["--budget", "32"] if "--budget" in words else []
        if "--checkpoint-dir" not in words:
            words += ["--shape.n_layer", "2", "--shape.n_embd", "96"]
    if "--resume" in words:  # there is something to go on with
        main([word for word in words[1:] if word != "--resume"])
    if words[1] == "generate" and "--devices" in words:  # starts the script again: not from inside of pytest
        done = warm.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and done.stdout, done.stderr
        return
    with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
        main(words[1:])
    out, err = capsys.readouterr()
    assert out or "--out" in words or words[1] == "chat"
    if words[1] == "evaluate" and "--out" in words:
        folder = tmp_path / words[words.index("--out") + 1]
        assert {"results.json", "results.md", "text.png", "text.svg"} <= {path.name for path in folder.iterdir()}
    elif "--out" in words:
        assert (tmp_path / words[words.index("--out") + 1]).read_text().count("\n") == 5
    if words[1] == "chat":
        assert "Now chatting" in err


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: f"{block.page}-{block.number}")
def test_python_example(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for other in EXAMPLES:
        if other.file and other.page == block.page:
            (tmp_path / other.file).write_text(other.text)
    if "torch.compile" in block.text:
        torch.compiler.reset()  # earlier tests of this process may have reached the limit of graphs for our forward
    with contextlib.redirect_stdout(io.StringIO()):
        exec(
            compile(block.text, f"{block.page}, example {block.number}", "exec", dont_inherit=True),
            {"__name__": "readme"},
        )
