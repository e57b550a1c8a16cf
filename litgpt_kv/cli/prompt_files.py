"""Read prompts from a file as a stream. A line that cannot be used gets an error; the others are still read."""

from __future__ import annotations

import json
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from litgpt_kv.llm.openai_batch import BatchLine, is_batch_line, read_batch_line
from litgpt_kv.llm.safe_load import one_line
from litgpt_kv.llm.text_request import TextRequest

JSON = (".jsonl", ".json", ".ndjson")
LONGEST_LINE = 64 * 2**20  # bytes


@dataclass
class Line:
    """One line of a prompt file.

    Attributes:
        number: The line number, from 1.
        request: The prompt and its settings, the command's where the line has none; None if it cannot be used.
        batch: The fields of OpenAI's batch format that the answer repeats; None for other lines.
        error: Why the line cannot be used, None if it can.
    """

    number: int
    request: TextRequest | None = None
    batch: BatchLine | None = None
    error: str | None = None

    @property
    def prompt(self) -> str:
        """Return the prompt as it is written into the answer: its text, or a conversation as JSON."""
        if self.request.messages is not None:
            return json.dumps(self.request.messages, ensure_ascii=False)
        return self.request.prompt or ""


class PromptFile:
    """Iterate over the prompts of a file.

    A `.jsonl`, `.json` or `.ndjson` file has one JSON object a line, any other file one prompt a line. Empty lines are
    skipped. "-" is standard input, which is read as JSON if its first line is an object.

    Args:
        path: The file; it may be a pipe.
        defaults: The settings that a line does not give.

    Attributes:
        is_repeatable: Whether the file can be read more than once.

    Raises:
        ValueError: If the file cannot be read or has no prompts.
    """

    def __init__(self, path: str, defaults: TextRequest | None = None) -> None:
        self.path, self.defaults = path, defaults or TextRequest()
        self._head: list[tuple[int, bytes]] = []
        try:
            mode = stat.S_IFIFO if path == "-" else Path(path).stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise ValueError(f"it is a {'folder' if stat.S_ISDIR(mode) else 'device'}, not a file")
            self._file: BinaryIO = sys.stdin.buffer if path == "-" else Path(path).open("rb")  # noqa: SIM115  (`close`)
            self.is_repeatable = stat.S_ISREG(mode)
            self._rest = _numbered(self._file)
            self._head = list(islice(self._rest, 1))
        except (OSError, ValueError) as error:
            raise ValueError(f"The prompts {path!r} cannot be read: {getattr(error, 'strerror', error)}.") from error
        if not self._head:
            self.close()
            raise ValueError(f"There are no prompts in {'standard input' if path == '-' else repr(path)}.")
        first = self._head[0][1]
        self.as_json = first.lstrip().startswith(b"{") if path == "-" else path.lower().endswith(JSON)

    def __iter__(self) -> Iterator[Line]:
        lines = chain(self._head, self._rest)
        if self.is_repeatable:
            self._file.seek(0)
            lines = _numbered(self._file)
        for number, raw in lines:
            yield _line(number, raw, self.as_json, self.defaults)

    def repeatable(self) -> PromptFile:
        """Return self, and copy a pipe to a temporary file, so that it can be read more than once."""
        if not self.is_repeatable:
            spool, last = tempfile.TemporaryFile(), 0  # noqa: SIM115  (`close` closes it)
            for number, raw in chain(self._head, self._rest):
                spool.write(b"\n" * (number - last - 1) + raw + b"\n")
                last = number
            self._file, self.is_repeatable = spool, True
        return self

    def close(self) -> None:
        if self.path != "-" or self.is_repeatable:
            self._file.close()


def _numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not empty, with the line ends of any system.

    Of a line that is too long, only the first `LONGEST_LINE` + 1 bytes are yielded.
    """
    number = 0
    while piece := file.readline(LONGEST_LINE + 1):
        rest = piece
        while not rest.endswith(b"\n") and (rest := file.readline(LONGEST_LINE)):
            pass
        for raw in piece.splitlines() if len(piece) <= LONGEST_LINE else [piece]:
            number += 1
            if raw.strip():
                yield number, raw


def _line(number: int, raw: bytes, as_json: bool, defaults: TextRequest) -> Line:
    if len(raw) > LONGEST_LINE:
        return Line(number, error=f"it is longer than {LONGEST_LINE:,} bytes")
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        record = json.loads(text) if as_json else {"prompt": text}
    except (ValueError, RecursionError) as error:
        return Line(number, error=f"it is not {'JSON' if as_json else 'UTF-8 text'}: {error}")
    if not as_json and "\0" in text:
        return Line(number, error="it is not UTF-8 text: it has NUL characters, as UTF-16 does")
    try:
        if is_batch_line(record):
            return Line(number, *read_batch_line(record, defaults))
        return Line(number, defaults.read(record))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        return Line(number, error=one_line(error))
