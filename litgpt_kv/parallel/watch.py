"""Processes that look after each other: when one ends, the others do, with a reason. Floor 5.

A process waiting in a collective for one that is gone would wait for minutes or for ever. So each beats in a store of
their own and listens to the others', on threads beside the work.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

from torch.distributed import TCPStore

PERIOD = 0.5  # seconds between two beats
PATIENCE = 15.0  # seconds without a beat from which on a process counts as gone
GRACE = 3.0  # seconds in which a process that heard of another's end may still say its own reason


class Watch:
    """One process' part in the watch.

    Args:
        rank, size: This process, and how many there are.
        host: Where process 0 is.
        port: Of its store; 0 on process 0, which takes a free one.
        children: What this process started, if the launcher did: their end is seen at once.
    """

    def __init__(
        self, rank: int, size: int, host: str, port: int = 0, children: list[subprocess.Popen] | None = None
    ) -> None:
        self.rank, self.size, self.children = rank, size, children or []
        limit = timedelta(seconds=PATIENCE)
        self.store = TCPStore(host, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
        self.port = self.store.port
        self._heard = time.monotonic()  # when the store answered last
        self._lost: str | None = None
        self._met = 0
        self._ending = threading.Event()

    def start(self) -> None:
        """Begins to beat and to listen."""
        for work in (self._talk, self._listen):
            threading.Thread(target=work, daemon=True, name=f"litgpt_kv{work.__name__}").start()

    def report(self, reason: str) -> None:
        """Tells the others that this process ends, and why; "" if it ends well."""
        with contextlib.suppress(Exception):  # they may be gone
            self.store.set(f"end/{self.rank}", reason)

    def reason(self, seconds: float = GRACE) -> str | None:
        """Which other process ended and why, as far as that becomes known in so many seconds."""
        until = time.monotonic() + seconds
        while self._lost is None and time.monotonic() < until:
            time.sleep(0.1)
        return self._lost

    def stop(self) -> None:
        """This process is through; process 0, which has the store, waits until all are or one is lost."""
        self.report("")
        with contextlib.suppress(Exception):
            while self.rank == 0 and not self.store.check([f"end/{r}" for r in range(self.size)]):
                time.sleep(PERIOD / 10)
        self._ending.set()

    def meet(self, failure: str | None = None) -> None:
        """Waits until every process has come here as often as this one; if one ends, the watch ends all.

        Args:
            failure: Why this process has nothing to bring: the others then raise instead of waiting, and it goes on.

        Raises:
            RuntimeError: If another process failed on its way here.
        """
        self._met += 1
        if failure is not None:
            self.store.set(f"failed/{self._met}", f"process {self.rank} of {self.size} failed: {failure}")
        elif not self.store.check([f"failed/{self._met}"]):
            self.store.add(f"met/{self._met}", 1)
            while self.store.add(f"met/{self._met}", 0) < self.size:
                if self.store.check([f"failed/{self._met}"]):
                    break
                time.sleep(PERIOD / 10)
        if failure is None and self.store.check([f"failed/{self._met}"]):
            raise RuntimeError(self.store.get(f"failed/{self._met}").decode())

    def _talk(self) -> None:
        beats, at = [0] * self.size, [time.monotonic()] * self.size
        while not self._ending.is_set():
            try:
                self.store.add(f"beat/{self.rank}", 1)
                for r in range(self.size):
                    if self.store.check([f"end/{r}"]):
                        if (text := self.store.get(f"end/{r}").decode()) and r != self.rank:
                            self._lost = f"process {r} of {self.size} ended: {text}"
                            return
                    elif (n := self.store.add(f"beat/{r}", 0)) != beats[r]:
                        beats[r], at[r] = n, time.monotonic()
                    elif time.monotonic() - at[r] > PATIENCE:
                        self._lost = f"process {r} of {self.size} has gone silent for {PATIENCE:.0f} seconds."
                        return
            except Exception:
                if not self._ending.is_set():
                    self._lost = f"process 0 of {self.size} has ended."
                return
            self._heard = time.monotonic()
            self._ending.wait(PERIOD)

    def _listen(self) -> None:
        while not self._ending.wait(PERIOD):
            for r, child in enumerate(self.children, start=1):
                if self._lost is None and child.poll():
                    time.sleep(PERIOD)  # what it said of its end is on its way
                    self._lost = self._lost or f"process {r} of {self.size} ended with code {child.returncode}."
            if self._lost is None and time.monotonic() - self._heard > 2 * PATIENCE:
                self._lost = f"process 0 of {self.size} does not answer."
            if self._lost is not None:
                if not self._ending.wait(GRACE if self.rank == 0 else 0.0):  # the work may fail of itself, and say more
                    self.give_up(self._lost if self.rank == 0 or "process 0" in self._lost else "")
                return

    def give_up(self, reason: str) -> NoReturn:
        """Ends this process and those it started at once, whatever their threads wait for."""
        for child in self.children:
            child.kill()
        with contextlib.suppress(Exception):
            if reason:
                print(f"litgpt_kv: error: {reason}", file=sys.__stderr__, flush=True)
            sys.stdout.flush()
        os._exit(1)
