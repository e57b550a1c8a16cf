"""A strategy from a user's own file: named on the command line, never in YAML."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from litgpt_kv import LLM, KVCache, KVCacheArgs, registry
from litgpt_kv.__main__ import main
from tests import warm
from tests.test_contributing import STRATEGY

FLAGS = ["--accelerator", "cpu", "--prompt", "def f(x):", "--max-new-tokens", "30", "--temperature", "0"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Save the strategy of CONTRIBUTING in a file, with one that does not register itself."""
    path = tmp_path / "my_file.py"
    path.write_text(STRATEGY + '\n\n@dataclass(frozen=True)\nclass Plainest(Unusual):\n    """Keep the same."""\n')
    known = dict(registry._KINDS["strategy"])
    yield path
    registry._KINDS["strategy"].clear()
    registry._KINDS["strategy"].update(known)
    for name in [name for name in sys.modules if name.startswith("litgpt_kv_file_")]:
        del sys.modules[name]


def run(capsys: pytest.CaptureFixture, *args: object) -> str:
    main(["generate", "demo", *FLAGS, *map(str, args)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    with pytest.raises(SystemExit) as end:
        main(["generate", "demo", *FLAGS, *map(str, args)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def test_by_file_and_class_or_by_import_and_name(file: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    budget = ("--kv-cache.budget", 8)
    texts = {
        run(capsys, "--kv-cache", f"{file}:Unusual", *budget),
        run(capsys, f"--kv-cache.strategy={file}:Unusual", *budget),
        run(capsys, "--import", file, "--kv-cache", "unusual", *budget),
        run(capsys, "--kv-cache", f"{file}:Plainest", *budget),
    }
    assert len(texts) == 1
    assert run(capsys, "--kv-cache", "window", *budget) not in texts
    options = tmp_path / "a.yaml"
    options.write_text("kv_cache: {strategy: unusual, budget: 8, sharpness: 2.0}\n")
    assert run(capsys, "--import", file, "--config", options) in texts
    sharp = run(capsys, "--kv-cache", f"{file}:Unusual", *budget, "--kv-cache.sharpness", "-4")
    assert sharp not in texts
    assert "'sharpness' is" not in refused(capsys, "--kv-cache", "unusual", "--kv-cache.sharpness", "x")
    assert KVCacheArgs("unusual", 8).strategy in registry.names("strategy")


def test_yaml_alone_imports_nothing(file: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n" + file.read_text())
    options = tmp_path / "a.yaml"
    for text in (
        f"kv_cache: {file}:Unusual\n",
        f"kv_cache: {{strategy: {file}:Unusual, budget: 8}}\n",
        f"kv_cache: {{strategy: [{file}:Unusual, dense, dense, dense]}}\n",
        f"import: {file}\n",
        f"generate: {{kv_cache: {file}:Unusual}}\n",
        f"strategies: ['{file}:Unusual factor=1']\n",
    ):
        options.write_text(text)
        line = refused(capsys, "--config", options)
        assert f"YAML and JSON cannot import code: give --import {file} on the command line" in line
        assert not (tmp_path / "ran").exists()
    line = refused(capsys, f"--kv-cache={{strategy: {file}:Unusual}}")
    assert "give --import" in line and not (tmp_path / "ran").exists()


def test_python_takes_a_file_by_its_name(file: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    name, settings = f"{file}:Unusual", dict(max_new_tokens=30, temperature=0.0)
    llm = LLM.load("demo", accelerator="cpu")
    texts = {
        llm.generate("def f(x):", kv_cache=cache, **settings, **budget)
        for cache, budget in (
            (name, {"budget": 8}),
            ({"strategy": name, "sharpness": 2.0, "budget": 8}, {}),
            (KVCacheArgs(name, budget=8), {}),
            (KVCacheArgs([name] * llm.config.n_layer, budget=8), {}),
        )
    }
    assert len(texts) == 1 and set(llm.cache.args.strategy) == {"unusual"}
    assert run(capsys, "--kv-cache", name, "--kv-cache.budget", 8) in {f"def f(x):{text}\n" for text in texts}
    chat = llm.chat(kv_cache=name, budget=8, max_tokens=40)
    assert chat.cache.args.strategy == "unusual"
    chat.cache.save(tmp_path / "a.safetensors")
    assert KVCache.load(tmp_path / "a.safetensors", llm.model, KVCacheArgs(name, 8)).args == chat.cache.args
    assert KVCache.nbytes(llm.config, KVCacheArgs(name, 8), 1, 40) == chat.cache.allocated()
    with pytest.raises(ValueError, match="has no class 'Nothing'"):
        llm.generate("x", kv_cache=f"{file}:Nothing")


def test_options_belong_to_the_strategies_that_are_compared(
    file: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    text = ["--tasks", "[]", "--text", "prose", "--text-tokens", "24", "--text-prompt", "16", "--budgets", "[8]"]
    compare = ["evaluate", "demo", "--accelerator", "cpu", *text, "--strategies", f"[{file}:Unusual]"]
    main([*compare, "--kv-cache.sharpness", "2"])
    assert "| 8 | " in capsys.readouterr().out
    for args, says in (
        (
            [*compare, "--kv-cache.sharpness", "x"],
            "The option sharpness of 'unusual' cannot be 'x': it must be a number",
        ),
        ([*compare, "--kv-cache.shapness", "2"], "'unusual' also sharpness. Did you mean 'sharpness'?"),
        (
            ["generate", "demo", "--kv-cache.sharpness", "2"],
            "'sharpness' is an option of unusual: choose one",
        ),
        (["evaluate", "demo", *text, "--kv-cache.nothing", "2"], "--kv-cache.help NAME shows those of one strategy."),
    ):
        with pytest.raises(SystemExit):
            main(args)
        assert says in capsys.readouterr().err


def test_what_is_refused(file: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    for args, says in (
        (["--kv-cache", str(file)], "needs the name of its strategy's class"),
        (["--kv-cache", f"{file}:Nothing"], "has no class 'Nothing'"),
        (["--kv-cache", "no_file.py:Mine"], "There is no Python file 'no_file.py' to import"),
        (["--import", str(tmp_path)], "There is no Python file"),
        (["--import", str(broken)], "broken.py cannot be imported: ZeroDivisionError"),
        (["--import"], "--import needs a value"),
    ):
        assert says in refused(capsys, *args)


def test_in_python_and_in_a_process_of_its_own(file: Path) -> None:
    module = registry.import_file(str(file))
    assert registry.import_file(str(file)) is module, "a file is run once"
    assert registry.get("strategy", "unusual") is module.Unusual
    command = [sys.executable, "-m", "litgpt_kv", "strategies", "--import", str(file)]
    done = warm.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\nunusual  " in done.stdout
