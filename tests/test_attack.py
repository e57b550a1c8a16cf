"""The harness of `tests/attack.py` finds what it looks for."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attack import caches, calls, checkpoints, configs, harness, kills, options, resume, stranger
from tests.attack.harness import CANARY, Case, Process, command


def faults(case: Case, folder: Path) -> list[str]:
    process = Process(0, case, folder / "case")
    while not process.ended():
        time.sleep(0.01)
    return process.faults()


def ends(code: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        raise SystemExit(code)

    return act


def prints(text: str) -> Callable[[Path], None]:
    return lambda folder: print(text, file=sys.stderr)


def runs_code(folder: Path) -> None:
    Path(CANARY).touch()


def takes_memory(folder: Path) -> None:
    bytearray(100 * 2**30)


BROKEN = {
    "code ran": Case("", runs_code),
    "exit code 3": Case("", ends(3)),
    "exit code 139": Case("", ends(139)),
    "exit code -9": Case("", lambda folder: os.kill(os.getpid(), signal.SIGKILL)),
    "exit code 1": Case("", ends("wrong answers"), codes=(0,)),
    "MemoryError": Case("", takes_memory),
    "traceback": Case("", prints("Traceback (most recent call last):")),
    "escape codes": Case("", prints("\x1b[31m")),
    "hung": Case("", lambda folder: time.sleep(60)),
    "an answer is gone": Case("", ends(0), check=lambda folder, result: "an answer is gone"),
    "ZeroDivisionError": Case("", lambda folder: 1 / 0),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_breaks_is_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PATIENCE", 5.0 if what == "hung" else 60.0)
    (fault,) = faults(BROKEN[what], tmp_path)
    assert what in fault


def test_what_is_right_is_not_found(tmp_path: Path) -> None:
    assert faults(Case("", command("strategies")), tmp_path / "a") == []
    assert faults(Case("", command("generate", "nope")), tmp_path / "b") == []
    killed = Case("", lambda folder: time.sleep(60), kill=(signal.SIGKILL, 0.1))
    assert faults(killed, tmp_path / "c") == []


def test_there_are_as_many_cases_as_promised() -> None:
    tried = {
        module.__name__.rpartition(".")[2]: sum(case.tries for case in module.cases(15))
        for module in (caches, calls, checkpoints, configs, kills, options, resume, stranger)
    }
    assert tried["options"] == 600 and tried["calls"] == 800 and tried["kills"] >= 40
    assert tried["caches"] >= 2000 and tried["resume"] >= 300 and tried["configs"] >= 400
    assert tried["checkpoints"] >= 700 and tried["stranger"] >= 2
