"""Start the processes of a run, one a device, and end all of them together.

1. `launch` in the user's process starts a worker for each device of this machine with `torch.distributed.elastic`, and
   becomes their launcher. A worker runs the same command again.
2. `launch` in a worker joins the process group and returns a `Run`; the worker goes on from there.
3. The launcher waits. When a worker ends with an error, is killed or goes silent, it ends the others, prints what
   happened on one line, and ends with the worker's exit code. When the launcher is killed, its workers end.

Where torchrun, SLURM or another program started the processes, all of them are workers and it is the launcher.

On one machine processes find each other by a file in a folder that only this user can read, and gloo and NCCL are told
to use the loopback interface: no port is open to others. Several machines use torch's rendezvous.

Workers are started by `torch.distributed.elastic.multiprocessing`, not by the `elastic_launch` above it: that one adds
restarts, which a run has no use for, and a TCP store that listens on every interface.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from litgpt_kv.parallel.base import DeviceRequest
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.heartbeat import PATIENCE, PERIOD, FileHeartbeat, FileMonitor, StoreHeartbeat

TIMEOUT = timedelta(minutes=30)  # of a collective: others may be loading or compiling
GRACE = 10  # seconds in which workers may end by themselves after Ctrl-C
FOLDER, LAUNCHER = "LITGPT_KV_RUN_FOLDER", "LITGPT_KV_LAUNCHER"  # what a launcher tells its workers
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's launchers read why a worker ended
LONGEST = 2000  # characters of an error that is shown
KILL = getattr(signal, "SIGKILL", None)  # Windows has no such signal: torch then takes its own
_runs = itertools.count()  # of this process, one after the other: each has a store of its own
PIPE_CLOSED = 128 + 13  # a worker's exit code when the reader of its output has gone, as `| head` does


class Run:
    """This process's part in a run of several processes.

    Attributes:
        fabric: Device and precision of this process. collectives: What the processes say to each other.
    """

    def __init__(self, fabric: L.Fabric, store: dist.Store, heartbeat: StoreHeartbeat | None) -> None:
        self.fabric, self.collectives = fabric, Collectives(dist.group.WORLD)
        self._store, self._heartbeat = store, heartbeat
        self._synchronized = 0
        self._over = False
        atexit.register(self._at_exit)

    def synchronize(self, failure: str | None = None) -> None:
        """Waits until every process has come here as often as this one, however long that takes.

        Args:
            failure: Why this process has nothing to bring: the others then raise instead of waiting, and it goes on.

        Raises:
            RuntimeError: If another process failed on its way here.
        """
        self._synchronized += 1
        came, failed = f"came/{self._synchronized}", f"failed/{self._synchronized}"
        if failure is not None:
            who = f"process {self.collectives.rank} of {self.collectives.size}"
            self._store.set(failed, one_line(f"{who} failed: {failure}"))
            return
        if not self._store.check([failed]):
            self._store.add(came, 1)
            while self._store.add(came, 0) < self.collectives.size and not self._store.check([failed]):
                time.sleep(PERIOD / 20)
        if self._store.check([failed]):
            raise RuntimeError(one_line(self._store.get(failed).decode(errors="replace")))

    def end(self) -> None:
        """All is done: process 0, which may hold the store, waits for the others. Closes the process group."""
        if self._over:
            return
        self._over = True
        with contextlib.suppress(RuntimeError):  # the process that holds the store may be gone
            self._store.set(f"end/{self.collectives.rank}", "")
            ends = [f"end/{rank}" for rank in range(self.collectives.size)]
            while self.collectives.rank == 0 and not self._store.check(ends):
                time.sleep(PERIOD / 20)
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _at_exit(self) -> None:
        """The end of a script: a good one, or an error that Python has printed already."""
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # the first one since Python 3.12
        if error is None:
            self.end()
        elif not self._over:
            _record(f"{type(error).__name__}: {error}")
            _leave(1, wait=True)


def launch(request: DeviceRequest) -> Run:
    """Starts the processes of a run, one a device, or joins it in a process that was started for one.

    Returns in the workers only; in the process that starts them it raises SystemExit when all have ended.

    Raises:
        ValueError: If the accelerator or its devices are not there, or the run before has not been closed.
    """
    try:
        strategy = DDPStrategy(timeout=TIMEOUT)  # only for its launch: the model is never wrapped
        fabric = L.Fabric(strategy=strategy, **asdict(request))
    except Exception as error:  # Lightning's error for a device that is not there differs by device
        what = f"{request.devices} devices of accelerator {request.accelerator!r}"
        raise ValueError(f"{what} cannot be used here: {' '.join(str(error).split())}") from error
    local, num_nodes = strategy.num_processes, request.num_nodes
    if not strategy.cluster_environment.creates_processes_externally:
        if num_nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError(f"{num_nodes} machines need MASTER_ADDR, MASTER_PORT and NODE_RANK, or torchrun or SLURM.")
        raise SystemExit(supervise(local, on_one_machine=num_nodes == 1))
    store = None
    if FOLDER in os.environ:
        folder, rank = Path(os.environ[FOLDER]), int(os.environ["LOCAL_RANK"])
        if not is_worker():  # the launcher was killed before this process came here
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)
        if not any(isinstance(thread, FileHeartbeat) for thread in threading.enumerate()):
            FileHeartbeat(_beat_file(folder, rank), int(os.environ[LAUNCHER])).start()
        if num_nodes == 1:  # otherwise Fabric does the same with torch's TCP store
            if dist.is_initialized():
                raise ValueError("This process is part of a run already: close it first, with llm.close().")
            backend = "nccl" if fabric.device.type == "cuda" else "gloo"
            store = dist.FileStore(str(folder / f"store{next(_runs)}"), local)
            dist.init_process_group(backend, store=store, rank=rank, world_size=local, timeout=TIMEOUT)
    fabric.launch()
    if fabric.device.type == "cpu":  # the processes share the machine's cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if store is not None:
        return Run(fabric, dist.PrefixStore("litgpt_kv", store), None)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # of torch's rendezvous, set by Fabric
    client = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=PATIENCE), wait_for_workers=False)
    store = dist.PrefixStore("litgpt_kv", client)
    heartbeat = StoreHeartbeat(store, dist.get_rank(), dist.get_world_size(), _lost)
    heartbeat.start()
    return Run(fabric, store, heartbeat)


# -- the launcher ------------------------------------------------------------------------------------------------------


def supervise(workers: int, on_one_machine: bool) -> int:
    """Runs this command again in so many workers until all have ended, or one has failed; returns the exit code."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # we say it shorter
    print(f"Starting with {workers} processes on this machine.", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="litgpt_kv_") as name:
        folder = Path(name)
        common = {FOLDER: name, LAUNCHER: str(os.getpid()), **(_loopback() if on_one_machine else {})}
        ranks = range(workers)
        context = start_processes(
            "litgpt_kv",
            sys.executable,
            args={rank: tuple(sys.orig_argv[1:]) for rank in ranks},
            envs={rank: {**common, "LOCAL_RANK": str(rank)} for rank in ranks},
            logs_specs=DefaultLogsSpecs(log_dir=name),
        )
        monitor = FileMonitor({rank: _beat_file(folder, rank) for rank in ranks})
        try:
            return _wait(context, monitor, workers)
        except SignalException as stopped:
            with contextlib.suppress(SignalException):  # a second Ctrl-C ends the patience
                context.close(stopped.sigval, timeout=GRACE)
            context.close(KILL, timeout=GRACE)
            if stopped.sigval == signal.SIGINT:
                print(file=sys.stderr, flush=True)  # after the terminal's ^C
            return 128 + stopped.sigval


