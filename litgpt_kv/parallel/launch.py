"""Start the processes of a run, one a device, and end all of them together.

1. `launch` in the user's process starts a worker for each device of this machine with `torch.distributed.elastic`, and
   becomes their launcher. A worker runs the same command again.
2. `launch` in a worker joins the process group and returns a `Run`; the worker goes on from there.
3. The launcher waits. When a worker ends with an error, is killed or goes silent, it ends the others, prints what
   happened on one line, and ends with the worker's exit code. When the launcher is killed, its workers end.

Where torchrun, SLURM or another program started the processes, all of them are workers and it is the launcher.

On one machine processes find each other by a file in a folder that only this user can read, and gloo and NCCL are told
to use the loopback interface: no port is open to others. Several machines use torch's rendezvous.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy

from litgpt_kv.parallel.base import DeviceRequest
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.heartbeat import PATIENCE, PERIOD, FileHeartbeat, StoreHeartbeat
from litgpt_kv.parallel.launcher import (
    FOLDER,
    LAUNCHER,
    LONGEST,
    PIPE_CLOSED,
    USER_ERROR,
    beat_file,
    one_line,
    print_error,
    supervise,
)

TIMEOUT = timedelta(minutes=30)  # of a collective: others may be loading or compiling
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's launchers read why a worker ended
_runs = itertools.count()  # of this process, one after the other: each has a store of its own


class Run:
    """This process's part in a run of several processes.

    Attributes:
        fabric: Device and precision of this process. collectives: What the processes say to each other.
    """

    def __init__(
        self, fabric: L.Fabric, collectives: Collectives, store: dist.Store, heartbeat: StoreHeartbeat | None = None
    ) -> None:
        self.fabric, self.collectives = fabric, collectives
        self._store, self._heartbeat = store, heartbeat
        self._synchronized = 0
        self._over = False
        if collectives.size > 1:
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
    fabric = _fabric(request)
    local, num_nodes = fabric.strategy.num_processes, request.num_nodes
    if not fabric.strategy.cluster_environment.creates_processes_externally:
        if local * num_nodes == 1:  # nobody to start, and nothing to say
            return Run(L.Fabric(**asdict(replace(request, devices=1))), Collectives(), dist.HashStore())
        if num_nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError(f"{num_nodes} machines need MASTER_ADDR, MASTER_PORT and NODE_RANK, or torchrun or SLURM.")
        raise SystemExit(supervise(local, on_one_machine=num_nodes == 1))
    store = heartbeat = None
    if FOLDER in os.environ:
        store = _join(fabric, num_nodes)
    fabric.launch()  # joins by torch's rendezvous, if that has not been done
    if fabric.device.type == "cpu":  # the processes share the machine's cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if store is None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # of torch's rendezvous, set by Fabric
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=PATIENCE), wait_for_workers=False)
        heartbeat = StoreHeartbeat(dist.PrefixStore("litgpt_kv", store), dist.get_rank(), dist.get_world_size(), _lost)
        heartbeat.start()
    return Run(fabric, Collectives(dist.group.WORLD), dist.PrefixStore("litgpt_kv", store), heartbeat)


def _fabric(request: DeviceRequest) -> L.Fabric:
    try:
        strategy = DDPStrategy(timeout=TIMEOUT)  # only for its launch: the model is never wrapped
        return L.Fabric(strategy=strategy, **asdict(request))
    except Exception as error:  # Lightning's error for a device that is not there differs by device
        what = f"{request.devices} devices of accelerator {request.accelerator!r}"
        raise ValueError(f"{what} cannot be used here: {' '.join(str(error).split())}") from error


def _join(fabric: L.Fabric, num_nodes: int) -> dist.Store | None:
    """Makes this process, which a launcher of ours started, known to it; on one machine joins the others by a file.

    Returns:
        The file's store; None on several machines.
    """
    folder, rank, size = Path(os.environ[FOLDER]), int(os.environ["LOCAL_RANK"]), fabric.strategy.num_processes
    if not is_worker():  # the launcher was killed before this process came here
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
    if not any(isinstance(thread, FileHeartbeat) for thread in threading.enumerate()):
        FileHeartbeat(beat_file(folder, rank), int(os.environ[LAUNCHER])).start()
    if num_nodes > 1:
        return None
    if dist.is_initialized():
        raise ValueError("This process is part of a run already: close it first, with llm.close().")
    on_gpu = fabric.device.type == "cuda"
    store = dist.FileStore(str(folder / f"store{next(_runs)}"), size)
    options = dict(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=fabric.device if on_gpu else None, **options)
    return store


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
        _leave(USER_ERROR)
    _record(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
    _leave(1, wait=True)


def _lost(reason: str) -> NoReturn:
    """Another machine's process is lost, seen by a thread while the main one may wait for it in a collective."""
    if is_worker():
        _record(reason)
    else:
        print_error(reason)
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
