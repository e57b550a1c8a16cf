"""Answers of a prompt file: a file of JSON lines in which nothing is lost, or standard output in order."""

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

from litgpt_kv.disk import Appender, RunLock, check_target, reason, replacing
from litgpt_kv.parallel import Way

BEGIN = b'{"line": '  # of every answer
Key = tuple[int, int]  # a prompt's line, and the number of its sample
MOST_LINES, MOST_SAMPLES = 2**40, 2**20  # so that a key is one integer of 64 bits
FAILED = "error"  # the reason of a row that did not end well
NUMBER = (int, float)
NEEDED: Mapping[str, tuple[type, ...]] = {"line": (int,), "prompt": (str,), "text": (str,), "finish_reason": (str,)}
TYPES: Mapping[str, tuple[type, ...]] = {
    **NEEDED,
    **{"sample": (int,), "id": (int, str), "run": (str,), "tokens": (list,), "logprobs": (list,)},
    **{"prompt_tokens": (int,), "new_tokens": (int,), "seconds": NUMBER, "first_token_seconds": NUMBER},
}


class AnswerIndex:
    """Where the answers of a file begin, and a digest of what each one answers: 24 bytes an answer."""

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
        """Bring the answers into the order of their keys; of several with one key the last one stays."""
        if self.is_sorted():
            return
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)  # stable
        last = [i for i, after in zip(order, [*order[1:], None]) if after is None or self.keys[i] != self.keys[after]]
        for name, column in vars(self).items():
            setattr(self, name, array("q", map(column.__getitem__, last)))

    def find(self, key: Key) -> int | None:
        """Return which answer of a sorted index has this key."""
        i = bisect_left(self.keys, _number(key))
        return i if i < len(self.keys) and self.keys[i] == _number(key) else None


