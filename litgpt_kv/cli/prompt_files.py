"""Prompts from a file, read as a stream: what cannot be used is named by its line and stops no other."""

from __future__ import annotations

import json
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from litgpt_kv.config import SamplingArgs
from litgpt_kv.generate.stopping import Row
from litgpt_kv.llm.llm import LLM

JSON = (".jsonl", ".json", ".ndjson")
NUMBER = (int, float)
FIELDS: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,),
    "id": (str, int),
    "sys_prompt": (str,),
    "max_new_tokens": (int,),
    "min_new_tokens": (int,),
    "temperature": NUMBER,
    "top_k": (int, type(None)),
    "top_p": NUMBER,
    "repetition_penalty": NUMBER,
    "seed": (int,),
    "stop": (str, list),
}


@dataclass
class Line:
    """One prompt of a file.

    Attributes:
        number: of its line, from 1.
        fields: "prompt", and the settings that differ from those of the command.
        error: why it cannot be used, None if it can.
    """

    number: int
    fields: dict[str, Any]
    error: str | None = None


class PromptFile:
    """The prompts of a file, read line by line: of `.jsonl` (or `.json`, `.ndjson`) one JSON object a line, of all
    others one prompt a line; empty lines are left out. "-" is standard input, which is JSON if its first line is an
    object.

    Args:
        path: the file; it may be a pipe.

    Attributes:
        is_repeatable: whether it can be read more than once.

    Raises:
        ValueError: If the file cannot be read or has no line.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._head: list[tuple[int, bytes]] = []
        try:
            self._file: BinaryIO = sys.stdin.buffer if path == "-" else Path(path).open("rb")  # noqa: SIM115  (`close`)
            self.is_repeatable = path != "-" and stat.S_ISREG(Path(path).stat().st_mode)
            self._rest = _numbered(self._file)
            self._head = list(islice(self._rest, 1))
        except (OSError, ValueError) as error:
            raise ValueError(f"The prompts {path!r} cannot be read: {getattr(error, 'strerror', error)}.") from error
        if not self._head:
            raise ValueError(f"There are no prompts in {'standard input' if path == '-' else repr(path)}.")
        first = self._head[0][1]
        self.as_json = first.lstrip().startswith(b"{") if path == "-" else path.lower().endswith(JSON)

    def __iter__(self) -> Iterator[Line]:
        lines = chain(self._head, self._rest)
        if self.is_repeatable:
            self._file.seek(0)
            lines = _numbered(self._file)
        for number, raw in lines:
            yield _line(number, raw, self.as_json)

    def repeatable(self) -> PromptFile:
        """Make sure that it can be read more than once: a pipe is copied to a temporary file."""
        if not self.is_repeatable:
            spool, last = tempfile.TemporaryFile(), 0  # noqa: SIM115  (for as long as the prompts are read)
            for number, raw in chain(self._head, self._rest):
                spool.write(b"\n" * (number - last - 1) + raw + b"\n")
                last = number
            self._file, self.is_repeatable = spool, True
        return self

    def close(self) -> None:
        if self.path != "-" or self.is_repeatable:
            self._file.close()


def _numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not empty, with their numbers; a line may end as on any system."""
    number = 0
    for piece in file:
        for raw in piece.splitlines():
            number += 1
            if raw.strip():
                yield number, raw


def _line(number: int, raw: bytes, as_json: bool) -> Line:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        fields = json.loads(text) if as_json else {"prompt": text}
        if not as_json and "\0" in text:
            return Line(number, {}, "it is no text: it has NUL characters, as UTF-16 does")
        if isinstance(fields, dict):  # null is as good as nothing, but for top_k, where it means all
            fields = {name: value for name, value in fields.items() if value is not None or name == "top_k"}
        if fault := _fault(fields):
            return Line(number, {}, fault)
        if any("\ud800" <= c <= "\udfff" for c in json.dumps(fields, ensure_ascii=False)):
            return Line(number, {}, "it has half of a surrogate pair, which is no text")
    except (ValueError, RecursionError) as error:
        return Line(number, {}, f"it is no {'JSON' if as_json else 'UTF-8 text'}: {error}")
    return Line(number, fields)


def _fault(fields: Any) -> str | None:
    if not isinstance(fields, dict):
        return f"it is no object with a prompt but {fields!r:.60}"
    if unknown := [name for name in fields if name not in FIELDS]:
        return f"unknown {', '.join(map(repr, unknown))}; a line may have {', '.join(FIELDS)}"
    if not fields.get("prompt"):
        return "it has no prompt"
    for name, value in fields.items():
        if not isinstance(value, FIELDS[name]) or isinstance(value, bool):
            return f"{name} cannot be {value!r:.60}"
    return None


@dataclass
class Settings:
    """What a command says for all prompts; a line may say otherwise."""

    sys_prompt: str | None = None
    max_new_tokens: int = 50
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def row(self, llm: LLM, fields: Mapping[str, Any], index: int, sample: int = 0) -> Row:
        """A prompt as `LLM.run` takes it; its seed is that of the settings plus the number of the sample."""
        own = replace(self, **{name: value for name, value in fields.items() if name not in ("prompt", "id")})
        seed = None if own.seed is None else own.seed + sample
        sampling = SamplingArgs(own.temperature, own.top_k, own.top_p, seed, own.repetition_penalty)
        ends = own.max_new_tokens, own.min_new_tokens
        return llm.row(fields["prompt"], index, own.sys_prompt, *ends, sampling, own.stop, own.ignore_eos)
