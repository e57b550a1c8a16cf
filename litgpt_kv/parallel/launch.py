"""Start the processes of a run, one for each device, and end all of them together.

1. In the user's process, `launch` starts a worker for each device of this machine with `torch.distributed.elastic`, and
   becomes their launcher. A worker runs the same command again.
2. In a worker, `launch` joins the process group and returns a `Run`; the worker continues after the call.
3. The launcher waits. When a worker ends with an error, is killed or goes silent, the launcher ends the others, prints
   the error on one line, and ends with the worker's exit code. When the launcher is killed, its workers end.

If torchrun, SLURM or another program started the processes, that program is the launcher and all are workers.

On one machine, processes find each other through a file in a folder that only this user can read, and gloo and NCCL use
the loopback interface only, so no port is open to others. Several machines use torch's rendezvous.
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

TIMEOUT = timedelta(minutes=30)  # of a collective: other processes may be loading or compiling
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's launchers read why a worker ended
_runs = itertools.count()  # numbers the runs of this process: each has its own store


class Run:
    """This process in a run of one or several processes.

    Attributes:
        fabric: The device and precision of this process. collectives: The communication with the others.
    """

    def __init__(
        self, fabric: L.Fabric, collectives: Collectives, store: dist.Store, heartbeat: StoreHeartbeat | None = None
    ) -> None:
        self.fabric, self.collectives = fabric, collectives
        self._store, self._heartbeat = store, heartbeat
        self._synchronized = 0
        self._ended = False
        if collectives.size > 1:
            atexit.register(self._at_exit)

    def synchronize(self, failure: str | None = None) -> None:
        """Wait, without a timeout, until every process has called this as often as this one.

        Args:
            failure: An error of this process: then it does not wait, and the others raise RuntimeError.

        Raises:
            RuntimeError: If another process called it with `failure`.
        """
        self._synchronized += 1
        arrived, failed = f"arrived/{self._synchronized}", f"failed/{self._synchronized}"
        if failure is not None:
            process = f"process {self.collectives.rank} of {self.collectives.size}"
            self._store.set(failed, one_line(f"{process} failed: {failure}"))
            return
        if not self._store.check([failed]):
            self._store.add(arrived, 1)
            while self._store.add(arrived, 0) < self.collectives.size and not self._store.check([failed]):
                time.sleep(PERIOD / 20)
        if self._store.check([failed]):
            raise RuntimeError(one_line(self._store.get(failed).decode(errors="replace")))

    def end(self) -> None:
        """End the run and close the process group. Process 0 waits for the others, because it may run the store."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(RuntimeError):  # the process that runs the store may have ended
            self._store.set(f"end/{self.collectives.rank}", "")
            ends = [f"end/{rank}" for rank in range(self.collectives.size)]
            while self.collectives.rank == 0 and not self._store.check(ends):
                time.sleep(PERIOD / 20)
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _at_exit(self) -> None:
        """End the run at the end of a script, without an error or after one that Python has printed."""
        error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # last_exc is new in Python 3.12
        if error is None:
            self.end()
        elif not self._ended:
            _record(f"{type(error).__name__}: {error}")
            _leave(1, wait=True)


def launch(request: DeviceRequest) -> Run:
    """Start the processes of a run, one for each device; in a worker, join the run.

    It returns in the workers only. In the process that starts them, it raises SystemExit when all have ended.

    Raises:
        ValueError: If the accelerator or its devices do not exist, or the previous run was not closed.
    """
    fabric = _fabric(request)
    local, num_nodes = fabric.strategy.num_processes, request.num_nodes
    if not fabric.strategy.cluster_environment.creates_processes_externally:
        if local * num_nodes == 1:  # one process
            return Run(L.Fabric(**asdict(replace(request, devices=1))), Collectives(), dist.HashStore())
        if num_nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise ValueError(f"{num_nodes} machines need MASTER_ADDR, MASTER_PORT and NODE_RANK, or torchrun or SLURM.")
        raise SystemExit(supervise(local, on_one_machine=num_nodes == 1))
    store = heartbeat = None
    if FOLDER in os.environ:
        store = _join(fabric, num_nodes)
    fabric.launch()  # joins through torch's rendezvous, unless `_join` has joined
    if fabric.device.type == "cpu":  # the processes share the machine's cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if store is None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # torch's rendezvous, set by Fabric
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=PATIENCE), wait_for_workers=False)
        heartbeat = StoreHeartbeat(dist.PrefixStore("litgpt_kv", store), dist.get_rank(), dist.get_world_size(), _lost)
        heartbeat.start()
    return Run(fabric, Collectives(dist.group.WORLD), dist.PrefixStore("litgpt_kv", store), heartbeat)


