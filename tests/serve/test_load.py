"""Many clients at once: each answer is that of its prompt alone, and bad requests disturb none."""

from __future__ import annotations

import gc
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.serve.server import Server
from tests.oracle.strategies import READY
from tests.serve.conftest import serving

TEXTS = ["def fib(n):\n", "import os, sys\n", "class A:\n    x = 1\n", "for i in range(10):\n    print(i)\n"]


def strategies() -> dict[str, KVCacheArgs]:
    """Every registered strategy that needs no options, with a small budget."""
    found = {}
    for name in READY:
        args = KVCacheArgs(name, budget=None if name == "dense" else 24)
        found[name] = args
    return found


def random_body(rng: random.Random, caches: list[str]) -> dict:
    text = "".join(rng.choice(TEXTS) for _ in range(rng.randint(1, 6)))
    body = {"prompt": text, "max_tokens": rng.randint(1, 30), "kv_cache": rng.choice(caches), "temperature": 0}
    if rng.random() < 0.5:
        body |= {"temperature": 0.8, "seed": rng.randrange(1000), "top_k": 30, "top_p": 0.95}
    if rng.random() < 0.3:
        body |= {"stop": [rng.choice(["\n", "self", ")"])]}
    if rng.random() < 0.3:
        body |= {"presence_penalty": 0.5, "repetition_penalty": 1.1}
    return body


def alone(llm: LLM, body: dict, caches: dict[str, KVCacheArgs]) -> str:
    settings = {k: v for k, v in body.items() if k not in ("prompt", "max_tokens", "kv_cache")}
    cache = caches[body["kv_cache"]]
    return llm.generate(body["prompt"], max_new_tokens=body["max_tokens"], kv_cache=cache, **settings)


def ask(server: Server, client: httpx.Client, body: dict, stream: bool) -> str:
    url = f"{server.url}/v1/completions"
    if not stream:
        answer = client.post(url, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]
    with client.stream("POST", url, json={**body, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def leave(server: Server, body: dict, after: float) -> None:
    """Ask for a long answer and close the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps({**body, "max_tokens": 500, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        time.sleep(after)


def check_random_requests(llm: LLM, caches: dict[str, KVCacheArgs], seed: int, answers: int, leaving: int) -> None:
    """Each answer is that of its prompt alone, those who leave free their rows, and no tensor stays."""
    rng = random.Random(seed)
    bodies = [random_body(rng, list(caches)) for _ in range(answers)]
    gone = [(random_body(rng, list(caches)), rng.random() / 20) for _ in range(leaving)]
    with serving(llm, caches, rows=4, queue=200) as server, httpx.Client(timeout=60) as client:
        first = {"prompt": TEXTS[3] * 2, "max_tokens": 2, "presence_penalty": 0.5, "repetition_penalty": 1.1}
        for name in caches:  # so that there is what is made on first use
            ask(server, client, {**first, "kv_cache": name}, stream=False)
        before = tensor_bytes()
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask, server, client, body, n % 2 == 0) for n, body in enumerate(bodies)]
            left = [pool.submit(leave, server, *each) for each in gone]
            got = [answer.result() for answer in asked]
            assert [each.result() for each in left] == [None] * len(gone)
        end = time.perf_counter() + 10
        while server.service.loop.unfinished:
            assert time.perf_counter() < end
            time.sleep(0.01)
        assert server.service.running == {}
        assert all(row is None for e, _, _ in server.service.loop.served().values() for row in e.scheduler.rows)
        assert abs(tensor_bytes() - before) < 10_000, "less than a row of any cache"
    for body, text in zip(bodies, got):
        assert text == alone(llm, body, caches), body


def tensor_bytes() -> int:
    """Memory of all tensors that live."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_random_concurrent_requests_equal_the_prompt_alone(llm: LLM) -> None:
    check_random_requests(llm, strategies(), seed=5, answers=60, leaving=20)


def malformed(rng: random.Random) -> bytes:
    """A body that must be refused."""
    good = {"prompt": "a", "max_tokens": 2}
    junk = [None, True, -1, 1e300, 2**70, "x", "\ud800", [], [[]], {}, {"a": []}, ["\x00", 1], [True], [[1.5]]]
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 60))) + b"\xff"
    if kind == 1:
        return json.dumps(good).encode()[: rng.randrange(1, 20)]
    if kind == 2:
        return b"[" * rng.choice([1, 100, 100_000])
    if kind == 3:
        return json.dumps({**good, f"unknown{rng.random()}": rng.choice(junk)}).encode()
    if kind == 4:
        return json.dumps(
            {**good, "prompt": rng.choice([-1, 1e300, {}, [], [[]], [-1], [2**70], [1.5], [True]])}
        ).encode()
    name = rng.choice(["max_tokens", "n", "temperature", "top_p", "seed", "stop", "stream", "kv_cache", "model"])
    wrong = {
        "temperature": [-1, "x", [], {}, 1e31, "1"],
        "stop": [1, {}, [1], [""], ""],
        "model": [1, "other"],
        "kv_cache": [1, "other"],
        "stream": ["x", 2],
    }
    return json.dumps({**good, name: rng.choice(wrong.get(name, [-1, "x", [], {}, 2**70, "1"]))}).encode()


def test_malformed_requests_get_4xx_and_disturb_nobody(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    rng, statuses = random.Random(3), []
    with serving(llm, {"h2o": KVCacheArgs("h2o", budget=24)}, rows=2) as server, httpx.Client(timeout=30) as client:
        body = {"prompt": TEXTS[0] * 4, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "kv_cache": "h2o"}
        running = ThreadPoolExecutor(1).submit(ask, server, client, body, True)
        for number in range(500):
            data = malformed(rng)
            path = (
                "/v1/completions" if number % 10 else rng.choice(["/v1/chat/completions", "/tokenize", "/detokenize"])
            )
            answer = client.post(server.url + path, content=data)
            statuses.append(answer.status_code)
            assert 400 <= answer.status_code < 500, (path, data[:200], answer.text)
            assert answer.json()["error"]["message"]
        assert running.result() == alone(llm, body, {"h2o": KVCacheArgs("h2o", budget=24)})
    assert len(statuses) == 500
    assert not [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info]


def test_raw_bytes_that_are_no_http(llm: LLM) -> None:
    with serving(llm, {"h2o": KVCacheArgs("h2o", budget=24)}, rows=1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for data in (b"\x00" * 100, b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(data)
                assert b" 400 " in connection.recv(200)[:20]
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_threads_and_memory_return(llm: LLM) -> None:
    before = threading.active_count()
    with serving(llm, {"h2o": KVCacheArgs("h2o", budget=24)}, rows=1) as server:
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    end = time.perf_counter() + 5
    while threading.active_count() > before and time.perf_counter() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before
