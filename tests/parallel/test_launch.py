"""Processes that are killed, stopped, or fail: the others end within 30 seconds and the user reads why, on one line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from litgpt_kv import LLM
from litgpt_kv.__main__ import main
from litgpt_kv.parallel import DeviceRequest
from litgpt_kv.parallel.heartbeat import FileMonitor
from litgpt_kv.parallel.launcher import LONGEST, one_line
from tests.parallel.processes import (
    ENDLESS,
    GENERATE,
    TWO,
    finished,
    free_port,
    is_loopback,
    linux,
    listening_addresses,
    silence,
    started,
    wait_for_children,
    wait_for_line,
    wait_until_gone,
)
from tests.warm import FULL

pytestmark = pytest.mark.xdist_group("parallel")
LIMIT = 30  # seconds
VICTIMS = ["launcher", "first", "second", pytest.param("stopped", marks=silence), "interrupt", "terminate"]


@linux
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_takes_the_others_along(victim: str, tmp_path: Path) -> None:
    full = {FULL: "1"} if victim == "interrupt" else {}
    with started(*GENERATE, *ENDLESS, *TWO, TMPDIR=str(tmp_path), **full) as process:
        wait_for_line(process, "Loaded")
        time.sleep(1.0)  # in the middle of decoding
        first, second = workers = wait_for_children(process.pid, 2)
        if victim == "second":  # asked once, as it is the same for all
            heard = listening_addresses([process.pid, *workers])
            assert heard and all(map(is_loopback, heard)), "only this machine can connect"
        pid, sent = {
            "launcher": (process.pid, signal.SIGKILL),
            "first": (first, signal.SIGKILL),
            "second": (second, signal.SIGKILL),
            "stopped": (second, signal.SIGSTOP),
            "interrupt": (process.pid, signal.SIGINT),  # as a terminal sends it: workers have sessions of their own
            "terminate": (process.pid, signal.SIGTERM),
        }[victim]
        os.kill(pid, sent)
        code = process.wait(timeout=LIMIT)
        took = wait_until_gone(workers, LIMIT)
        assert took < 10 or victim == "stopped"
        err = process.stderr.read()
        expected = {
            "launcher": (-9, ""),
            "first": (1, "litgpt_kv: error: process 0 of 2 ended with code -9.\n"),
            "second": (1, "litgpt_kv: error: process 1 of 2 ended with code -9.\n"),
            "stopped": (1, "litgpt_kv: error: process 1 of 2 has gone silent for 15 seconds.\n"),
            "interrupt": (130, "\n"),  # after the terminal's ^C
            "terminate": (143, ""),
        }
        assert (code, err) == expected[victim]
        assert list(tmp_path.iterdir()) == [], "the run's folder is removed"


@linux
@pytest.mark.parametrize("victim", ["launcher", "first"])
def test_a_process_killed_while_loading_leaves_none(victim: str) -> None:
    with started(*GENERATE, *ENDLESS, *TWO) as process:
        workers = wait_for_children(process.pid, 2)
        os.kill(process.pid if victim == "launcher" else workers[0], signal.SIGKILL)
        code = process.wait(timeout=LIMIT)
        wait_until_gone(workers, LIMIT)
        err = process.stderr.read()
        if victim == "launcher":
            assert code == -9
        else:
            assert code == 1 and "litgpt_kv: error: process 0 of 2 ended with code -9.\n" in err


SCRIPT = r"""
import time
from litgpt_kv import LLM
llm = LLM.load("demo", accelerator="cpu", distribute=None)
llm.distribute(accelerator="cpu", devices=2, generate_strategy="tensor_parallel")
text = llm.generate("def fib(", max_new_tokens=8, temperature=0.0)
if llm.fabric.is_global_zero:
    print(repr(text), flush=True)
if not llm.fabric.is_global_zero:
    raise RuntimeError("only here\n\x1b[31mred\x07" + 10_000 * "x")
