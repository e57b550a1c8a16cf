"""docs/serve.md: its commands run as they stand, and its tables have everything."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.__main__ import COMMANDS, main
from litgpt_kv.arguments import DeviceArgs
from litgpt_kv.benchmark.servers import other_peer
from litgpt_kv.cli.options import normalise
from litgpt_kv.cli.parser import arguments_of, build_parser, flags_of
from litgpt_kv.cli.serve import named_caches
from litgpt_kv.serve import schemas
from litgpt_kv.serve.app import build_app
from litgpt_kv.serve.metrics import Metrics
from litgpt_kv.serve.settings import ServeArgs
from tests.serve.conftest import serving

TEXT = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)
LINES = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
CACHES = {"h2o": KVCacheArgs("h2o", budget=24)}


def parsed(line: str) -> dict:
    """The arguments that a command line gives its command."""
    args, _ = normalise(shlex.split(line)[1:], flags_of(COMMANDS))
    found = build_parser(COMMANDS, "", args[0]).parse_args(args)
    given: dict = {}
    command = COMMANDS[found.subcommand]

    def note(**arguments):
        given.update(arguments)

    note.__signature__ = inspect.signature(command, eval_str=True)  # type: ignore[attr-defined]
    note(**arguments_of(note, found[found.subcommand]))
    return given


def test_the_command_lines_are_understood() -> None:
    lines = [line for line in LINES if line.startswith("litgpt_kv")]
    assert len(lines) == 4
    first, several, speed, peers = map(parsed, lines)
    assert first["settings"] == ServeArgs(rows=8, port=8000) and first["kv_cache"] == KVCacheArgs("h2o", budget="25%")
    named = named_caches(several["kv_cache"], several["caches"])
    assert named == {
        "dense": KVCacheArgs(),
        "small": KVCacheArgs("h2o", budget=64),
        "window": KVCacheArgs("window", budget=128),
    }
    assert speed["against"] == ["litgpt"] and speed["clients"] == 8
    others = [other_peer(given, "folder", 9, DeviceArgs()) for given in peers["against"]]
    assert [peer.name for peer in others] == ["llama.cpp", "llama_cpp.server", "vllm"]


def test_the_examples_of_clients_run(llm: LLM, tmp_path: Path) -> None:
    with serving(llm, CACHES, rows=2) as server:
        code = next(text for kind, text in BLOCKS if kind == "python").replace("http://127.0.0.1:8000", server.url)
        script = tmp_path / "client.py"
        script.write_text(code)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "'cache': 'h2o'" in done.stdout
        curl = shlex.split(
            next(line for line in LINES if line.startswith("curl")).replace("http://127.0.0.1:8000", server.url)
        )
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        done = subprocess.run([*curl, "--silent"], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["choices"][0]["text"] == llm.generate(
            "def fib(", max_new_tokens=20, temperature=0.0, kv_cache=CACHES["h2o"]
        )


def test_the_tables_have_everything(llm: LLM) -> None:
    for field in dataclasses.fields(ServeArgs):
        assert f"`--{field.name.replace('_', '-')}`" in TEXT, field.name
    for body in (schemas.ChatBody, schemas.CompletionBody):
        for name in body.model_fields:
            assert f"`{name}`" in TEXT, name
    for metric in Metrics().registry.collect():
        name = metric.name.removeprefix("litgpt_kv_")
        assert f"`{name}`" in TEXT or f"`{name}_total`" in TEXT, name
    with serving(llm, CACHES, rows=1) as server:
        paths = {route.path.replace("{name:path}", "NAME") for route in build_app(server.service).routes}
    assert {path for path in paths if f" {path}`" not in TEXT} == set()


@pytest.mark.parametrize("missing", ["uvicorn", "fastapi", "prometheus_client"])
def test_without_the_extra_one_line_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("litgpt_kv.serve.") and "settings" not in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # importing it fails as where it is not installed
    with pytest.raises(SystemExit) as end:
        main(["serve", "demo"])
    said = f"litgpt_kv: error: serve needs {missing}: pip install 'litgpt-kv[serve]'.\n"
    assert (end.value.code, capsys.readouterr().err) == (2, said)
