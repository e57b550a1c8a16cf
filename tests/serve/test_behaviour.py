"""A server under stress: clients that leave, full queues, wrong keys, large and slow bodies, failing steps."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.serve.server import Server
from tests.serve.conftest import serving

ROOT = Path(__file__).parents[2]
H2O = {"h2o": KVCacheArgs("h2o", budget=24)}


def engine_of(server: Server, name: str = "h2o"):
    return server.service.loop.served()[name][0]


def slow_down(server: Server, seconds: float) -> list[int]:
    """Make every step take at least so long; gives a list that grows by the busy rows at each step."""
    engine, busy = engine_of(server), []
    step = engine.step

    def slow():
        busy.append(sum(row is not None for row in engine.scheduler.rows))
        time.sleep(seconds)
        return step()

    engine.step = slow
    return busy


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.perf_counter() + seconds
    while not true():
        assert time.perf_counter() < end, "it did not happen in time"
        time.sleep(0.005)


def raw(server: Server, body: dict, path: str = "/v1/completions") -> socket.socket:
    """A socket on which a request was sent."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    connection.sendall(head + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_within_two_steps(llm: LLM, stream: bool) -> None:
    with serving(llm, H2O, rows=2) as server:
        busy = slow_down(server, 0.05)
        connection = raw(server, {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": stream})
        until(lambda: len(busy) > 3)
        connection.close()
        at = len(busy)
        until(lambda: server.service.loop.unfinished == 0)
        assert len(busy) - at <= 2
        assert engine_of(server).scheduler.rows == [None, None]
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "b", "max_tokens": 2}).status_code == 200


def test_one_that_waits_and_leaves_never_gets_a_row(llm: LLM) -> None:
    with serving(llm, H2O, rows=1) as server:
        slow_down(server, 0.02)
        first = raw(server, {"prompt": "a", "max_tokens": 900, "ignore_eos": True})
        until(lambda: engine_of(server).scheduler.rows[0] is not None)
        second = raw(server, {"prompt": "b", "max_tokens": 900, "ignore_eos": True})
        until(lambda: len(engine_of(server).scheduler.waiting) == 1)
        second.close()
        until(lambda: server.service.loop.unfinished == 1)
        assert not engine_of(server).scheduler.waiting
        first.close()


def test_a_full_queue_says_when_to_come_again(llm: LLM) -> None:
    with serving(llm, H2O, rows=1, queue=1) as server:
        slow_down(server, 0.02)
        held = [raw(server, {"prompt": "a", "max_tokens": 900, "ignore_eos": True}) for _ in range(2)]
        until(lambda: server.service.loop.unfinished == 2)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "b", "max_tokens": 2})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        for connection in held:
            connection.close()
        until(lambda: server.service.loop.unfinished == 0)
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "b", "max_tokens": 2}).status_code == 200
        many = httpx.post(f"{server.url}/v1/completions", json={"prompt": ["b"] * 3, "max_tokens": 2})
        assert many.status_code == 400 and "1 to 2 answers" in many.json()["error"]["message"]


