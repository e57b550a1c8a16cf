"""Write the answers to a prompt file: to a file of JSON lines that survives interruptions, or to standard output."""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from litgpt_kv.cli.run_digest import differing
from litgpt_kv.disk import Appender, RunLock, check_target, reason, replacing
from litgpt_kv.parallel import ParallelStrategy

RECORD_START = b'{"line": '  # every answer starts with these bytes
Key = tuple[int, int]  # line number of the prompt, sample number
MOST_LINES, MOST_SAMPLES = 2**40, 2**20  # a key fits into one 64-bit integer
FAILED = "error"  # the finish_reason of a failed answer
NUMBER = (int, float)
REQUIRED: Mapping[str, tuple[type, ...]] = {"line": (int,), "prompt": (str,), "text": (str,), "finish_reason": (str,)}
TYPES: Mapping[str, tuple[type, ...]] = {
    **REQUIRED,
    **{"sample": (int,), "id": (int, str), "run": (str,), "tokens": (list,), "logprobs": (list,)},
    **{"prompt_tokens": (int,), "new_tokens": (int,), "seconds": NUMBER, "first_token_seconds": NUMBER},
}


class AnswerIndex:
    """Map each answer's key to its byte offset in the file and to a digest of its prompt: 24 bytes an answer."""

    def __init__(self) -> None:
        self.keys, self.digests, self.offsets = array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: Key, digest: int, offset: int) -> None:
        self.keys.append(_number(key))
        self.digests.append(digest)
        self.offsets.append(offset)

    def extend(self, other: AnswerIndex) -> None:
        for name, column in vars(self).items():
            column.extend(getattr(other, name))

    def is_sorted(self) -> bool:
        return all(self.keys[i] < self.keys[i + 1] for i in range(len(self.keys) - 1))

    def sort(self) -> None:
        """Sort by key. If several answers have the same key, keep the last one."""
        if self.is_sorted():
            return
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)  # stable
        last = [i for i, after in zip(order, [*order[1:], None]) if after is None or self.keys[i] != self.keys[after]]
        for name, column in vars(self).items():
            setattr(self, name, array("q", map(column.__getitem__, last)))

    def find(self, key: Key) -> int | None:
        """Return the index of the answer with this key, or None. The answers must be sorted."""
        i = bisect_left(self.keys, _number(key))
        return i if i < len(self.keys) and self.keys[i] == _number(key) else None