def _fabric(request: DeviceRequest) -> L.Fabric:
    """Build the Fabric of this process."""
    try:
        strategy = DDPStrategy(timeout=TIMEOUT)  # only used to launch: the model is never wrapped
        return L.Fabric(strategy=strategy, **asdict(request))
    except Exception as error:  # Lightning raises different errors for different missing devices
        what = f"{request.devices} devices of accelerator {request.accelerator!r}"
        raise ValueError(f"{what} cannot be used here: {' '.join(str(error).split())}") from error


def _join(fabric: L.Fabric, num_nodes: int) -> dist.Store | None:
    """Start the heartbeat of this worker; on one machine, also join the process group through a file.

    Returns:
        The file's store; None on several machines.
    """
    folder, rank, size = Path(os.environ[FOLDER]), int(os.environ["LOCAL_RANK"]), fabric.strategy.num_processes
    if not is_worker():  # the launcher was killed meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
    if not any(isinstance(thread, FileHeartbeat) for thread in threading.enumerate()):
        FileHeartbeat(beat_file(folder, rank), int(os.environ[LAUNCHER])).start()
    if num_nodes > 1:
        return None
    if dist.is_initialized():
        raise ValueError("This process already is in a run: close it first, with llm.close().")
    on_gpu = fabric.device.type == "cuda"
    store = dist.FileStore(str(folder / f"store{next(_runs)}"), size)
    options = dict(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=fabric.device if on_gpu else None, **options)
    return store


# -- ending a worker ---------------------------------------------------------------------------------------------------


def is_worker() -> bool:
    """Return whether a launcher of this module started this process and is still running."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


def end_worker(error: BaseException) -> None:
    """End a worker with an error, which its launcher prints; for commands, which do not print errors in workers.

    It returns if this process is not a worker. For SystemExit, with which all processes end, it returns in process 0,
    which has printed the reason.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if isinstance(error, SystemExit):
        if not is_first:
            raise SystemExit(0) from error  # the run has the exit code of process 0
        if is_worker():
            _record("", is_printed=True)
        return
    if not is_worker():
        if dist.is_initialized():
            if LAUNCHER in os.environ:  # the launcher was killed: all workers end
                _leave(1)
            _record(str(error) or type(error).__name__)  # for torchrun's own report
        return
    if isinstance(error, KeyboardInterrupt):
        _record("", is_printed=True)
        _leave(130)
    if isinstance(error, BrokenPipeError):
        _leave(PIPE_CLOSED)
    if isinstance(error, (ValueError, OSError)):  # the user's error
        _record(str(error) or type(error).__name__)
        _leave(USER_ERROR)
    _record(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
    _leave(1, wait=True)


def _lost(reason: str) -> NoReturn:
    """End this process because another one is lost. A heartbeat thread calls it; the main thread may wait for ever."""
    if is_worker():
        _record(reason)
    else:
        print_error(reason)
    _leave(1)


def _record(message: str, trace: str = "", is_printed: bool = False) -> None:
    """Write the error of this process to the file that the launcher (ours or torchrun) reads."""
    if file := os.environ.get(ERROR_FILE):
        data = {"message": one_line(message), "timestamp": str(int(time.time())), "is_printed": is_printed}
        with contextlib.suppress(OSError):
            temporary = Path(f"{file}.new")
            temporary.write_text(json.dumps(data | {"traceback": trace[-20 * LONGEST :]}))
            temporary.replace(file)  # atomic: the launcher may be reading


def _leave(code: int, wait: bool = False) -> NoReturn:
    """End this process at once, even if its threads are waiting.

    With `wait`, wait a second before: the error may only be that another process has ended, and the launcher should see
    that one first.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if wait:
        time.sleep(1.0)
    os._exit(code)