def test_keys_hosts_and_origins(llm: LLM) -> None:
    with serving(llm, H2O, rows=1, api_key="secret") as server:
        for path in ("/v1/models", "/metrics", "/v1/cache"):
            assert httpx.get(server.url + path).status_code == 401
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer secres"}).status_code == 401
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="Wrong or no API key"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
        assert list(openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret").models.list())
    with serving(llm, H2O, rows=1) as server:
        url = f"{server.url}/v1/models"
        assert httpx.get(url, headers={"Origin": "http://evil.example"}).status_code == 403
        assert httpx.get(url, headers={"Origin": "http://["}).status_code == 403  # no URL
        assert httpx.get(url, headers={"Origin": server.url}).status_code == 200
        assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403


def test_large_and_slow_bodies(llm: LLM) -> None:
    with serving(llm, H2O, rows=1, max_body=1000, body_timeout=0.2) as server:
        url = f"{server.url}/v1/completions"
        assert httpx.post(url, content=b"x" * 1001).status_code == 413
        assert httpx.post(url, content=iter([b"x" * 600, b"x" * 600])).status_code == 413  # without a length
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n{{".encode())
            slow.settimeout(10)
            assert b" 408 " in slow.recv(100)
        assert httpx.post(url, json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_a_failing_step_fails_its_requests_and_the_server_goes_on(llm: LLM) -> None:
    with serving(llm, H2O, rows=2) as server:
        url = f"{server.url}/v1/completions"
        body = {"prompt": "def fib(", "max_tokens": 12, "temperature": 0}
        engine = engine_of(server)
        decode, calls = engine.runner.decode, []

        def fails(*args):
            calls.append(1)
            if len(calls) == 5:
                raise RuntimeError("secret detail")
            return decode(*args)

        engine.runner.decode = fails
        answer = httpx.post(url, json=body)
        assert answer.status_code == 500
        assert answer.json()["error"] == {
            "message": "A step of the model failed.",
            "type": "server_error",
            "param": None,
            "code": "server_error",
        }
        expected = llm.generate("def fib(", max_new_tokens=12, temperature=0.0, kv_cache=H2O["h2o"])
        assert httpx.post(url, json=body).json()["choices"][0]["text"] == expected
        calls.clear()
        lines = httpx.post(url, json={**body, "stream": True}).text.splitlines()
        assert any("A step of the model failed." in line for line in lines) and lines[-2] != "data: [DONE]"
        assert httpx.post(url, json=body).json()["choices"][0]["text"] == expected
        assert "litgpt_kv_failed_steps_total 2.0" in httpx.get(f"{server.url}/metrics").text


def test_a_long_prompt_stalls_others_by_one_piece_at_most(llm: LLM) -> None:
    """While it is read, every step of the engine makes a token for the row that runs."""
    with serving(llm, {"dense": KVCacheArgs()}, rows=2, piece_size=64) as server:
        engine = engine_of(server, "dense")
        log: list[tuple[int, int]] = []
        step = engine.step

        def noting():
            reading, stats = engine.scheduler.reading[:1], engine.stats
            before = (reading[0].read if reading else 0), stats.new_tokens
            outputs = step()
            log.append(((reading[0].read if reading else 0) - before[0], stats.new_tokens - before[1]))
            return outputs

        engine.step = noting
        running = raw(server, {"prompt": "a", "max_tokens": 900, "ignore_eos": True})
        until(lambda: len(log) > 5)
        body = {"prompt": [5] * 700, "max_tokens": 2, "temperature": 0}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200
        running.close()
    pieces = [(read, made) for read, made in log if read > 1]
    assert len(pieces) >= 10 and max(read for read, _ in pieces) <= 64
    assert all(made >= 1 for _, made in pieces)


def test_metrics_and_the_view_of_the_cache(llm: LLM) -> None:
    with serving(llm, H2O, rows=2) as server:
        slow_down(server, 0.02)
        with httpx.stream(
            "POST",
            f"{server.url}/v1/completions",
            json={"prompt": [5] * 40, "max_tokens": 900, "ignore_eos": True, "stream": True},
        ) as answer:
            lines = answer.iter_lines()
            id = json.loads(next(lines)[6:])["id"]
            found = httpx.get(f"{server.url}/v1/cache", params={"request": id, "texts": True}).json()
            text = httpx.get(f"{server.url}/metrics").text
        assert found["caches"][0]["name"] == "h2o" and found["caches"][0]["busy"] == 1
        row = found["row"]
        assert len(row["shares"]) == len(row["texts"]) == row["seen"] >= 40 and row["kept"] == 24
        assert sum(row["shares"]) == pytest.approx(24, abs=0.1) and max(row["shares"]) == 1.0
        assert 'litgpt_kv_rows_busy{cache="h2o"} 1.0' in text and 'litgpt_kv_kept_tokens{cache="h2o"} 24.0' in text
        for name in (
            "time_to_first_token_seconds_bucket",
            "time_between_tokens_seconds_count",
            "prompt_tokens_total 40",
        ):
            assert f"litgpt_kv_{name}" in text
        until(lambda: server.service.loop.unfinished == 0)
        assert httpx.get(f"{server.url}/v1/cache", params={"request": id}).status_code == 404
        wrong = httpx.get(f"{server.url}/v1/cache", params={"texts": "maybe"})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "texts"


def test_one_line_of_log_a_request_and_no_text(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="litgpt_kv.serve")
    with serving(llm, H2O, rows=1) as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "confidential", "max_tokens": 2})
        httpx.post(f"{server.url}/v1/completions?confidential", content=b"confidential")
    lines = [record.getMessage() for record in caplog.records if record.name == "litgpt_kv.serve"]
    assert len(lines) == 2 and not any("confidential" in line for line in lines)
    assert "POST /v1/completions 200" in lines[0] and "made=2" in lines[0]


def test_sigterm_ends_what_runs_and_refuses_what_is_new() -> None:
    """Answers that end within `--drain` seconds do; one that does not is told so. The exit code is 0."""
    command = [sys.executable, "-m", "litgpt_kv", "serve", "demo", "--port", "0", "--rows", "2", "--drain", "4"]
    command += ["--kv-cache", "window", "--kv-cache.budget", "64", "--kv-cache.positions", "cache"]  # without an end
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        url = next(line.split()[2].rstrip(",") for line in process.stderr if line.startswith("Listening"))
        body = {"prompt": "a", "ignore_eos": True, "stream": True}
        with (
            httpx.stream("POST", f"{url}/v1/completions", json={**body, "max_tokens": 50_000}, timeout=60) as long,
            httpx.stream("POST", f"{url}/v1/completions", json={**body, "max_tokens": 60}, timeout=60) as short,
        ):
            first, second = long.iter_lines(), short.iter_lines()
            next(first), next(second)
            process.send_signal(signal.SIGTERM)
            until(lambda: refuses(url))
            assert [line for line in second if line][-1] == "data: [DONE]"
            assert "The server is ending." in [line for line in first if line][-1]
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def refuses(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 503
    except httpx.TransportError:  # refused, or reset if it still was in the queue of the socket
        return True