class Answers:
    """Write answers as they are finished.

    Each answer is appended to the file at once, so an interrupted run loses none; `close` sorts the file into the order
    of the prompts. Standard output is always in that order: an answer waits until all earlier ones are printed. Only
    one run at a time can write a file.

    If several processes divide the prompts (`ParallelStrategy.divides_prompts`), process 0 writes the file. Every other
    process writes a part file next to it, `NAME.partRANK`, and deletes it when process 0 has its answers (`merge`).

    Args:
        path: The file; None or "-" is standard output.
        resume: Continue a file that exists.
        run: A digest of the settings (`digest_of`); a file that was written with other settings is not continued.
        defaults: The settings' defaults, for the message.

    Attributes:
        before: The answers of an earlier run.
        added: How many answers this run made.
        matched: How many answers of `before` are for a prompt of this run.

    Raises:
        ValueError: If the file exists and `resume` is not given, if its content is not answers, if it cannot be
            written, or if another run is writing it.
    """

    def __init__(self, path: str | None, resume: bool = False, run: str = "", defaults: Mapping[str, Any] = {}) -> None:
        self.path, self.run, self.defaults = None if path in (None, "-") else Path(path), run, defaults
        self.before, self.added, self.matched = AnswerIndex(), 0, 0
        self.parallel: ParallelStrategy | None = None
        self._made = AnswerIndex()  # by this run
        self._lock: RunLock | None = None
        self._appender: Appender | None = None
        self._torn = 0  # bytes of an unfinished last line
        self._needs_rewrite = False  # the file is unsorted, or has lines to drop
        self._expected: deque[Key] = deque()  # what standard output prints next, in order
        self._waiting: dict[Key, dict[str, Any]] = {}  # finished, but an earlier one is not
        if self.path is None:
            if resume:
                raise ValueError("--resume continues a file: give it with --out.")
            return
        check_target(self.path)
        RunLock(self.path).release()  # fail before a model is loaded; `begin` locks it for the run
        files = [file for file in (self.path, *self.parts()) if file.exists() and file.stat().st_size]
        if files and not resume:
            raise ValueError(f"{files[0]} exists: --resume continues it, or choose another name.")
        self._found = self._state()
        for file in files:
            self._scan(file)
        self._needs_rewrite = self._needs_rewrite or self._torn > 0 or not self.before.is_sorted()
        self.before.sort()

    def __len__(self) -> int:
        """Return how many answers are in the file, or were printed."""
        return len(self.before) + self.added

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._appender is not None:
            self._appender.close()
            self._appender = None
        if self._lock is not None:
            self._lock.release()

    @property
    def divided(self) -> bool:
        return self.parallel is not None and self.parallel.divides_prompts

    @property
    def rank(self) -> int:
        return 0 if self.parallel is None else self.parallel.collectives.rank

    def parts(self) -> list[Path]:
        """Return the part files of other processes, those of an interrupted run too."""
        found = self.path.parent.glob(f"{glob.escape(self.path.name)}.part*")
        return sorted(file for file in found if file.name.rpartition(".part")[2].isdigit())

    def begin(self, parallel: ParallelStrategy | None) -> None:
        """Lock the file, and move the answers of leftover part files into it. All processes must call this.

        Raises:
            ValueError: If another run has locked the file, or has changed it since it was opened.
        """
        self.parallel = parallel
        if self.path is None:
            return
        problem = None
        if self.rank == 0:
            try:
                self._lock = RunLock(self.path)
                if self._state() != self._found:
                    problem = f"{self.path} was changed by another run while this one started: start it again."
            except ValueError as error:
                problem = str(error)
        if parallel is not None and (problem := parallel.collectives.broadcast_object(problem)):
            raise ValueError(problem)
        if problem:
            raise ValueError(problem)
        self._adopt_parts()

    def expect(self, key: Key) -> None:
        """Register the next key in the order of the prompts; standard output waits for its answer."""
        if self.path is None:
            self._expected.append(key)

    def matches(self, key: Key, prompt: str) -> bool:
        """Return whether an earlier run has answered this prompt.

        Raises:
            ValueError: If the answer with this key is for another prompt, or was made with other settings.
        """
        i = self.before.find(key)
        if i is None:
            return False
        if self.before.digests[i] != _digest(prompt, self.run):
            raise ValueError(self._mismatch(i, key, prompt))
        self.matched += 1
        return True

    def add(self, record: dict[str, Any], remote: bool = False) -> None:
        """Write a finished answer. A `remote` one was made by another process, and is in its part file too.

        Raises:
            ValueError: If it cannot be written; all earlier answers are kept.
        """
        if self.rank and (remote or not self.divided):
            return  # process 0 writes it
        self.added += 1
        if self.path is None:
            self._print(record)
            return
        record = {**record, "run": self.run} if self.run else record
        self._append(key_of(record), _digest(record["prompt"], self.run), _encoded(record))

    def merge(self) -> None:
        """Delete the part files, whose answers process 0 has written. All processes must call this."""
        if self.path is None or not self.divided:
            return
        self.parallel.synchronize()
        if self.rank:
            self._close_file()
            self._file.unlink(missing_ok=True)

    def close(self) -> None:
        """Sort the file into the order of the prompts, and unlock it.

        Raises:
            ValueError: If sorting fails; the answers then stay in the order in which they were made.
        """
        self._close_file()
        try:
            if self.path is not None and self.rank == 0:
                self._order()
        finally:
            if self._lock is not None:
                self._lock.release()
        if self.divided:
            self.parallel.synchronize()  # wait until process 0 has sorted the file

    @property
    def _file(self) -> Path:
        """Return the file that this process writes."""
        return self.path.with_name(f"{self.path.name}.part{self.rank}") if self.rank else self.path

    def _state(self) -> list[tuple[str, int, int, int]]:
        """Return path, inode, size and time of each file: another run would change at least one."""
        files = [(file, file.stat()) for file in (self.path, *self.parts()) if file.exists()]
        return [(str(file), s.st_ino, s.st_size, s.st_mtime_ns) for file, s in files]

    def _scan(self, path: Path) -> None:
        """Check all answers of a file, and index those of the main file."""
        for offset, line, record in self._records(path):
            if record is None:
                self._torn = len(line) if path == self.path else 0
            elif path != self.path:
                continue
            elif record["finish_reason"] == FAILED:  # it will be tried again
                self._needs_rewrite = True
            else:
                self.before.add(key_of(record), _digest(record["prompt"], record.get("run", self.run)), offset)

    def _records(self, path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
        """Yield offset, bytes and record of each line of a file; the record of an unfinished last line is None."""
        offset, number = 0, 0
        try:
            with path.open("rb") as file:
                for line in file:
                    number += 1
                    if line.endswith(b"\n"):
                        yield offset, line, _decoded(line)
                    elif line.startswith(RECORD_START) or RECORD_START.startswith(line):
                        yield offset, line, None
                    else:
                        raise ValueError("it does not start like one")
                    offset += len(line)
        except OSError as error:
            raise ValueError(f"{path} cannot be continued: {reason(error)}.") from error
        except ValueError as error:
            what = f"line {number} is not an answer of an earlier run: {error}"
            raise ValueError(f"{path} cannot be continued: {what}.") from error

    def _adopt_parts(self) -> None:
        """Move the answers of an interrupted run's part files into the file; give all processes the same index."""
        found: dict[Key, bytes] = {}
        for part in self.parts():
            for _, line, record in self._records(part):
                if record is not None and record["finish_reason"] != FAILED:
                    key = key_of(record)
                    found |= {key: line} if self.before.find(key) is None else {}
        if self.parallel is not None:  # each machine may have its own folder
            for lines in self.parallel.collectives.all_gather_object(found):
                found |= lines
        if self.rank == 0:
            for key, line in found.items():
                record = _decoded(line)
                self._append(key, _digest(record["prompt"], record.get("run", self.run)), line)
            self.before.extend(self._made)
            self._needs_rewrite = self._needs_rewrite or not self.before.is_sorted()
            self.before.sort()
            self._made = AnswerIndex()
        if self.parallel is not None:
            self.before = self.parallel.collectives.broadcast_object(self.before)
        for part in self.parts():
            part.unlink(missing_ok=True)

    def _mismatch(self, i: int, key: Key, prompt: str) -> str:
        record = {}
        if self.rank == 0:
            with self.path.open("rb") as file:
                file.seek(self.before.offsets[i])
                record = _decoded(file.readline())
        if record.get("prompt") == prompt:
            settings = "; ".join(differing(record.get("run", ""), self.run, self.defaults))
            what = f" ({settings})" if settings else ""
            return f"{self.path} was made with other settings{what}: use the same ones, or give --out another name."
        was = f": line {key[0]} was {record['prompt']!r:.60}" if record else ""
        return f"{self.path} has answers to other prompts{was}."

    def _append(self, key: Key, digest: int, line: bytes) -> None:
        if self._appender is None:  # opened only when there is something to write
            self._appender = Appender(self._file, 0 if self.rank else self._torn)
            self._torn = 0
        offset = self._appender.size
        try:
            self._appender.write(line)
        except OSError as error:
            kept = f"the {len(self) - 1:,} answers before it are kept; make room, and continue with --resume"
            raise ValueError(f"{self._file} cannot be written: {reason(error)}; {kept}.") from error
        self._made.add(key, digest, offset)

    def _print(self, record: dict[str, Any]) -> None:
        self._waiting[key_of(record)] = record
        while self._expected and self._expected[0] in self._waiting:
            line = _encoded(self._waiting.pop(self._expected.popleft())).decode()
            if self.rank:
                continue  # process 0 prints it
            try:
                sys.stdout.write(line)
                sys.stdout.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                printed = self.added - len(self._waiting) - 1
                what = f"{reason(error)}; {printed:,} answers were written; a run with --out FILE can be continued"
                raise ValueError(f"Standard output cannot be written: {what}.") from error

    def _close_file(self) -> None:
        if self._appender is not None:
            self._appender.close()
            self._appender = None

    def _order(self) -> None:
        index = AnswerIndex()
        index.extend(self.before)
        index.extend(self._made)
        if not len(index) or (index.is_sorted() and not self._needs_rewrite):
            return
        index.sort()
        try:
            with replacing(self.path) as beside, self.path.open("rb") as file, beside.open("wb") as ordered:
                for offset in index.offsets:
                    file.seek(offset)
                    ordered.write(file.readline())
        except ValueError as error:
            kept = f"All {len(index):,} answers are in it, in the order in which they were made; --resume sorts them."
            raise ValueError(f"{error} {kept}") from error


def key_of(record: Mapping[str, Any]) -> Key:
    """Return the line number and the sample number of an answer."""
    return record["line"], record.get("sample", 0)


def _number(key: Key) -> int:
    return key[0] * MOST_SAMPLES + key[1]


def _digest(prompt: str, run: str) -> int:
    text = f"{run}\0{prompt}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def _encoded(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _decoded(line: bytes) -> dict[str, Any]:
    """Read one answer.

    Raises:
        ValueError: If the line is not an answer.
    """
    try:
        record = json.loads(line.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict) or (missing := [name for name in REQUIRED if name not in record]):
        raise ValueError("it is not a JSON object" if not isinstance(record, dict) else f"it has no {missing[0]}")
    for name, value in record.items():
        if name in TYPES and (not isinstance(value, TYPES[name]) or isinstance(value, bool)):
            raise ValueError(f"{name} cannot be {value!r:.40}")
    line_number, sample = key_of(record)
    if not (1 <= line_number < MOST_LINES and 0 <= sample < MOST_SAMPLES):
        raise ValueError(f"line {line_number!r:.40} or sample {sample!r:.40} is out of range")
    return record
