"""Heartbeats: notice a process that has gone silent.

If a process is stopped, the others wait for it in a collective until its timeout of half an hour.
`torch.distributed.elastic` does not notice that either, because it watches only for processes that end. So every
process of a run sends a heartbeat each second:

1. A worker touches a file, which the launcher on its machine checks (`FileHeartbeat`, `FileMonitor`).
2. If processes are on several machines, or were started by torchrun or SLURM, they also increment counters in torch's
   store: process 0 checks all counters, the others check that of process 0 (`StoreHeartbeat`).
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
PATIENCE = 15  # periods without a heartbeat after which a process is lost
START_PATIENCE = 300  # the same before the first heartbeat, while Python, torch and the script are loading


class FileHeartbeat(threading.Thread):
    """Touch a file every second, and end this process when its launcher has ended.

    Args:
        file: A file in the launcher's temporary folder.
        launcher: The launcher's process id. If it is killed, the parent id of this process changes.
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
    """Check the files of `FileHeartbeat`. It counts checks, so a suspended launcher reports no one.

    Args:
        files: The file of each worker, by rank; each worker creates its own.
    """

    def __init__(self, files: Mapping[int, Path]) -> None:
        self.files = files
        self._times: dict[int, float] = {}
        self._missed: Counter[int] = Counter()

    def silent(self) -> str | None:
        """Return a message if a worker has been silent for too long, else None. Call it every `PERIOD` seconds."""
        for rank, file in self.files.items():
            touched = file.stat().st_mtime if file.exists() else 0.0
            self._missed[rank] = 0 if touched != self._times.get(rank, 0.0) else self._missed[rank] + 1
            self._times[rank] = touched
            patience = PATIENCE if touched else START_PATIENCE
            if self._missed[rank] > patience:
                return f"process {rank} of {len(self.files)} has gone silent for {patience * PERIOD:.0f} seconds."
        return None


class StoreHeartbeat(threading.Thread):
    """Increment a counter in a store, and end this process when another one is lost.

    Args:
        store: A client of the store, used by this thread only; process 0 or its launcher runs the store. The client's
            timeout limits each request.
        rank, size: The number of this process, and the number of processes.
        lost: Called in this thread with a message about the lost process; must not return.
    """

    def __init__(self, store: Store, rank: int, size: int, lost: Callable[[str], None]) -> None:
        super().__init__(name="litgpt_kv heartbeat in the store", daemon=True)
        self.store, self.rank, self.size, self.lost = store, rank, size, lost
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Stop checking the other processes."""
        self._stopped.set()

    def run(self) -> None:
        others = range(1, self.size) if self.rank == 0 else [0]
        counts: dict[int, int] = {}
        missed: Counter[int] = Counter()
        while not self._stopped.wait(PERIOD):
            try:
                self.store.add(f"beat/{self.rank}", 1)
                found = {r: self.store.add(f"beat/{r}", 0) for r in others if not self.store.check([f"end/{r}"])}
            except RuntimeError:  # torch raises it if the store does not answer
                if not self._stopped.is_set():
                    self.lost(f"process 0 of {self.size} has ended or does not answer.")
                return
            for rank, count in found.items():
                missed[rank] = 0 if count != counts.get(rank) else missed[rank] + 1
                counts[rank] = count
                if missed[rank] > PATIENCE:
                    self.lost(f"process {rank} of {self.size} has gone silent for {PATIENCE * PERIOD:.0f} seconds.")
                    return
