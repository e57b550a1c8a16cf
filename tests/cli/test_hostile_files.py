"""Options and files that try to run code or to fill the memory are refused with one line and exit code 2."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from litgpt_kv.__main__ import main
from litgpt_kv.llm.checkpoint import DEMO

PAYLOAD = "{class_path: evil_module.Evil}"
WITH_ARGUMENTS = "{class_path: evil_module.Evil, init_args: {text: x}}"
POPEN = "{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
INNER_BOMB = BOMB.replace("\n", "\n  ").rstrip()  # as the value of a key

# file contents for --config
CONFIGS = {
    "budget": f"kv_cache: {{strategy: h2o, budget: {PAYLOAD}}}",
    "budget with arguments": f"kv_cache: {{strategy: h2o, budget: {WITH_ARGUMENTS}}}",
    "budget starts a program": f"kv_cache: {{strategy: h2o, budget: {POPEN}}}",
    "sinks": f"kv_cache: {{sinks: {PAYLOAD}}}",
    "recent": f"kv_cache: {{recent: {PAYLOAD}}}",
    "storage": f"kv_cache: {{storage: {PAYLOAD}}}",
    "strategy": f"kv_cache: {{strategy: {PAYLOAD}}}",
    "positions": f"kv_cache: {{positions: {PAYLOAD}}}",
    "options": f"kv_cache: {{options: {PAYLOAD}}}",
    "one option": f"kv_cache: {{options: {{sharpness: {PAYLOAD}}}}}",
    "an unknown option": f"kv_cache: {{sharpness: {PAYLOAD}}}",
    "in a list": f"kv_cache: {{budget: [4, {PAYLOAD}]}}",
    "in a list in a list": f"kv_cache: {{budget: [[{PAYLOAD}]]}}",
    "in a mapping": f"kv_cache: {{budget: {{a: {{b: {PAYLOAD}}}}}}}",
    "in a list of an option": f"kv_cache: {{options: {{sharpness: [{PAYLOAD}]}}}}",
    "as a text": f"kv_cache: {{budget: '{PAYLOAD}'}}",
    "as a text in a list": f"kv_cache: {{budget: ['{PAYLOAD}']}}",
    "as JSON in a text": 'kv_cache: {budget: \'{"class_path": "evil_module.Evil"}\'}',
    "by an alias": f"seed: 1\nkv_cache: {{sinks: &x {PAYLOAD}, budget: *x}}",
    "by a merge": f"kv_cache: {{options: &x {PAYLOAD}, budget: {{<<: *x}}}}",
    "over several lines": "kv_cache:\n  budget:\n    class_path: evil_module.Evil\n    init_args:\n      text: x\n",
    "an argument that is a class": f"kv_cache: {{budget: {WITH_ARGUMENTS.replace('x', PAYLOAD)}}}",
    "keyword arguments": "kv_cache: {budget: {class_path: evil_module.Evil, dict_kwargs: {text: x}}}",
    "aliases in options": f"kv_cache:\n  {INNER_BOMB}",
    "aliases in prompts": f"prompt:\n  {INNER_BOMB}",
    "an alias of itself": "kv_cache: &x {budget: [*x]}",
    "1.5 MB": "prompt: hello\n" + "# comment\n" * 150_000,
    "a thousand levels": "prompt: " + "[" * 1000 + "]" * 1000,
}
FOR_COMMANDS = {
    "chat": (["chat", "demo"], f"kv_cache: {{budget: {PAYLOAD}}}"),
    "plan": (["plan", "pythia-14m"], f"kv_cache: {{budget: {PAYLOAD}}}"),
    "benchmark_batches": (["benchmark_batches"], f"kv_cache: {{budget: {PAYLOAD}}}"),
    "for the whole program": ([], f"generate: {{checkpoint_dir: demo, kv_cache: {{budget: {PAYLOAD}}}}}"),
}
OPTIONS = {
    "a budget": [f"--kv-cache.budget={PAYLOAD}"],
    "a budget in a list": [f"--kv-cache.budget=[{PAYLOAD}]"],
    "all at once": [f"--kv-cache={{budget: {PAYLOAD}}}"],
    "after a name": ["--kv-cache", "h2o", "--kv-cache.budget", WITH_ARGUMENTS],
    "JSON": ["--kv-cache.budget", json.dumps({"class_path": "evil_module.Evil"})],
    "an option": [f"--kv-cache.options={{sharpness: {PAYLOAD}}}"],
    "an option by name": [f"--kv-cache.sharpness={PAYLOAD}"],
    "a file in the place of options": ["--kv-cache={budget: {class_path: evil_module.Evil}}"],
}
STYLES = {
    "a class of another module": "class_path: evil_module.Evil",
    "a program": "class_path: os.getcwd",
    "a module's function": "class_path: evil_module.run",
    "what litgpt's module imports": "class_path: litgpt.prompts.Path",
    "a function of litgpt": "class_path: litgpt.prompts.dumps",
    "a function of another module of litgpt": "class_path: litgpt.utils.get_default_supported_precision",
    "no dot": "class_path: Evil",
    "a list": "- class_path: litgpt.prompts.Alpaca",
    "a number": "class_path: 3",
    "nothing": "",
    "another key": "class: litgpt.prompts.Alpaca",
    "no YAML": "class_path: [",
    "aliases": BOMB,
    "a deep one": "class_path: " + "[" * 3000,
    "no text": "\udcff",
}


@pytest.fixture(autouse=True)
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a module into the working directory that creates a file when it is imported."""
    (tmp_path / "evil_module.py").write_text(
        "import pathlib\n"
        "pathlib.Path('ran').touch()\n"
        "class Evil:\n"
        "    def __init__(self, text: str = ''): pass\n"
        "def run(): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("evil_module", None)


@pytest.fixture
def refused(evil: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    def check(*args: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(args))
        out, err = capsys.readouterr()
        if any("Popen" in p.read_text(errors="ignore") for p in evil.glob("*.yaml")):
            time.sleep(0.3)  # for the program to leave its file
        assert not (evil / "ran").exists(), "code ran"
        assert end.value.code == 2
        assert out == ""
        (line,) = [line for line in err.splitlines() if not line.startswith("Loaded ")]
        assert line.startswith("litgpt_kv: error: ")
        assert len(line) < 1000
        return line

    return check


GENERATE = ["generate", "demo", "--accelerator", "cpu", "--max-new-tokens", "1"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_file(name: str, refused: Callable[..., str], evil: Path) -> None:
    (evil / "options.yaml").write_text(CONFIGS[name])
    refused(*GENERATE, "--config", "options.yaml")


@pytest.mark.parametrize("name", FOR_COMMANDS)
def test_a_config_file_of_every_command(name: str, refused: Callable[..., str], evil: Path) -> None:
    args, text = FOR_COMMANDS[name]
    (evil / "options.yaml").write_text(text)
    refused(*args, "--config", "options.yaml", *([] if args else ["generate"]))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name: str, refused: Callable[..., str]) -> None:
    refused(*GENERATE, *OPTIONS[name])


@pytest.mark.parametrize("name", STYLES)
def test_a_prompt_style(name: str, refused: Callable[..., str], evil: Path) -> None:
    folder = evil / "checkpoint"
    shutil.copytree(DEMO, folder)
    (folder / "prompt_style.yaml").write_bytes(STYLES[name].encode("utf-8", "surrogateescape"))
    assert "prompt_style.yaml" in refused("generate", str(folder), *GENERATE[2:])