time.sleep(600)
"""


def test_a_script_distributes_a_model_and_fails_as_a_whole(tmp_path: Path) -> None:
    """One that ends well, without a word about its processes, is in test_parallel_files.py."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    expected = LLM.load("demo", accelerator="cpu").generate("def fib(", max_new_tokens=8, temperature=0.0)
    code, out, err = finished(str(script), **{FULL: "1"})
    assert (code, out) == (1, repr(expected) + "\n"), err
    assert "RuntimeError: only here" in err, err  # Python's own traceback
    last = err.splitlines()[-1]
    assert last.startswith("litgpt_kv: error: process 1 of 2 ended: RuntimeError: only here [31mred xxx"), last
    assert last.isprintable() and len(last) < LONGEST + 100


def test_an_error_of_the_users_is_one_line_and_code_2() -> None:
    code, out, err = finished(*GENERATE, *TWO, "--max-new-tokens", "5000")
    assert (code, out) == (2, "")
    assert err.count("litgpt_kv: error: ") == 1 and "over the limit of 1024" in err and "Traceback" not in err


@linux
@silence
def test_a_silent_machine_is_noticed_by_the_other() -> None:
    options = ["--devices", "1", "--num-nodes", "2", "--generate-strategy", "tensor_parallel"]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with (
        started(*GENERATE, *ENDLESS, *options, NODE_RANK="0", **common) as first,
        started(*GENERATE, *ENDLESS, *options, NODE_RANK="1", **common) as second,
    ):
        wait_for_line(first, "Loaded")
        stopped = [*wait_for_children(second.pid, 1), second.pid]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert first.wait(timeout=LIMIT) == 1
        assert first.stderr.read().endswith("process 1 of 2 has gone silent for 15 seconds.\n")


def test_machines_must_say_where_to_meet(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as end:
        main([*GENERATE[2:], *TWO, "--num-nodes", "2"])
    assert end.value.code == 2
    assert "2 machines need MASTER_ADDR, MASTER_PORT and NODE_RANK, or torchrun or SLURM" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["tensor_parallel", "sequential", "data_parallel"])
@pytest.mark.parametrize("count", ["1000000", "1" + 400 * "0"])
def test_absurd_numbers_of_devices_start_nothing(strategy: str, count: str, capsys: pytest.CaptureFixture) -> None:
    for option, name in (("--devices", "devices"), ("--num-nodes", "num_nodes")):
        with pytest.raises(SystemExit) as end:
            main([*GENERATE[2:], "--generate-strategy", strategy, "--devices", "2", option, count])
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count("\n") == 1 and len(err) < 300
        assert f"{name} must be at most " in err and f"got {count[:7]}" in err
        with pytest.raises(ValueError, match=f"{name} must be at most .*, got {count[:7]}"):
            DeviceRequest("cpu", **{"devices": 2, name: int(count)})


@pytest.mark.parametrize("strategy", ["tensor_parallel", "data_parallel"])
def test_one_device_needs_no_other_process(strategy: str, capsys: pytest.CaptureFixture) -> None:
    command = [*GENERATE[2:], "--prompt", "def ", "--max-new-tokens", "6"]
    main(command)
    expected = capsys.readouterr().out
    main([*command, "--devices", "1", "--generate-strategy", strategy])
    out, err = capsys.readouterr()
    assert out == expected and "Starting" not in err and not dist.is_initialized()


def test_texts_of_other_processes_are_fit_for_a_terminal() -> None:
    assert one_line("a\r\n\tb\x00\x1b[2J\u009b\u202ec") == "a b [2J c"
    assert len(one_line(10**7 * "é")) == LONGEST + 1
    assert one_line("    at\x1b line", keep_indent=True) == "    at line"


def test_a_monitor_that_slept_itself_takes_nobody_for_silent(tmp_path: Path) -> None:
    """Looks are counted, not seconds: after a machine was suspended all files are old."""
    files = {rank: tmp_path / str(rank) for rank in range(2)}
    monitor = FileMonitor(files)
    assert [monitor.silent() for _ in range(200)] == [None] * 200, "they are loading"
    for age in range(30):
        os.utime(files[0], (age, age)) if files[0].exists() else files[0].touch()
        files[1].touch() if age == 0 else None
        found = monitor.silent()
        assert (found is None) == (age < 16), age
    assert found == "process 1 of 2 has gone silent for 15 seconds."
