"""Starting commands that start processes, and looking at what they do; for the tests of this folder."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[2]
GENERATE = ["-m", "litgpt_kv", "generate", "demo", "--accelerator", "cpu"]
ENDLESS = ["--kv-cache", "sink", "--kv-cache.budget", "32", "--max-new-tokens", "1000000", "--ignore-eos"]
TWO = ["--devices", "2", "--generate-strategy", "tensor_parallel"]
silence = pytest.mark.xdist_group("silence")  # tests that mostly wait: beside the others that start processes
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def environment() -> dict[str, str]:
    """What a launch needs, and nothing of a launch around it."""
    own = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


@contextlib.contextmanager
def started(*command: str, **variables: str) -> Iterator[subprocess.Popen]:
    """A launch in a session of its own, which is gone afterwards whatever happened.

    All its processes have their imports from `tests.warm`; with the variable `warm.FULL` its workers import themselves.
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = warm.Popen([sys.executable, *command], env=environment() | variables, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        for pid in (*(children(process.pid) if sys.platform.startswith("linux") else ()), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a worker that outlives its launcher holds the pipes
            process.communicate(timeout=30)


def finished(*command: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a launch."""
    with started(*command, **variables) as process:
        out, err = process.communicate(timeout=500)
        return process.returncode, out, err


def together(count: int, *command: str) -> tuple[int, str, str]:
    """The same of process 0, where so many processes of a run are started from outside, as torchrun starts them."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started(*command, LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
            for rank in range(count)
        ]
        (out, err), *others = [process.communicate(timeout=500) for process in processes]
        codes = [process.returncode for process in processes]
        assert codes == codes[:1] + [0] * (count - 1), (err, others)
        return codes[0], out, err


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def children(pid: int) -> list[int]:
    """The processes that a process has started, oldest first."""
    with contextlib.suppress(OSError):
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []


def wait_for_children(pid: int, count: int) -> list[int]:
    """The same, when there are so many."""
    until = time.monotonic() + 240
    while len(found := children(pid)) < count and time.monotonic() < until:
        time.sleep(0.05)
    assert len(found) == count
    return found


def wait_until_gone(pids: list[int], seconds: float) -> float:
    """Waits for processes to end, and says how long it took."""
    began = time.monotonic()
    while any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
        assert time.monotonic() - began < seconds, "processes are left"
        time.sleep(0.1)
    return time.monotonic() - began


def wait_for_line(process: subprocess.Popen, start: str) -> None:
    """Reads standard error up to a line that starts so."""
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(start):
            return
    raise AssertionError(f"no {start!r} in {''.join(seen)}")


def listening_addresses(pids: list[int]) -> list[str]:
    """The addresses on which processes accept connections, as /proc writes them: hexadecimal, in memory's order."""
    found = []
    for pid in pids:
        sockets = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(link))
        for table in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                waits = fields[3] == "0A" or table.startswith("udp")
                if waits and f"socket:[{fields[9]}]" in sockets:
                    found.append(fields[1].partition(":")[0])
    return found


def is_loopback(address: str) -> bool:
    """Whether an address of `listening_addresses` is 127.x.x.x, ::1 or ::ffff:127.x.x.x (little-endian machines)."""
    return address.endswith("7F") if len(address) == 8 else address in LOOPBACK6 or address.startswith(MAPPED)


LOOPBACK6 = ("00000000000000000000000001000000",)
MAPPED = "0000000000000000FFFF0000" + "0100007F"
