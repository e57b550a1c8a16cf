"""Read a GGUF file: metadata by name, and tensors, dequantised a block of rows at a time.

The `gguf` package names the types and dequantises. Its `GGUFReader` is not used: it believes every count in a file (an
array of 2**60 numbers in a file of 100 bytes never ends), and takes seconds for a real vocabulary.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from litgpt_kv.config import shown
from litgpt_kv.llm.safe_load import one_line

VERSIONS = (2, 3)
MOST_KEYS = 65_536
MOST_TENSORS = 131_072
MOST_ITEMS = 2**23  # of all arrays together: Gemma's vocabulary and scores are half a million
MOST_NAME = 65_535  # bytes of a key, as the format says
MOST_DEPTH = 3  # of arrays in arrays
MOST_DIMENSIONS = 4
BLOCK = 2**22  # numbers that are dequantised at a time

SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is. shape: rows first, as numpy and torch have it. start, nbytes: in the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file that was checked: every count and offset lies inside of the file.

    Args:
        path: The file.

    Attributes:
        metadata: Numbers, texts, truth values, and lists of these, by key. tensors: By name.

    Raises:
        ValueError: If it is no GGUF file, or truncated, damaged or not one that is read here; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            if not self.path.is_file():
                raise ValueError("it is no file" if self.path.exists() else "there is no such file")
            with self.path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise ValueError("it is no GGUF file: it does not begin with 'GGUF'")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read()
        except (ValueError, OSError, OverflowError, MemoryError) as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
            raise ValueError(f"{self} cannot be read: {text}.") from error

    def __str__(self) -> str:
        return f"{str(self.path)!r:.300}"

    # -- what it says --------------------------------------------------------------------------------------------------

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata, `default` if it is not there.

        Raises:
            ValueError: If it is of another type; bool is no int here, and int is a float.
        """
        value = self.metadata.get(key, default)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if value is not default and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ValueError(f"{key} must be {' or '.join(k.__name__ for k in kinds)}, got {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} must be finite, got {value}")
        return value

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A value that must be there; see `get`.

        Raises:
            ValueError: If it is missing or of another type.
        """
        if key not in self.metadata:
            raise ValueError(f"its metadata lack {key!r}")
        return self.get(key, kind)

    def texts(self, key: str) -> list[str] | None:
        """An array of texts, None if it is not there.

        Raises:
            ValueError: If it holds anything else.
        """
        values = self.get(key, list)
        if values is not None and not all(isinstance(value, str) for value in values):
            raise ValueError(f"{key} must hold texts")
        return values

    def blocks(self, tensor: GGUFTensor) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of a tensor in float32, some at a time: the first one's number, and the rows, 2-D.

        Raises:
            ValueError: If its type cannot be dequantised, or a number is not finite.
        """
        width = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        data = np.frombuffer(self._bytes, np.uint8, tensor.nbytes, tensor.start).reshape(rows, -1)
        step = max(1, BLOCK // width)
        for first in range(0, rows, step):
            try:
                with np.errstate(all="ignore"):
                    block = np.require(dequantize(data[first : first + step], tensor.kind), np.float32, "W")
            except NotImplementedError as error:
                raise ValueError(f"{tensor.name!r} is {tensor.kind.name}, which gguf cannot dequantise") from error
            if not np.isfinite(block).all():
                raise ValueError(f"{tensor.name!r} has numbers that are not finite")
            yield first, block

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        self._at, self._items = 4, 0
        version = self._number("I")
        if version & 0xFFFF == 0:
            raise ValueError("it is big-endian: convert it with gguf's gguf_convert_endian")
        if version not in VERSIONS:
            raise ValueError(f"it has version {version}; versions {' and '.join(map(str, VERSIONS))} are read")
        tensors, keys = self._number("Q"), self._number("Q")
        for what, count, most in (("tensors", tensors, MOST_TENSORS), ("keys", keys, MOST_KEYS)):
            if count > most:
                raise ValueError(f"it claims {count:,} {what}, over the limit of {most:,}")
        for _ in range(keys):
            key = self._text(MOST_NAME)
            if key in self.metadata:
                raise ValueError(f"it has the key {shown(key)} twice")
            self.metadata[key] = self._value(self._kind())
        found = [self._tensor() for _ in range(tensors)]
        align = self.get("general.alignment", int, 32)
        if align < 1 or align & (align - 1) or align > 2**20:
            raise ValueError(f"general.alignment must be a power of two up to {2**20:,}, got {align}")
        begin = -(-self._at // align) * align
        total = 0
        for name, shape, kind, offset in found:
            tensor = self._placed(name, shape, kind, begin + offset, align)
            if name in self.tensors:
                raise ValueError(f"it has the tensor {shown(name)} twice")
            self.tensors[name] = tensor
            total += tensor.nbytes
        if total > len(self._bytes):
            raise ValueError(f"its tensors overlap: {total:,} bytes of them in a file of {len(self._bytes):,}")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, start: int, align: int) -> GGUFTensor:
        try:
            kind = GGMLQuantizationType(kind)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{shown(name)} is of the unknown type {shown(kind)}") from error
        if shape[-1] % block:
            raise ValueError(f"{shown(name)}: rows of {shape[-1]:,} are no whole blocks of {block}")
        nbytes = math.prod(shape) // block * size
        if start % align:
            raise ValueError(f"{shown(name)} does not begin at a multiple of {align}")
        if start + nbytes > len(self._bytes):
            there = len(self._bytes)
            raise ValueError(f"it is truncated: {shown(name)} ends at byte {start + nbytes:,} of {there:,}")
        return GGUFTensor(name, shape, kind, start, nbytes)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(MOST_NAME)
        count = self._number("I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise ValueError(f"{shown(name)} has {count:,} dimensions; 1 to {MOST_DIMENSIONS} are allowed")
        sizes = tuple(self._number("Q") for _ in range(count))
        if not all(0 < size < 2**40 for size in sizes):
            raise ValueError(f"{shown(name)} has the sizes {shown(sizes)}")
        return name, sizes[::-1], self._number("I"), self._number("Q")

    def _take(self, size: int) -> int:
        """Move past `size` bytes; return where they begin."""
        begin = self._at
        if begin + size > len(self._bytes):
            there = len(self._bytes)
            raise ValueError(f"it is truncated or damaged: {size:,} bytes at {begin:,} of {there:,} were to be read")
        self._at += size
        return begin

    def _number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self._bytes, self._take(struct.calcsize("<" + code)))[0]

    def _kind(self) -> GGUFValueType:
        number = self._number("I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise ValueError(f"it is damaged: a value of the unknown type {number}") from error

    def _text(self, most: int | None = None) -> str:
        size = self._number("Q")
        if most is not None and size > most:
            raise ValueError(f"it is damaged: a name of {size:,} bytes")
        begin = self._take(size)
        try:
            return self._bytes[begin : begin + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("it is damaged: a text is no UTF-8") from error

    def _value(self, kind: GGUFValueType, depth: int = 0) -> Any:
        if kind is GGUFValueType.STRING:
            return self._text()
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        inner, count = self._kind(), self._number("Q")
        self._items += count
        if self._items > MOST_ITEMS:
            raise ValueError(f"its arrays have more than the limit of {MOST_ITEMS:,} values")
        if inner in SCALARS:
            code = SCALARS[inner]
            return list(struct.unpack_from(f"<{count}{code}", self._bytes, self._take(count * struct.calcsize(code))))
        if inner is GGUFValueType.ARRAY and depth >= MOST_DEPTH:
            raise ValueError(f"its arrays are nested deeper than {MOST_DEPTH}")
        return [self._value(inner, depth + 1) for _ in range(count)]
