"""Keep a server under random load for a while: `python tests/soak_serve.py --minutes 20`; not part of the suite.

Clients ask for answers of random lengths and settings, some leave in the middle, some send nonsense. It fails for an
answer that is not that of the prompt alone, an error that no client caused, a traceback in the log, a request that
hangs, rows that stay busy, or memory that grows.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # not this folder, whose `inspect` would stand for Python's

import httpx  # noqa: E402

from litgpt_kv import LLM, KVCacheArgs  # noqa: E402
from tests.serve.test_load import TEXTS, leave, malformed, random_body  # noqa: E402

CACHES = {"h2o": KVCacheArgs("h2o", budget=48), "window": KVCacheArgs("window", budget=32), "dense": KVCacheArgs()}
GROWTH = 1.10  # of resident memory between the first fifth, when everything was used once, and the end


class Target:
    """What `leave` needs of a server: its URL."""

    def __init__(self, url: str) -> None:
        self.url = url


def client(number: int, target: Target, end: float, counts: dict[str, int], wrong: list[str], kept: list) -> None:
    rng, lock_free = random.Random(number), f"client {number}"
    with httpx.Client(timeout=120) as http:
        while time.monotonic() < end and not wrong:
            body, kind = random_body(rng, list(CACHES)), rng.random()
            try:
                if kind < 0.2:
                    leave(target, body, rng.random() / 5)
                    counts["left"] += 1
                    continue
                if kind < 0.35:
                    status = http.post(f"{target.url}/v1/completions", content=malformed(rng)).status_code
                    counts["malformed"] += 1
                    if not 400 <= status < 500:
                        wrong.append(f"malformed: {status}")
                    continue
                if kind < 0.45:
                    talk = [{"role": "user", "content": rng.choice(TEXTS)}]
                    about = {"messages": talk, "conversation": f"c{rng.randrange(50)}", "max_tokens": 20}
                    answer = http.post(f"{target.url}/v1/chat/completions", json=about)
                else:
                    answer = http.post(f"{target.url}/v1/completions", json=body)
                counts[str(answer.status_code)] = counts.get(str(answer.status_code), 0) + 1
                if answer.status_code not in (200, 429):
                    wrong.append(f"{answer.status_code}: {answer.text[:200]}")
                elif kind >= 0.45 and answer.status_code == 200 and len(kept) < 400 and rng.random() < 0.05:
                    kept.append((body, answer.json()["choices"][0]["text"]))
            except httpx.HTTPError as error:
                wrong.append(f"{lock_free}: {type(error).__name__} {error}")


def resident(pid: int) -> float:
    """MB of a process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=12)
    given = parser.parse_args()
    more = {name: {"strategy": a.strategy, "budget": a.budget} for name, a in CACHES.items() if name != "h2o"}
    command = [sys.executable, "-m", "litgpt_kv", "serve", "demo", "--port", "0", "--rows", "4", "--queue", "16"]
    command += ["--kv-cache", "h2o", "--kv-cache.budget", "48", "--caches", json.dumps(more), "--precision", "64-true"]
    command += ["--conversation-bytes", "2000000"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, cwd=ROOT)
        try:
            return load_and_judge(process, log, given.minutes, given.clients)
        finally:
            process.kill()
            process.wait()


def load_and_judge(process: subprocess.Popen, log, minutes: float, clients: int) -> int:
    url = None
    while url is None:
        time.sleep(0.2)
        log.seek(0)
        found = re.search(r"Listening on (\S+),", log.read())
        url = found and found[1]
        if process.poll() is not None:
            print("The server did not start.")
            return 1
    began, end = time.monotonic(), time.monotonic() + minutes * 60
    counts, wrong, kept, memory = {"left": 0, "malformed": 0}, [], [], []
    threads = [
        threading.Thread(target=client, args=(n, Target(url), end, counts, wrong, kept), daemon=True)
        for n in range(clients)
    ]
    for thread in threads:
        thread.start()
    while time.monotonic() < end and not wrong:
        time.sleep(min(5, max(0.1, end - time.monotonic())))
        memory.append(resident(process.pid))
    for thread in threads:
        thread.join(150)
    wrong += ["a client hangs"] if any(thread.is_alive() for thread in threads) else []
    time.sleep(2)
    for about in httpx.get(f"{url}/v1/cache").json()["caches"]:
        wrong += [f"rows of {about['name']} stay busy"] if about["busy"] or about["waiting"] else []
    llm = LLM.load("demo", accelerator="cpu", precision="64-true")
    for body, text in kept:
        settings = {k: v for k, v in body.items() if k not in ("prompt", "max_tokens", "kv_cache")}
        cache = CACHES[body["kv_cache"]]
        expected = llm.generate(body["prompt"], max_new_tokens=body["max_tokens"], kv_cache=cache, **settings)
        wrong += [f"another answer: {body}"] if text != expected else []
    warm = memory[len(memory) // 5 :]
    if len(warm) > 2 and max(warm[-3:]) > GROWTH * max(warm[:3]):
        wrong.append(f"memory grew from {warm[0]:.0f} to {warm[-1]:.0f} MB")
    process.terminate()
    code = process.wait(60)
    wrong += [f"exit code {code}"] if code else []
    log.seek(0)
    text = log.read()
    wrong += ["a traceback in the log"] if "Traceback" in text else []
    print(f"{time.monotonic() - began:.0f} s, {counts}, {len(kept)} answers compared")
    print(f"memory MB: {', '.join(f'{m:.0f}' for m in memory[:: max(1, len(memory) // 12)])}")
    print("\n".join(wrong[:20]) or "nothing broke")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
