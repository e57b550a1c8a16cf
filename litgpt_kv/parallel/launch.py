"""Starting and ending a run of several processes, through Lightning Fabric. Floor 5."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy

from litgpt_kv.parallel.team import Team
from litgpt_kv.parallel.watch import Watch

T = TypeVar("T")
TIMEOUT = timedelta(
    minutes=30
)  # of a collective: others may be loading or compiling; the dead are noticed by the watch
_run: ContextVar[Run | None] = ContextVar("run", default=None)


class Run:
    """A run of several processes, from its launch to its end.

    Attributes:
        fabric: Device and precision of this process. team: The processes.
    """

    def __init__(self, fabric: L.Fabric) -> None:
        self.fabric, self.team = fabric, Team(dist.group.WORLD)
        environment = fabric.strategy.cluster_environment
        started = getattr(fabric.strategy.launcher, "procs", [])  # empty where torchrun or SLURM started the processes
        children = started.copy()
        started.clear()  # Fabric looks at this list every 5 seconds and kills all without a word: the watch says why
        rank, size, host = self.team.rank, self.team.size, environment.main_address
        watch = Watch(rank, size, host, children=children) if rank == 0 else None
        port = self.team.same(None if watch is None else watch.port)
        self.watch = watch or Watch(rank, size, host, port)
        self.watch.start()
        self._over = False
        atexit.register(self.end)
        self._hook, sys.excepthook = sys.excepthook, self._uncaught

    def end(self) -> None:
        """All is done: waits for the others and closes the process group, which would abort if left open."""
        if not self._over:
            self._over = True
            self.watch.stop()
            dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        """This process ends with an error: tells the others; process 0 says what really happened, and ends.

        Returns on process 0 for errors of the user's, most of them met by all processes alike: its caller reports them.
        """
        if self._over:
            return
        if isinstance(error, SystemExit):  # a command's own end, the same on all
            self.end()
            if self.team.rank:
                raise SystemExit(0) from error  # process 0 says it; its watch takes another code for a failure
            return
        users = isinstance(error, (ValueError, OSError, KeyboardInterrupt))
        if self.team.rank == 0 and not users and (reason := self.watch.reason()):
            self.watch.give_up(reason)  # what failed here is only that another had gone
        text = str(error) if users else "".join(traceback.format_exception(error))
        self.watch.report(text or type(error).__name__)
        if self.team.rank > 0:
            os._exit(2 if users else 1)
        self._over = True
        if not users:
            self.watch.give_up(f"process 0 of {self.team.size} ended: {text}")
        if isinstance(error, KeyboardInterrupt):  # in the middle of a collective, whose group cannot be closed
            print(file=sys.stderr, flush=True)
            os._exit(130)
        dist.destroy_process_group()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._hook(kind, error, trace)
        self.watch.report(f"{kind.__name__}: {error}")
        self.watch.give_up("")


def launch(accelerator: str, devices: int | str, num_nodes: int, precision: str | None) -> Run:
    """Starts the processes of a run, one a device: Fabric's own launch, torchrun, SLURM or several nodes.

    Fabric starts a script again for every further device, with the same arguments; under torchrun or SLURM the
    processes are there already. Each goes on from here.

    Raises:
        ValueError: If the accelerator or its devices are not there.
    """
    try:
        strategy = DDPStrategy(timeout=TIMEOUT)  # only for its launch: the model is never wrapped
        fabric = L.Fabric(
            accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision
        )
    except Exception as error:  # Lightning's error for a device that is not there differs by device
        what = f"{devices} devices of accelerator {accelerator!r}"
        raise ValueError(f"{what} cannot be used here: {' '.join(str(error).split())}") from error
    fabric.launch()
    if fabric.device.type == "cpu":  # the processes share the machine's cores
        local = fabric.world_size // num_nodes
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    run = Run(fabric)
    _run.set(run)
    return run


def ends_together(command: Callable[..., T]) -> Callable[..., T]:
    """Makes a command end well on all processes or on none, whatever number of them it launches."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> T:
        try:
            result = command(*args, **kwargs)
        except BaseException as error:
            if run := _run.get():
                run.fail(error)
            raise
        if run := _run.get():
            run.end()
        return result

    return wrapped


def quiet(rank: int) -> None:
    """Only process 0 speaks: on another one, nothing more is written; its errors reach process 0 through the watch."""
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
