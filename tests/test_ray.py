"""Ray Data and Ray Serve on a local Ray of two workers, one of which is killed. Skipped where ray is not installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import yaml
from jsonargparse import auto_cli

from litgpt_kv import LLM, KVCacheArgs

ray = pytest.importorskip("ray", reason="needs the extra [ray]")
pytest.importorskip("ray.data"), pytest.importorskip("ray.serve")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

ROOT = Path(__file__).parents[1]
H2O = KVCacheArgs("h2o", budget=24)


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"extension_{name}", ROOT / "extensions" / "ray" / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.perf_counter() + seconds
    while not (found := true()):
        assert time.perf_counter() < end, "it did not happen in time"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu", precision="64-true")


# -- Ray Data ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts() -> ModuleType:
    return loaded("answer_prompts")


def noting(prompts: ModuleType, notes: Path) -> type:
    """A worker that notes the rows of each batch that it begins and ends, and is slow enough to be killed in one."""

    class Noting(prompts.Answerer):
        def __call__(self, table: Any) -> Any:
            numbers = table["number"].to_pylist()
            (notes / f"{os.getpid()} {numbers[0]} began").touch()
            time.sleep(1)
            answers = super().__call__(table)
            (notes / f"{os.getpid()} {numbers[0]} ended").touch()
            return answers

    return Noting


def pids(notes: Path, what: str) -> list[int]:
    return [int(path.name.split()[0]) for path in notes.glob(f"* {what}")]


def test_a_worker_that_dies_is_replaced_and_no_row_is_lost_or_there_twice(
    cluster: None, prompts: ModuleType, llm: LLM, tmp_path: Path
) -> None:
    rows = [{"number": n, "prompt": f"def f{n}(self, x):", "max_new_tokens": 4 + n % 5} for n in range(40)]
    rows[7]["prompt"], rows[9]["max_new_tokens"] = "", 10**6
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (notes := tmp_path / "notes").mkdir()
    settings = prompts.Settings("demo", H2O, prompts.SamplingArgs(temperature=0.0), precision="64-true")
    answers = prompts.answer(
        prompts.read(str(file)), settings, worker=noting(prompts, notes), workers=2, rows=4, cpus=1
    )
    job = threading.Thread(target=prompts.write, args=(answers, str(tmp_path / "out"), "parquet"))
    job.start()
    until(lambda: len(set(pids(notes, "began"))) == 2 and pids(notes, "ended"))
    killed = pids(notes, "ended")[0]  # it has answered a batch, and is in the next one or gets it soon
    until(lambda: pids(notes, "began").count(killed) > pids(notes, "ended").count(killed))
    os.kill(killed, signal.SIGKILL)
    job.join(120)
    assert not job.is_alive()
    assert len(set(pids(notes, "began"))) == 3  # two workers, and the one that replaced the killed one
    assert len(pids(notes, "began")) > len(rows) // 4  # a batch was begun twice
    out = prompts.read(str(tmp_path / "out"), "parquet").take_all()
    assert sorted(row["number"] for row in out) == list(range(40))
    for row in out:
        assert (row["prompt"], row["max_new_tokens"]) == tuple(
            rows[row["number"]][k] for k in ("prompt", "max_new_tokens")
        )
        if row["number"] in (7, 9):
            assert row["text"] is None and row["error"] and row["finish_reason"] == "error"
            continue
        alone = llm.generate(row["prompt"], max_new_tokens=row["max_new_tokens"], temperature=0.0, kv_cache=H2O)
        assert (row["text"], row["error"]) == (alone, None)
        assert row["new_tokens"] == llm.stats.new_tokens and row["prompt_tokens"] == llm.stats.prompt_tokens
    with pytest.raises(ValueError, match="exists"):
        prompts.write(answers, str(tmp_path / "out"), "parquet")


def commands() -> dict[str, list[str]]:
    """The commands of the README, by the script: their arguments."""
    text = (ROOT / "extensions" / "ray" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.startswith("python extensions/ray/")]
    return {Path(script).stem: arguments for _, script, *arguments in lines}


def test_the_command_of_the_readme(
    cluster: None, prompts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(
        '{"prompt": "def a("}\n{"prompt": "def b(", "kind": "short", "max_new_tokens": 2}\n'
    )
    monkeypatch.setattr(sys, "argv", ["answer_prompts.py", *commands()["answer_prompts"]])
    auto_cli(prompts.main)
    rows = sorted(prompts.read("answers", "jsonl").take_all(), key=lambda row: row["prompt"])
    assert [(row["kind"], row["new_tokens"], row["error"]) for row in rows] == [(None, 40, None), ("short", 2, None)]
    captured = capsys.readouterr()
    assert "The answers are in answers." in captured.out and "warning" not in captured.err


def test_the_command_of_the_readme_for_an_endpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["deployment.py", *commands()["deployment"], "--print_config"])
    with pytest.raises(SystemExit) as ended:
        auto_cli(loaded("deployment").main)
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["replicas"], config["settings"]["port"]) == (2, 8000)
    assert (config["kv_cache"]["strategy"], config["kv_cache"]["budget"]) == ("h2o", "25%")


def test_settings_that_cannot_be(prompts: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"A budget in percent needs max_tokens.*'25%'"):
        prompts.Settings("demo", KVCacheArgs("h2o", budget="25%"))
    with pytest.raises(ValueError, match="say which with --format"):
        prompts.read("folder")


# -- Ray Serve ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(cluster: None) -> Iterator[str]:
    deployment = loaded("deployment")
    from litgpt_kv.serve.settings import ServeArgs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deployment.serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = ServeArgs(rows=2, queue=64)
    options = dict(replicas=2, cpus=1, accelerator="cpu", precision="64-true")
    deployment.serve.run(deployment.application("demo", {"h2o": H2O, "dense": KVCacheArgs()}, settings, **options))
    yield f"http://127.0.0.1:{port}"
    deployment.serve.shutdown()


def replicas() -> set[str]:
    names = (actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    return {name for name in names if name.startswith("SERVE_REPLICA") and "litgpt_kv" in name}


def test_the_endpoints_are_those_of_the_server(url: str, llm: LLM) -> None:
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    assert httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] == "demo"
    body = {"prompt": "def fib(", "max_tokens": 12, "temperature": 0}
    for name, cache in (("h2o", H2O), ("dense", KVCacheArgs())):
        answer = httpx.post(f"{url}/v1/completions", json={**body, "kv_cache": name}, timeout=60).json()
        alone = llm.generate("def fib(", max_new_tokens=12, temperature=0.0, kv_cache=cache)
        assert answer["choices"][0]["text"] == alone and answer["usage"]["kv"]["cache"] == name
    pieces = httpx.post(f"{url}/v1/completions", json={**body, "stream": True}, timeout=60).text.split("\n\n")
    assert pieces[-2:] == ["data: [DONE]", ""] and len(pieces) > 10
    refused = httpx.post(f"{url}/v1/completions", json={**body, "temperature": -1}, timeout=60)
    assert refused.status_code == 400 and "temperature" in refused.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/models", headers={"Host": "other.example"}, timeout=60).status_code == 403


def test_a_client_that_leaves_frees_its_row(url: str) -> None:
    body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True, "kv_cache": "dense"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_bytes())
    aborted = 'answers_total{reason="abort"} 1.0'
    until(lambda: aborted in httpx.get(f"{url}/metrics", timeout=60).text, 10)  # of one replica or the other


def test_a_replica_that_dies_is_replaced_and_every_request_can_be_answered(url: str, llm: LLM) -> None:
    before, ended, failed = replicas(), [], []
    assert len(before) == 2

    def ask(number: int) -> str:
        body = {"prompt": f"class C{number}:", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
        for _ in range(60):
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
                if answer.status_code == 200:
                    ended.append(number)
                    return answer.json()["choices"][0]["text"]
            failed.append(number)
            time.sleep(0.5)
        raise AssertionError(f"request {number} was never answered")

    with ThreadPoolExecutor(12) as pool:
        texts = [pool.submit(ask, number) for number in range(24)]
        until(lambda: len(ended) >= 2)
        ray.kill(ray.get_actor(sorted(before)[0], namespace="serve"), no_restart=True)
        answers = [text.result() for text in texts]
    alone = [f"class C{number}:" for number in range(24)]
    options = dict(max_new_tokens=300, ignore_eos=True, temperature=0.0, kv_cache=H2O)
    assert answers == llm.generate(alone, **options)
    assert sorted(ended) == list(range(24))
    assert failed  # those that the dead replica was answering
    after = until(lambda: len(replicas()) == 2 and replicas())
    assert len(after & before) == 1


def test_a_file_of_code_is_not_imported_as_yaml_may_name_it() -> None:
    for name, places in (("answer_prompts", ["demo", "a.jsonl", "b.jsonl"]), ("deployment", ["demo"])):
        with pytest.raises(ValueError, match=r"Unknown strategy 'mine\.py:Mine'"):
            auto_cli(loaded(name).main, args=[*places, "--kv_cache.strategy", "mine.py:Mine"])
