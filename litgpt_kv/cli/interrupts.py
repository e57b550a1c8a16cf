"""Ctrl-C while modules are imported, which takes seconds. This module imports next to nothing, as it comes first."""

from __future__ import annotations

import signal


class QuietInterrupts:
    """End the process at once, without a traceback, if Ctrl-C is pressed in a `with` block of imports."""

    def __enter__(self) -> None:
        self.changed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            if self.changed:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
        except ValueError:  # only the main thread may set it
            self.changed = False

    def __exit__(self, *_: object) -> None:
        if self.changed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
