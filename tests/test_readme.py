"""Every command and every Python example in the README is run."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from litgpt_kv.__main__ import main
from tests import warm
from tests.model import low_precision

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
LONG = ("litgpt_kv benchmark",)  # minutes: run with a small setting instead
MAKE = {"make demo", "make test", "make help", "make lint", "make wheel"}  # `make test` runs these tests


def commands():
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_readme_has_commands():
    assert len(commands()) >= 8
    assert "make test" in commands()
    assert "make demo" in commands()


@pytest.mark.parametrize("command", commands())
def test_command(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    said, _, piped = command.rpartition(" | ")
    text = shlex.split(said)[1] + "\n" if said else ""  # echo "..." | litgpt_kv
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    words = shlex.split(piped, comments=True)
    if words[0] == "make":
        target = words[1]
        assert f"make {target}" in MAKE
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[:2] == ["python", "tests/model/low_precision.py"]:
        monkeypatch.setattr(sys, "argv", [*words[1:], "--steps", "3", "--families", "demo"])
        with pytest.raises(SystemExit, match="False"):  # nothing was too far off
            low_precision.main()
        assert capsys.readouterr().out
        return
    if words[0] == "pip":  # installing: .ci/run and tests/test_package.py do it
        assert words[1:3] in (["install", "torch==2.13.0"], ["install", "litgpt-kv"], ["install", "."])
        return
    assert words[0] == "litgpt_kv"
    if command.startswith("litgpt_kv benchmark_batches"):
        words += ["--prompts", "5", "--rows", "2", "--longest", "30", "--new-tokens", "4", "--repeats", "1"]
        words += ["--answers", "4", "--fewest", "2"]
    elif command.startswith(LONG):
        words += ["--contexts", "[64]", "--steps", "2", "--repeats", "1"]
        words += ["--strategies", "[dense, h2o]"] if "--compile" in words else []
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
    if "--out" in words:
        assert (tmp_path / words[words.index("--out") + 1]).read_text().count("\n") == 5
    if words[1] == "chat":
        assert "Now chatting" in err


@pytest.mark.parametrize("number", range(sum(kind == "python" for kind, _ in BLOCKS)))
def test_python_example(number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = [block for kind, block in BLOCKS if kind == "python"][number]
    if "torch.compile" in code:
        torch.compiler.reset()  # earlier tests of this process may have reached the limit of graphs for our forward
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, f"README example {number}", "exec"), {"__name__": "readme"})


def test_every_strategy_is_in_the_table():
    from litgpt_kv import registry

    for name in registry.names("strategy"):
        if registry.get("strategy", name).__module__.startswith("litgpt_kv."):
            assert f"| `{name}` |" in TEXT


def test_links_to_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
