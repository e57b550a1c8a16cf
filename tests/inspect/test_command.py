"""`litgpt_kv inspect`, and every command and example of docs/inspect.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from litgpt_kv import KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.cli.inspect import caches_of
from tests.inspect.test_record import data_of

TEXT = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)
COMMANDS = [shlex.split(text) for kind, text in BLOCKS if kind == "bash"]
FAST = ["--accelerator", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_the_commands_of_the_document(number: int, capsys: pytest.CaptureFixture) -> None:
    name, *words = COMMANDS[number]
    shorter = ["--text-tokens", "60"] if "--text" in words else ["--max-new-tokens", "20"]
    main([*words, *shorter, *FAST])
    said, out = capsys.readouterr(), Path(words[words.index("--out") + 1])
    data = data_of(out.read_text(encoding="utf-8"))
    assert name == "litgpt_kv" and f"Written to {out}: " in said.err
    assert said.out.splitlines()[0] in TEXT  # the head of the table
    names = [line.split("  ")[0] for line in said.out.splitlines()[1:]]
    assert names == [one["name"] for one in data["caches"]]
    assert names == (["h2o 20%", "sink 20%", "keydiff:pool 20%"] if "--text" in words else ["h2o 25%"])
    if "--text" in words:
        assert len(data["tokens"]) == 60 and data["start"] == 30
    else:
        assert "".join(data["tokens"][1:]).startswith("def fib(n):") and data["states"] == 21


def test_the_example_of_the_document(capsys: pytest.CaptureFixture) -> None:
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    exec(compile(code, "docs/inspect.md", "exec"), {"__name__": "docs"})
    assert capsys.readouterr().out.startswith("(6, 3, 47)\n") and Path("fib.html").stat().st_size > 10_000


def test_the_table_has_every_option() -> None:
    for option in ("prompt", "max-new-tokens", "text", "text-tokens", "text-prompt", "strategies", "kv-cache", "out"):
        assert f"| `--{option}`" in TEXT


def test_caches_by_name() -> None:
    assert caches_of(None, KVCacheArgs("tova", budget=16, interval=2)) == {
        "tova 16": KVCacheArgs("tova", budget=16, interval=2)
    }
    assert caches_of(["dense", "h2o:pool"], KVCacheArgs("sink", sinks=2)) == {
        "dense": KVCacheArgs("dense", sinks=2),
        "h2o:pool 25%": KVCacheArgs("h2o", budget="25%", select="pool", sinks=2),
    }
    mixed = KVCacheArgs(["dense", "h2o"], budget=[None, 9])
    assert caches_of(None, mixed) == {"mixed": KVCacheArgs(["dense", "h2o"], budget=(None, 9))}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Give either --prompt or --text"),
        (["--prompt", "a", "--text", "prose"], "Give either --prompt or --text"),
        (["--prompt", "a", "--prompt", "b"], "give --prompt once"),
        (["--prompt", "a", "--strategies", "[]"], "strategies is an empty list"),
        (["--prompt", "a", "--strategies", "[h3o]"], "Unknown strategy 'h3o'"),
        (["--prompt", "a", "--kv-cache", "none"], "keeps nothing"),
        (["--prompt", "a", "--out", "no/page.html"], "no/page.html cannot be written: there is no folder"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--text", "no.txt"], "The text 'no.txt' cannot be read"),
        (["--text", "prose", "--text-tokens", "9", "--text-prompt", "9"], "text_prompt must be 1 to 8 (the text has 9"),
        (["--text", "prose", "--text-tokens", "2000"], "The text has 2,000 tokens: a full cache to compare with"),
    ],
)
def test_what_the_command_refuses(args: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["inspect", "demo", *args, *FAST])
    assert end.value.code == 2 and message in capsys.readouterr().err and not Path("inspect.html").exists()
