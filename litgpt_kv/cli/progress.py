"""Progress bars with a rate, on terminals only: loading a model, reading long prompts."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from tqdm import tqdm

from litgpt_kv.generate import Stats

DELAY = 1.0  # seconds before a bar appears
EVERY = 0.2  # seconds between two looks at a run
LONG_PROMPT = 1000  # tokens of all prompts, from which reading them may take a while


@contextlib.contextmanager
def loading(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that shows how many bytes of how many are loaded; None if there is no terminal."""
    if not sys.stderr.isatty():  # a bar starts a thread, even one that is not shown
        yield None
        return
    bar = _bar(f"Loading {name}", None, unit="B", unit_scale=True)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        yield show


class Reading:
    """Show how many prompt tokens a run has read, until `close` is called.

    A thread looks at the run's statistics, as reading a prompt may be one long step.

    Args:
        stats: The run's, whose `prompt_tokens` grow.
        total: All prompt tokens.
        shown: Whether to show anything.
    """

    def __init__(self, stats: Stats, total: int, shown: bool = True) -> None:
        self._stats, self._ended = stats, threading.Event()
        self._thread: threading.Thread | None = None
        if shown and total >= LONG_PROMPT and sys.stderr.isatty():
            self._bar = _bar("Reading", total, unit=" tokens")
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Remove the bar."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._bar.close()
            self._thread = None

    def _watch(self) -> None:
        while not self._ended.wait(EVERY):
            self._bar.update(self._stats.prompt_tokens - self._bar.n)
            self._bar.refresh()


def _bar(name: str, total: int | None, **options: object) -> tqdm:
    return tqdm(desc=name, total=total, delay=DELAY, leave=False, disable=None, file=sys.stderr, **options)