def _wait(context: PContext, monitor: FileMonitor, workers: int) -> int:
    while (result := context.wait(PERIOD, period=0.1)) is None:  # at the first failure torch ends the other workers
        if silent := monitor.silent():
            context.close(KILL)
            _say(silent)
            return 1
    if not result.failures:
        return 0
    failures = result.failures.values()  # those that torch ended are among them
    failure = next((f for f in failures if f.exitcode != -signal.SIGTERM), next(iter(failures)))
    if failure.exitcode == PIPE_CLOSED:
        return 0
    _explain(failure, workers)
    return failure.exitcode if failure.exitcode > 0 else 1


def _explain(failure: ProcessFailure, workers: int) -> None:
    """Prints why a worker ended: its traceback if nobody has seen it, and one line."""
    data = failure.error_file_data
    if data.get("told"):
        return
    for line in str(data.get("traceback", "")).splitlines():
        print(one_line(line, keep_indent=True), file=sys.stderr)
    who = f"process {failure.local_rank} of {workers}"
    if failure.error_file == "<N/A>":  # torch's word for: it left no message
        _say(f"{who} ended with code {failure.exitcode}.")
    else:
        _say(failure.message if failure.exitcode == 2 else f"{who} ended: {failure.message}")


def _say(text: str) -> None:
    print(f"litgpt_kv: error: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str, keep_indent: bool = False) -> str:
    """What another process wrote, fit for a terminal: on one line, without control characters, of bounded length."""
    text = "".join(c if c.isprintable() else " " for c in text[: 2 * LONGEST])
    indent = text[: len(text) - len(text.lstrip())] if keep_indent else ""
    text = indent + " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def _beat_file(folder: Path, rank: int) -> Path:
    return folder / f"alive{rank}"


def _loopback() -> dict[str, str]:
    """Tells gloo and NCCL to listen on the loopback interface only, unless the user has chosen another one."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    chosen = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return {name: value for name, value in chosen.items() if value is not None and name not in os.environ}


# -- a worker's end ----------------------------------------------------------------------------------------------------


def is_worker() -> bool:
    """Whether a launcher of this module started this process, and lives."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


def end_worker(error: BaseException) -> None:
    """Ends a worker with its error, which the launcher then prints; for commands, which print no error themselves.

    Returns in a process that is no worker, and for an end that all processes have in common and process 0 has explained
    (SystemExit).
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if isinstance(error, SystemExit):
        if not first:
            raise SystemExit(0) from error  # process 0's exit code is that of the run
        if is_worker():
            _record("", told=True)
        return
    if not is_worker():
        if dist.is_initialized():
            if LAUNCHER in os.environ:  # the launcher was killed, and so the other workers end
                _leave(1)
            _record(str(error) or type(error).__name__)  # for torchrun's own report
        return
    if isinstance(error, KeyboardInterrupt):
        _record("", told=True)
        _leave(130)
    if isinstance(error, BrokenPipeError):
        _leave(PIPE_CLOSED)
    if isinstance(error, (ValueError, OSError)):  # the user's
        _record(str(error) or type(error).__name__)
        _leave(2)
    _record(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
    _leave(1, wait=True)


def _lost(reason: str) -> NoReturn:
    """Another machine's process is lost, seen by a thread while the main one may wait for it in a collective."""
    if is_worker():
        _record(reason)
    else:
        _say(reason)
    _leave(1)


def _record(message: str, trace: str = "", told: bool = False) -> None:
    """Leaves the launcher, ours or torchrun, why this process ends; `told`: the user knows already."""
    if file := os.environ.get(ERROR_FILE):
        data = {"message": one_line(message), "timestamp": str(int(time.time())), "told": told}
        with contextlib.suppress(OSError):
            beside = Path(f"{file}.new")
            beside.write_text(json.dumps(data | {"traceback": trace[-20 * LONGEST :]}))
            beside.replace(file)  # at once: the launcher may be reading


def _leave(code: int, wait: bool = False) -> NoReturn:
    """Ends this process at once, whatever its threads wait for.

    `wait`: a second first. What failed here may only be that another process had gone, and the launcher should see that
    one first.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if wait:
        time.sleep(1.0)
    os._exit(code)