class Answers:
    """Take answers as they are finished.

    A file gets each one at once, so that an interrupted run loses none; at the end they are brought into the order of
    the prompts. Standard output gets each one as soon as all before it are there. One run at a time writes a file.

    Where several processes divide the prompts (`Way.divided`), process 0 writes the file and each other one a part
    beside it, which is emptied whenever process 0 has taken over what is in it (`merge`).

    Args:
        path: the file; None or "-" is standard output.
        resume: go on with a file that exists.
        run: a digest of the settings; answers made with others are not continued.

    Attributes:
        before: the answers that a run before left.
        added: how many this run made.
        matched: how many of those before answer a prompt of this run.

    Raises:
        ValueError: If the file exists and `resume` is not given, if it holds something else, if it cannot be written,
            or if another run is writing it.
    """

    def __init__(self, path: str | None, resume: bool = False, run: str = "") -> None:
        self.path, self.run = None if path in (None, "-") else Path(path), run
        self.before, self.added, self.matched = AnswerIndex(), 0, 0
        self.way: Way | None = None
        self._made = AnswerIndex()  # by this run
        self._lock: RunLock | None = None
        self._appender: Appender | None = None
        self._torn = 0  # bytes of a last line that was not finished
        self._untidy = False  # the file has more than its answers, or these are in another order
        self._expected: deque[Key] = deque()  # of standard output, in order
        self._early: dict[Key, dict[str, Any]] = {}  # answers that wait for those before them
        if self.path is None:
            if resume:
                raise ValueError("--resume continues a file: give it with --out.")
            return
        check_target(self.path)
        RunLock(self.path).release()  # said before a model is loaded; `begin` takes it
        files = [file for file in (self.path, *self.parts()) if file.exists() and file.stat().st_size]
        if files and not resume:
            raise ValueError(f"{files[0]} exists: --resume continues it, or choose another name.")
        self._found = self._state()
        for file in files:
            self._scan(file)
        self._untidy = self._untidy or self._torn > 0 or not self.before.is_sorted()
        self.before.sort()

    def __len__(self) -> int:
        """How many answers there are: in the file, or printed."""
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
        return self.way is not None and self.way.divided

    @property
    def rank(self) -> int:
        return 0 if self.way is None else self.way.team.rank

    def parts(self) -> list[Path]:
        """Return the files of the processes that divided a run."""
        found = self.path.parent.glob(f"{glob.escape(self.path.name)}.part*")
        return sorted(file for file in found if file.name.rpartition(".part")[2].isdigit())

    def begin(self, way: Way | None) -> None:
        """Take the file for this run, and what parts of a run before hold; all processes call it.

        Raises:
            ValueError: If another run has it or changed it meanwhile.
        """
        self.way = way
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
        if way is not None and (problem := way.team.same(problem)):
            raise ValueError(problem)
        if problem:
            raise ValueError(problem)
        self._adopt_parts()

    def expect(self, key: Key) -> None:
        """Note that this answer will come next in order; standard output waits for it."""
        if self.path is None:
            self._expected.append(key)

    def matches(self, key: Key, prompt: str) -> bool:
        """Return whether an answer is there already.

        Raises:
            ValueError: If it answers another prompt, or was made with other settings.
        """
        i = self.before.find(key)
        if i is None:
            return False
        if self.before.digests[i] != _digest(prompt, self.run):
            raise ValueError(self._mismatch(i, key, prompt))
        self.matched += 1
        return True

    def add(self, record: dict[str, Any], elsewhere: bool = False) -> None:
        """Take a finished answer; one made `elsewhere` is in another process' part.

        Raises:
            ValueError: If it cannot be written; all before it are kept.
        """
        if self.rank and (elsewhere or not self.divided):
            return  # process 0 has the same, and writes it
        self.added += 1
        if self.path is None:
            self._print(record)
            return
        record = {**record, "run": self.run} if self.run else record
        self._append(key_of(record), _digest(record["prompt"], self.run), _encoded(record))

    def merge(self) -> None:
        """Empty the parts: process 0 has written what they hold. All processes call it."""
        if self.path is None or not self.divided:
            return
        self.way.meet()
        if self.rank:
            self._close_file()
            self._file.unlink(missing_ok=True)

    def close(self) -> None:
        """Bring a file into the order of the prompts, and let others write it.

        Raises:
            ValueError: If that fails; the answers are then in the order in which they were made.
        """
        self._close_file()
        try:
            if self.path is not None and self.rank == 0:
                self._order()
        finally:
            if self._lock is not None:
                self._lock.release()
        if self.divided:
            self.way.meet()  # until the file is whole

    @property
    def _file(self) -> Path:
        """Where this process writes."""
        return self.path.with_name(f"{self.path.name}.part{self.rank}") if self.rank else self.path

    def _state(self) -> list[tuple[str, int, int, int]]:
        """What another run would change."""
        files = [(file, file.stat()) for file in (self.path, *self.parts()) if file.exists()]
        return [(str(file), s.st_ino, s.st_size, s.st_mtime_ns) for file, s in files]

    def _scan(self, path: Path) -> None:
        """Check all answers of a file, and note where those of the main file are."""
        for offset, line, record in self._records(path):
            if record is None:
                self._torn = len(line) if path == self.path else 0
            elif path != self.path:
                continue
            elif record["finish_reason"] == FAILED:  # will be tried again
                self._untidy = True
            else:
                self.before.add(key_of(record), _digest(record["prompt"], record.get("run", self.run)), offset)

    def _records(self, path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
        """Yield offset, bytes and content of each line of a file; None for a last line that was not finished."""
        offset, number = 0, 0
        try:
            with path.open("rb") as file:
                for line in file:
                    number += 1
                    if line.endswith(b"\n"):
                        yield offset, line, _decoded(line)
                    elif line.startswith(BEGIN) or BEGIN.startswith(line):
                        yield offset, line, None
                    else:
                        raise ValueError("it does not begin as one")
                    offset += len(line)
        except OSError as error:
            raise ValueError(f"{path} cannot be continued: {reason(error)}.") from error
        except ValueError as error:
            what = f"line {number} is no answer of a run before: {error}"
            raise ValueError(f"{path} cannot be continued: {what}.") from error

    def _adopt_parts(self) -> None:
        """Take over what processes of a run before had written on their own; tell all processes what is there."""
        found: dict[Key, bytes] = {}
        for part in self.parts():
            for _, line, record in self._records(part):
                if record is not None and record["finish_reason"] != FAILED:
                    key = key_of(record)
                    found |= {key: line} if self.before.find(key) is None else {}
        if self.way is not None:  # machines may have folders of their own
            for theirs in self.way.team.collect(found):
                found |= theirs
        if self.rank == 0:
            for key, line in found.items():
                record = _decoded(line)
                self._append(key, _digest(record["prompt"], record.get("run", self.run)), line)
            self.before.extend(self._made)
            self._untidy = self._untidy or not self.before.is_sorted()
            self.before.sort()
            self._made = AnswerIndex()
        if self.way is not None:
            self.before = self.way.team.same(self.before)
        for part in self.parts():
            part.unlink(missing_ok=True)

    def _mismatch(self, i: int, key: Key, prompt: str) -> str:
        record = {}
        if self.rank == 0:
            with self.path.open("rb") as file:
                file.seek(self.before.offsets[i])
                record = _decoded(file.readline())
        if record.get("prompt") == prompt:
            return f"{self.path} was made with other settings than these: give it those, or another name."
        was = f": line {key[0]} was {record['prompt']!r:.60}" if record else ""
        return f"{self.path} answers other prompts than these{was}."

    def _append(self, key: Key, digest: int, line: bytes) -> None:
        if self._appender is None:  # not before there is something to write
            self._appender = Appender(self._file, 0 if self.rank else self._torn)
            self._torn = 0
        offset = self._appender.size
        try:
            self._appender.write(line)
        except OSError as error:
            kept = f"the {len(self) - 1:,} answers before it are kept; make room, and --resume goes on"
            raise ValueError(f"{self._file} cannot take another answer: {reason(error)}; {kept}.") from error
        self._made.add(key, digest, offset)

    def _print(self, record: dict[str, Any]) -> None:
        self._early[key_of(record)] = record
        while self._expected and self._expected[0] in self._early:
            line = _encoded(self._early.pop(self._expected.popleft())).decode()
            try:
                sys.stdout.write(line)
                sys.stdout.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                given = self.added - len(self._early) - 1
                what = f"{reason(error)}; {given:,} answers were written; with --out FILE a run can go on"
                raise ValueError(f"Standard output cannot take another answer: {what}.") from error

    def _close_file(self) -> None:
        if self._appender is not None:
            self._appender.close()
            self._appender = None

    def _order(self) -> None:
        index = AnswerIndex()
        index.extend(self.before)
        index.extend(self._made)
        if not len(index) or (index.is_sorted() and not self._untidy):
            return
        index.sort()
        try:
            with replacing(self.path) as beside, self.path.open("rb") as file, beside.open("wb") as ordered:
                for offset in index.offsets:
                    file.seek(offset)
                    ordered.write(file.readline())
        except ValueError as error:
            kept = f"All {len(index):,} answers are in it, in the order in which they were made; --resume orders them."
            raise ValueError(f"{error} {kept}") from error


def key_of(record: Mapping[str, Any]) -> Key:
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
        ValueError: If it is none.
    """
    try:
        record = json.loads(line.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict) or (missing := [name for name in NEEDED if name not in record]):
        raise ValueError("it is no object" if not isinstance(record, dict) else f"it has no {missing[0]}")
    for name, value in record.items():
        if name in TYPES and (not isinstance(value, TYPES[name]) or isinstance(value, bool)):
            raise ValueError(f"{name} cannot be {value!r:.40}")
    line_number, sample = key_of(record)
    if not (1 <= line_number < MOST_LINES and 0 <= sample < MOST_SAMPLES):
        raise ValueError(f"line {line_number!r:.40} or sample {sample!r:.40} is out of range")
    return record
