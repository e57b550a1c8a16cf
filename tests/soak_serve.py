"""Keep a server under random load for a while: `python tests/soak_serve.py --minutes 20`; not part of the suite.

Clients ask for answers of random lengths and settings, some are killed at a random moment, some send nonsense. It
fails for an answer that is not that of the prompt alone, nonsense that does not get a 4xx, an error that no client
caused, a traceback in the log, a request that hangs, rows that stay busy, or memory, threads or open files that grow.

`python tests/soak_serve.py --answers 200 --seed 6` instead asks for so many answers at once, with every registered
strategy and some storages, in one process: each must be that of its prompt alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of this folder, whose `inspect` would hide Python's

import httpx  # noqa: E402

from litgpt_kv import LLM, KVCacheArgs  # noqa: E402
from tests.oracle.strategies import NAMES, options_of  # noqa: E402
from tests.serve.test_load import TEXTS, check_random_requests, malformed, random_body  # noqa: E402

CACHES = {"h2o": KVCacheArgs("h2o", budget=48), "window": KVCacheArgs("window", budget=32), "dense": KVCacheArgs()}
GROWTH = 1.10  # of resident memory between the first fifth, when everything was used once, and the end
MOST_BODY, BODY_SECONDS = 50_000, 1  # of the server
KEPT = 300  # answers that are compared, of all
ABRUPT = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, as when a client's machine dies


class Load:
    """Clients of a server.

    Attributes:
        counts: What happened how often. wrong: What must not. kept: A random choice of bodies and the texts they got.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.end = url, time.monotonic() + seconds
        self.host, self.port = url.removeprefix("http://").split(":")
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.kept: list[tuple[dict, str]] = []
        self._lock = threading.Lock()

    @property
    def is_on(self) -> bool:
        return time.monotonic() < self.end and not self.wrong

    def client(self, number: int) -> None:
        """One client after the other, until the time is over."""
        rng = random.Random(number)
        with httpx.Client(timeout=120) as http:
            while self.is_on:
                kind = rng.random()
                try:
                    if kind < 0.2:
                        self.killed(rng)
                    elif kind < 0.35:
                        self.nonsense(rng, http)
                    elif kind < 0.45:
                        self.turn(rng, http)
                    else:
                        self.completion(rng, http)
                except (httpx.HTTPError, OSError) as error:
                    self.wrong.append(f"client {number}: {type(error).__name__} {error}")

    def count(self, what: str) -> int:
        with self._lock:
            self.counts[what] += 1
            return self.counts[what]

    def completion(self, rng: random.Random, http: httpx.Client) -> None:
        """An answer, of which some are compared at the end: each of all with the same chance."""
        body = random_body(rng, list(CACHES))
        answer = http.post(f"{self.url}/v1/completions", json=body)
        if not self.is_answer(answer):
            return
        number = self.count("answers")
        at = number - 1 if number <= KEPT else rng.randrange(number)
        with self._lock:
            pair = body, answer.json()["choices"][0]["text"]
            if at >= len(self.kept) < KEPT:
                self.kept.append(pair)
            elif at < KEPT:
                self.kept[at] = pair

    def turn(self, rng: random.Random, http: httpx.Client) -> None:
        """A turn of a conversation, which others may have begun with other words."""
        talk = [{"role": "user", "content": rng.choice(TEXTS)}]
        body = {"messages": talk, "conversation": f"c{rng.randrange(50)}", "max_tokens": 20}
        url = f"{self.url}/v1/chat/completions"
        answer = http.post(url, json=body)
        for _ in range(rng.randrange(3)):
            if not self.is_answer(answer):
                return
            self.count("turns")
            talk += [answer.json()["choices"][0]["message"], {"role": "user", "content": rng.choice(TEXTS)}]
            answer = http.post(url, json={**body, "messages": talk})
        self.is_answer(answer)

    def is_answer(self, answer: httpx.Response) -> bool:
        if answer.status_code == 429:
            self.count("queue full")
            if int(answer.headers.get("retry-after", 0)) < 1:
                self.wrong.append("429 without Retry-After")
        elif answer.status_code != 200:
            self.wrong.append(f"{answer.status_code}: {answer.text[:200]}")
        return answer.status_code == 200

    def killed(self, rng: random.Random) -> None:
        """Ask, and be gone: while the body is sent, before the answer or in its middle, with a reset or without."""
        body = {**random_body(rng, list(CACHES)), "max_tokens": 500, "stream": rng.random() < 0.7}
        data = json.dumps(body).encode()
        part = data if rng.random() < 0.8 else data[: rng.randrange(len(data))]
        with self.connection() as connection:
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABRUPT)
            connection.sendall(self.head(len(data)) + part)
            time.sleep(rng.random() / 2)
        self.count("killed")

    def nonsense(self, rng: random.Random, http: httpx.Client) -> None:
        """Something that must get a 4xx."""
        kinds: dict[str, Callable[[], int]] = {
            "wrong body": lambda: self.posted(http, rng.choice(PATHS), malformed(rng)),
            "large body": lambda: self.posted(
                http, rng.choice(PATHS), b'"' + b"x" * rng.randrange(MOST_BODY, 3 * MOST_BODY)
            ),
            "large body in parts": lambda: self.posted(http, rng.choice(PATHS), iter([b"x" * MOST_BODY] * 2)),
            "slow body": lambda: self.raw(self.head(99) + b'{"prompt": '),
            "no HTTP": lambda: self.raw(rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n"),
            "wrong length": lambda: self.raw(self.head(rng.choice(["-1", "x", "1e9", "9" * 30]))),
            "unknown path": lambda: self.posted(http, f"/{rng.random()}", b"{}"),
            "wrong method": lambda: (
                http.request(rng.choice(["PUT", "DELETE"]), self.url + rng.choice(PATHS)).status_code
            ),
            "wrong query": lambda: http.get(f"{self.url}/v1/cache?request={rng.random()}").status_code,
            "another model": lambda: http.get(f"{self.url}/v1/models/{rng.random()}").status_code,
        }
        kind = rng.choice(list(kinds)) if rng.random() < 0.6 else "wrong body"
        status = kinds[kind]()
        self.count(f"{kind} {status}")
        self.count("nonsense")
        if not 400 <= status < 500:
            self.wrong.append(f"{kind}: {status}")

    def posted(self, http: httpx.Client, path: str, content: Any) -> int:
        return http.post(self.url + path, content=content).status_code

    def raw(self, data: bytes) -> int:
        """The status that some bytes get."""
        with self.connection() as connection:
            connection.sendall(data)
            connection.settimeout(120)
            found = connection.recv(100).split()
        return int(found[1]) if len(found) > 1 else 0

    def connection(self) -> socket.socket:
        return socket.create_connection((self.host, int(self.port)), timeout=120)

    def head(self, length: int | str) -> bytes:
        return f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {length}\r\n\r\n".encode()


PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


def state_of(pid: int) -> tuple[float, int, int]:
    """MB, threads and open files of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = [int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("VmRSS", "Threads")]  # type: ignore[index]
    return found[0] / 1024, found[1], len(os.listdir(f"/proc/{pid}/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--answers", type=int, default=None)
    parser.add_argument("--seed", type=int, default=5)
    given = parser.parse_args()
    if given.answers is not None:
        return all_strategies(given.answers, given.seed)
    more = {name: {"strategy": a.strategy, "budget": a.budget} for name, a in CACHES.items() if name != "h2o"}
    command = [sys.executable, "-m", "litgpt_kv", "serve", "demo", "--port", "0", "--rows", "4", "--queue", "16"]
    command += ["--kv-cache", "h2o", "--kv-cache.budget", "48", "--caches", json.dumps(more), "--precision", "64-true"]
    command += ["--conversation-bytes", "2000000", "--max-body", str(MOST_BODY), "--body-timeout", str(BODY_SECONDS)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, cwd=ROOT)
        try:
            return load_and_judge(process, log, given.minutes, given.clients)
        finally:
            process.kill()
            process.wait()


def all_strategies(answers: int, seed: int) -> int:
    """Random requests with every registered strategy, and some storages and ways to select."""
    llm = LLM.load("demo", accelerator="cpu", precision="64-true")
    caches = {
        name: KVCacheArgs(name, budget=None if name == "dense" else 24, options=options_of(name, llm.model.config))
        for name in NAMES
    }
    caches |= {f"h2o {name}": KVCacheArgs("h2o", budget=24, storage=name) for name in ("int8", "int4")}
    caches |= {f"h2o {name}": KVCacheArgs("h2o", budget=24, select=name) for name in ("layer", "pool")}
    began = time.monotonic()
    check_random_requests(llm, caches, seed, answers, leaving=answers // 3)
    seconds = time.monotonic() - began
    print(f"{answers} answers with {', '.join(caches)}: each is that of its prompt alone; {seconds:.0f} s")
    return 0


def load_and_judge(process: subprocess.Popen, log: IO[str], minutes: float, clients: int) -> int:
    url = None
    while url is None:
        time.sleep(0.2)
        log.seek(0)
        found = re.search(r"Listening on (\S+),", log.read())
        url = found and found[1]
        if process.poll() is not None:
            print("The server did not start.")
            return 1
    began, load, states = time.monotonic(), Load(url, minutes * 60), []
    threads = [threading.Thread(target=load.client, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    told = began
    while load.is_on:
        time.sleep(min(5, max(0.1, load.end - time.monotonic())))
        states.append(state_of(process.pid))
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(f"{told - began:.0f} s, {states[-1][0]:.0f} MB, {dict(load.counts)}", flush=True)
    for thread in threads:
        thread.join(150)
    wrong = [*load.wrong, *(["a client hangs"] if any(thread.is_alive() for thread in threads) else [])]
    time.sleep(BODY_SECONDS + 2)
    for about in httpx.get(f"{url}/v1/cache").json()["caches"]:
        wrong += [f"rows of {about['name']} stay busy"] if about["busy"] or about["waiting"] else []
    metrics = httpx.get(f"{url}/metrics").text
    faults = r'^litgpt_kv_(?:requests_total.*status="5.*|failed_steps_total [^0].*)$'
    wrong += re.findall(faults, metrics, re.M)
    wrong += growth(states)
    llm = LLM.load("demo", accelerator="cpu", precision="64-true")
    for body, text in load.kept:
        settings = {k: v for k, v in body.items() if k not in ("prompt", "max_tokens", "kv_cache")}
        cache = CACHES[body["kv_cache"]]
        expected = llm.generate(body["prompt"], max_new_tokens=body["max_tokens"], kv_cache=cache, **settings)
        wrong += [f"another answer: {body}"] if text != expected else []
    process.terminate()
    code = process.wait(60)
    wrong += [f"exit code {code}"] if code else []
    log.seek(0)
    faults = re.findall(r"^.*(?:Traceback|failed|could not|never awaited).*$", log.read(), re.M)
    wrong += [f"in the log: {line}" for line in faults[:5]]
    print(f"{time.monotonic() - began:.0f} s, {dict(sorted(load.counts.items()))}, {len(load.kept)} answers compared")
    shown = states[:: max(1, len(states) // 12)]
    print("MB, threads, open files: " + "; ".join(f"{mb:.0f} {count} {files}" for mb, count, files in shown))
    print("\n".join(wrong[:20]) or "nothing broke")
    return 1 if wrong else 0


def growth(states: list[tuple[float, int, int]]) -> list[str]:
    """What grew between the first fifth and the end."""
    warm = states[len(states) // 5 :]
    found = []
    for name, values, most in zip(
        ("memory (MB)", "threads", "open files"), zip(*warm), (GROWTH, 1.0, 1.0), strict=True
    ):
        third = max(3, len(values) // 3)
        before, after = max(values[:third]), max(values[-third:])
        slack = 0 if most > 1 else 10  # connections come and go
        if after > before * most + slack:
            found.append(f"{name} grew from {before:.0f} to {after:.0f}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
