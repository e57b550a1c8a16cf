"""A short text for the settings of a run, which each answer in a file carries: `--resume` compares it with its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

LONGEST = 40  # characters of a value; a longer one is replaced by a digest


def digest_of(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return 8 digits for all settings, then those that are not the defaults, as JSON."""
    own = {name: _short(value) for name, value in settings.items() if value != defaults.get(name)}
    return f"{_hashed(dict(settings))[:8]} {json.dumps(own)}"


def differing(before: str, now: str, defaults: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ between two digests, as "top_k 50, now 9"; [] if that cannot be said."""
    try:
        old, new = (json.loads(text.partition(" ")[2]) for text in (before, now))
    except ValueError:  # another version of this package made the file
        return []
    if not isinstance(old, dict) or not isinstance(new, dict):
        return []
    known = {name: _short(value) for name, value in defaults.items()}
    old, new = known | old, known | new
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return [f"{name} {_shown(old.get(name))}, now {_shown(new.get(name))}" for name in names]


def _short(value: Any) -> Any:
    text = json.dumps(value)
    return value if len(text) <= LONGEST else f"#{_hashed(value)[:6]}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
