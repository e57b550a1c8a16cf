"""Put a record into one HTML page that loads nothing else.

Arrays travel as text: little-endian, compressed with zlib, in base64. Browsers unpack them in milliseconds.
"""

from __future__ import annotations

import base64
import json
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from litgpt_kv.disk import write_text
from litgpt_kv.inspect.records import CacheRecord, Record

MARK = "/* the data stand here */ null"


def write_page(record: Record, path: str | Path) -> int:
    """Write the page of a record; return its size in bytes.

    Raises:
        ValueError: If the file cannot be written.
    """
    text = page(record)
    write_text(path, text)
    return len(text.encode())


def page(record: Record) -> str:
    """Return the page of a record: HTML with its style, its script and the data."""
    template = files("litgpt_kv.inspect").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(page_data(record), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # so that no text of a token ends the script
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace(MARK, data)


def page_data(record: Record) -> dict[str, Any]:
    """Return the data of a page as values for JSON.

    `left`, `kl` and `lost` are arrays as in `CacheRecord`: uint16, float32, and uint16 in 65,535ths. `best` are uint32
    numbers in `words`, `odds` are uint8 in 255ths.
    """
    words = list(record.words)
    layers, heads, _ = record.caches[0].left.shape
    return {
        "model": record.model,
        "tokens": record.texts,
        "start": record.start,
        "states": record.states,
        "layers": layers,
        "heads": heads,
        "words": [record.words[id] for id in words],
        "full": {"allocated": record.allocated, **_next_tokens(record, words)},
        "caches": [_cache_data(one, words) for one in record.caches],
    }


def _cache_data(one: CacheRecord, words: list[int]) -> dict[str, Any]:
    return {
        "name": one.name,
        "allocated": one.allocated,
        "left": packed(one.left, "<u2"),
        "kl": packed(one.kl, "<f4"),
        "lost": packed((one.lost * 65_535).round(), "<u2"),
        **_next_tokens(one, words),
    }


def _next_tokens(one: Record | CacheRecord, words: list[int]) -> dict[str, str]:
    best = np.searchsorted(words, one.best)  # `words` are sorted
    return {"best": packed(best, "<u4"), "odds": packed((one.odds * 255).round(), "u1")}


def packed(array: np.ndarray, kind: str) -> str:
    """Return an array as text: in the given NumPy type, compressed with zlib, in base64."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).astype(kind).tobytes(), 9)).decode()
