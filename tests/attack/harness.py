"""Run a case in a process of its own, and say what broke."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import litgpt_kv.__main__ as program

GOOD_CODES = (0, 1, 2, 130)
PATIENCE = 150.0  # seconds after which a case hangs; on a busy machine a run of several processes takes 60
MEMORY = 6 * 2**30  # bytes beyond what a fork begins with
SHOWN = 6  # broken cases of a family that are shown
FAULTS = "faults"
CANARY = "a-command-ran"  # the file that hostile input tries to make

torch.set_num_threads(1)
COMMANDS = dict(program.COMMANDS)  # imports them all, once: every case is a fork


@dataclass
class Result:
    """How a case ended: its exit code (negative: a signal; None: it hung), and all that it wrote."""

    code: int | None
    out: str
    err: str


@dataclass
class Case:
    """Something to try.

    Attributes:
        name: what is special about it.
        act: does it, in a folder of its own, as a command would; may raise SystemExit.
        check: what broke beyond what `faults` finds, or None; called in the parent.
        each: whether `act` writes what broke, a line each, to the file `FAULTS`.
        tries: how many things `act` tries.
        kill: a signal to send, and after how many seconds.
        codes: exit codes that are good.
    """

    name: str
    act: Callable[[Path], None]
    check: Callable[[Path, Result], str | None] = lambda folder, result: None
    each: bool = False
    tries: int = 1
    kill: tuple[signal.Signals, float] | None = None
    codes: Sequence[int] = GOOD_CODES


@dataclass
class Row:
    """A line of the table."""

    family: str
    tried: int = 0
    refused: int = 0
    broke: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Harness:
    """Runs cases, some at a time, and keeps the table."""

    def __init__(self, workers: int) -> None:
        self.workers, self.rows = max(1, workers), []
        self._folder = Path(tempfile.mkdtemp(prefix="attack-"))

    def run(self, family: str, cases: Sequence[Case]) -> None:
        row, began = Row(family), time.monotonic()
        running: list[Process] = []
        waiting = list(enumerate(cases))[::-1]
        while waiting or running:
            while waiting and len(running) < self.workers:
                number, case = waiting.pop()
                running.append(Process(number, case, self._folder / f"{family}-{number}"))
            for process in [p for p in running if p.ended()]:
                running.remove(process)
                row.tried += process.case.tries
                row.refused += process.result.code == 2
                where = f"{family}:{process.number} {process.case.name:.80}"
                row.broke += [f"{where}: {fault}" for fault in process.faults()]
                shutil.rmtree(process.folder, ignore_errors=True)
            time.sleep(0.005)
            if sys.stderr.isatty():
                print(f"\r{family}: {row.tried} tried, {len(row.broke)} broke ", end="", file=sys.stderr)
        row.seconds = time.monotonic() - began
        self.rows.append(row)
        print(f"{family}: {row.tried} tried, {len(row.broke)} broke, {row.seconds:.0f} s", file=sys.stderr, flush=True)

    def show(self, case: Case) -> None:
        process = Process(0, case, self._folder / "only")
        while not process.ended():
            time.sleep(0.01)
        print(f"{case.name}\n-- out\n{process.result.out}\n-- err\n{process.result.err}")
        print(f"-- exit code {process.result.code}; {process.faults() or 'nothing broke'}; {process.folder}")

    def report(self) -> int:
        """Print the table and what broke; return the exit code."""
        shutil.rmtree(self._folder, ignore_errors=True)
        print(f"{'family':<12} {'tried':>6} {'exit 2':>7} {'broke':>6} {'seconds':>8}")
        for row in self.rows:
            print(f"{row.family:<12} {row.tried:>6} {row.refused:>7} {len(row.broke):>6} {row.seconds:>8.0f}")
        for row in self.rows:
            for text in row.broke[:SHOWN]:
                print(f"\n{text}")
            if len(row.broke) > SHOWN:
                print(f"\n... and {len(row.broke) - SHOWN} more of {row.family}")
        return int(any(row.broke for row in self.rows))


class Process:
    """One running case."""

    def __init__(self, number: int, case: Case, folder: Path) -> None:
        self.number, self.case, self.folder = number, case, folder
        folder.mkdir(parents=True)
        self.result: Result | None = None
        self._began = time.monotonic()
        self._killed = False
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _act(case, folder)

    def ended(self) -> bool:
        seconds = time.monotonic() - self._began
        if self.case.kill is not None and not self._killed and seconds > self.case.kill[1]:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, self.case.kill[0])
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and seconds < PATIENCE:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # and what it started
        if pid == 0:
            os.waitpid(self.pid, 0)
        texts = ((self.folder / name).read_bytes().decode(errors="replace") for name in (".out", ".err"))
        self.result = Result(None if pid == 0 else os.waitstatus_to_exitcode(status), *texts)
        return True

    def faults(self) -> list[str]:
        """What broke."""
        written = self.folder / FAULTS
        found = written.read_text(errors="replace").splitlines() if self.case.each and written.exists() else []
        return [*found, *([fault] if (fault := self._fault()) else [])]

    def _fault(self) -> str | None:
        result, case = self.result, self.case
        last = " | ".join(result.err.splitlines()[-2:])[-300:]
        if (self.folder / CANARY).exists():
            return "code ran"
        if result.code is None:
            return f"hung for {PATIENCE:.0f} s: {last}"
        killed = case.kill is not None and result.code == -case.kill[0]
        if result.code not in case.codes and not killed:
            return f"exit code {result.code}: {last}"
        if "Traceback (most recent call last)" in result.err:
            return f"traceback: {last}"
        if any(c in result.err for c in "\x1b\x00"):
            return f"escape codes on standard error: {last!r}"
        if result.code == 2 and len(result.err) > 4000:
            return f"an error of {len(result.err):,} characters: {result.err[-100:]}"
        return case.check(self.folder, result)


def _act(case: Case, folder: Path) -> None:
    """The child's side; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for target, name in ((0, os.devnull), (1, ".out"), (2, ".err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), target)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(n), mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        random.seed(0)
        torch.manual_seed(0)
        case.act(folder)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def command(*words: object) -> Callable[[Path], None]:
    """The act of a command line; `{}` in a word is the case's folder."""
    return lambda folder: program.main([str(word).replace("{}", str(folder)) for word in words])


def flipped(data: bytes, rng: random.Random, first: int = 0, last: int | None = None) -> bytes:
    """Data of which one bit is another one, between two places."""
    damaged = bytearray(data)
    damaged[rng.randrange(first, len(data) if last is None else last)] ^= 1 << rng.randrange(8)
    return bytes(damaged)
