"""A stranger on the network: what a run of several processes listens on is looked at, and talked to."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from tests.attack.harness import Case

ROOT = Path(__file__).parents[2]
STRATEGIES = ("tensor_parallel", "data_parallel")
LINES = [{"prompt": f"def f{n}(x):", "max_new_tokens": 150, "min_new_tokens": 150} for n in range(8)]
SECONDS = 75.0
ESCAPE = "\x1b[31mhacked\x1b[0m"


def command(folder: Path, strategy: str, out: str) -> list[str]:
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    words = [sys.executable, "-m", "litgpt_kv", "generate", "demo", "--accelerator", "cpu", "--temperature", "0"]
    words += ["--prompts", str(folder / "q.jsonl"), "--out", str(folder / out), "--batch-size", "4"]
    return words if strategy == "none" else [*words, "--devices", "2", "--generate-strategy", strategy]


def processes(root: int) -> list[int]:
    """A process and all that it started."""
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def listening(pids: list[int]) -> dict[tuple[str, int], int]:
    """Addresses on which processes listen."""
    sockets = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                address, _, port = fields[1].partition(":")
                words = struct.unpack(f"={len(address) // 8}I", bytes.fromhex(address))
                host = socket.inet_ntop(family, struct.pack(f">{len(words)}I", *words))
                sockets[fields[9]] = host, int(port, 16)
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inode = os.readlink(link).removeprefix("socket:[").removesuffix("]")
                    if inode in sockets:
                        found[sockets[inode]] = pid
    return found


def talk(host: str, port: int, rng: random.Random) -> None:
    """Say what may hurt: noise, half a message, a store's commands that report a failure."""
    home = "127.0.0.1" if "." in host or host == "::" else "::1"
    noise = (rng.randbytes(1000), b"\0" * 64, b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 8, ESCAPE.encode(), b"")
    for data in noise:
        with contextlib.suppress(OSError), socket.create_connection((home, port), timeout=1) as connection:
            connection.sendall(data)
    with contextlib.suppress(Exception):
        store = TCPStore(home, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))
        for rank in range(4):
            for key in (f"end/{rank}", f"failed/{rank}", f"litgpt_kv/failed/{rank}", f"litgpt_kv/end/{rank}"):
                store.set(key, ESCAPE)
        for n in range(1000):
            store.set(f"noise/{n}", "x" * 100)


def case(strategy: str, seed: int) -> Case:
    def act(folder: Path) -> None:
        rng = random.Random(seed)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        options = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, text=True)
        subprocess.run(command(folder, "none", "alone"), **options, check=True, stderr=subprocess.DEVNULL)
        wide, talked, until = set(), set(), time.monotonic() + SECONDS
        with (folder / "said").open("w") as said:
            run = subprocess.Popen(command(folder, strategy, "out"), **options, stdout=said, stderr=said)
            while run.poll() is None and time.monotonic() < until:
                for host, port in listening(processes(run.pid)):
                    if not ipaddress.ip_address(host).is_loopback:
                        wide.add(f"{host}:{port}")
                    if (host, port) not in talked:
                        talked.add((host, port))
                        talk(host, port, rng)
                time.sleep(0.02)
            if run.poll() is None:
                for pid in processes(run.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise SystemExit("the run hung")
        words = (folder / "said").read_text()
        print(words, file=sys.stderr)
        if run.returncode:
            raise SystemExit(f"the run ended with code {run.returncode}")
        if answers(folder / "out") != answers(folder / "alone"):
            raise SystemExit("the answers are others than those of a run that nobody disturbed")
        if wide:
            raise SystemExit(f"it listens beyond this machine: {', '.join(sorted(wide))}")

    return Case(f"{strategy}, seed {seed}", act, codes=(0,))


def answers(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in path.open()]


def killed(strategy: str, victim: Callable[[list[int]], int], what: str, seconds: float) -> Case:
    """A process of a run is killed; no other one stays."""

    def act(folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (folder / "said").open("w") as said:
            run = subprocess.Popen(
                command(folder, strategy, "out"), cwd=folder, env=environment, stdout=said, stderr=said
            )
        time.sleep(seconds)
        family = processes(run.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim(family), signal.SIGKILL)
        until = time.monotonic() + 40
        while (left := [pid for pid in family if alive(pid)]) and time.monotonic() < until:
            run.poll()
            time.sleep(0.05)
        if left:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"{len(left)} of {len(family)} processes stay")

    return Case(f"{strategy}, {what} killed after {seconds} s", act, codes=(0,))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cases(seed: int) -> Iterator[Case]:
    for strategy in STRATEGIES:
        yield case(strategy, seed)
        for seconds in (2.0, 5.0, 9.0):
            yield killed(strategy, lambda family: family[0], "the first process", seconds)
            yield killed(strategy, lambda family: family[-1], "the last process", seconds)
