"""Heartbeats: how a process that has gone silent is noticed.

A process that waits in a collective for one that is stopped waits until its timeout, half an hour here, and
`torch.distributed.elastic` looks only at processes that end: a stopped one stays unnoticed. So every process of a run
gives a sign of life each second:

1. A worker touches a file, which the launcher of its machine looks at (`FileHeartbeat`, `FileMonitor`).
2. Where processes are on several machines, or were started by torchrun or SLURM, they also count in torch's own store:
   process 0 looks at all counters, the others look at that of process 0 (`StoreHeartbeat`).
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.distributed import Store

PERIOD = 1.0  # seconds between two heartbeats
PATIENCE = 15  # this many periods without a heartbeat: the process is lost
START_PATIENCE = 300  # the same before its first heartbeat: Python, torch and a script are loading


class FileHeartbeat(threading.Thread):
    """Touches a file every second, and ends this process when its launcher is gone.

    Args:
        file: In the launcher's folder, which goes with the launcher.
        launcher: The launcher's process id; when it is killed, the operating system gives its children another parent.
    """

    def __init__(self, file: Path, launcher: int) -> None:
        super().__init__(name="litgpt_kv heartbeat", daemon=True)
        self.file, self.launcher = file, launcher

    def run(self) -> None:
        while os.getppid() == self.launcher:
            self.file.touch()
            time.sleep(PERIOD)
        shutil.rmtree(self.file.parent, ignore_errors=True)
        os._exit(1)


class FileMonitor:
    """Looks at the files of `FileHeartbeat`; a process that was suspended itself does not take the others for silent.

    Args:
        files: Of each worker, by rank; a worker creates its own.
    """

    def __init__(self, files: Mapping[int, Path]) -> None:
        self.files = files
        self._times: dict[int, float] = {}
        self._missed: Counter[int] = Counter()

    def silent(self) -> str | None:
        """What is wrong with a worker that gave no sign of life for too long. To be called every `PERIOD` seconds."""
        for rank, file in self.files.items():
            touched = file.stat().st_mtime if file.exists() else 0.0
            self._missed[rank] = 0 if touched != self._times.get(rank, 0.0) else self._missed[rank] + 1
            self._times[rank] = touched
            patience = PATIENCE if touched else START_PATIENCE
            if self._missed[rank] > patience:
                return f"process {rank} of {len(self.files)} has gone silent for {patience * PERIOD:.0f} seconds."
        return None


class StoreHeartbeat(threading.Thread):
    """Counts in a store, and ends this process when another one is lost.

    Args:
        store: A client of its own of the store, which process 0 or its launcher holds; its timeout bounds each request.
        rank, size: This process, and how many there are.
        lost: Called in this thread with what is known of the lost process; does not return.
    """

    def __init__(self, store: Store, rank: int, size: int, lost: Callable[[str], None]) -> None:
        super().__init__(name="litgpt_kv heartbeat in the store", daemon=True)
        self.store, self.rank, self.size, self.lost = store, rank, size, lost
        self._stopped = threading.Event()

    def stop(self) -> None:
        """No process is missed any more."""
        self._stopped.set()

    def run(self) -> None:
        others = range(1, self.size) if self.rank == 0 else [0]
        counts: dict[int, int] = {}
        missed: Counter[int] = Counter()
        while not self._stopped.wait(PERIOD):
            try:
                self.store.add(f"beat/{self.rank}", 1)
                found = {r: self.store.add(f"beat/{r}", 0) for r in others if not self.store.check([f"end/{r}"])}
            except RuntimeError:  # torch's errors of a store that does not answer
                if not self._stopped.is_set():
                    self.lost(f"process 0 of {self.size} has ended or does not answer.")
                return
            for rank, count in found.items():
                missed[rank] = 0 if count != counts.get(rank) else missed[rank] + 1
                counts[rank] = count
                if missed[rank] > PATIENCE:
                    self.lost(f"process {rank} of {self.size} has gone silent for {PATIENCE * PERIOD:.0f} seconds.")
                    return
