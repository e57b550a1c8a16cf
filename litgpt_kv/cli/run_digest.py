"""A short text for the settings of a run, which each answer in a file carries: `--resume` compares it with its own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return 8 digits for all settings, then a character for each, in their order.

    The digits say whether all are the same, the characters which ones differ.
    """
    characters = "".join(base64.urlsafe_b64encode(_hashed(value)).decode()[0] for value in settings.values())
    return f"{_hashed(dict(settings)).hex()[:8]}-{characters}"


def differing(before: str, now: str, names: list[str]) -> list[str]:
    """Return the names of the settings that differ between two digests; [] if that cannot be said.

    One difference in 64 is overlooked: a character has six bits.
    """
    (_, _, old), (_, _, new) = before.partition("-"), now.partition("-")
    if not len(old) == len(new) == len(names):  # another version of this package made the file
        return []
    return [name for name, a, b in zip(names, old, new) if a != b]


def _hashed(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()
