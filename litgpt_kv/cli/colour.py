"""Colours, on terminals only; the environment variable NO_COLOR turns them off (https://no-color.org)."""

from __future__ import annotations

import os
from typing import TextIO

CODES = {"bold": "1", "dim": "2", "red": "31"}


def has_colour(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that shows colours, and the user wants them."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # a closed stream, or an object that only writes
        return False


def paint(text: str, style: str, stream: TextIO) -> str:
    """Return a text in one of `CODES` if the stream shows colours, else as it is."""
    return f"\x1b[{CODES[style]}m{text}\x1b[0m" if text and has_colour(stream) else text
