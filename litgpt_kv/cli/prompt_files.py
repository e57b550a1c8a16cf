"""Prompts from a file and answers to one: what cannot be used is named by its line, what is finished is never lost.

Floor 6.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate.base import check
from litgpt_kv.generate.runners import Limits
from litgpt_kv.generate.stopping import Row
from litgpt_kv.llm.llm import LLM
from litgpt_kv.parallel import ParallelStrategy

BEGIN = b'{"line": '  # of every answer
Place = tuple[int, int]  # a prompt's line and the number of its sample
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
        number: Of its line, from 1.
        fields: "prompt", and the settings that differ from those of the command.
        error: Why it cannot be used, None if it can.
    """

    number: int
    fields: dict[str, Any]
    error: str | None = None


def read_prompts(path: str) -> list[Line]:
    """The prompts of a file: of `.jsonl` (or `.json`, `.ndjson`) one JSON object a line, of all others one prompt a
    line; empty lines are left out. "-" is standard input, which is JSON if its first line is an object.

    Raises:
        ValueError: If the file cannot be read or has no line.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"The prompts {path!r} cannot be read: {error.strerror}.") from error
    lines = [(n, raw) for n, raw in enumerate(data.splitlines(), 1) if raw.strip()]
    if not lines:
        raise ValueError(f"There are no prompts in {'standard input' if path == '-' else repr(path)}.")
    as_json = lines[0][1].lstrip().startswith(b"{") if path == "-" else path.lower().endswith(JSON)
    return [_line(number, raw, as_json) for number, raw in lines]


def _line(number: int, raw: bytes, as_json: bool) -> Line:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        fields = json.loads(text) if as_json else {"prompt": text}
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        return Line(number, {}, f"it is no {'JSON' if as_json else 'UTF-8 text'}: {error}")
    if not as_json and "\0" in text:
        return Line(number, {}, "it is no text: it has NUL characters, as UTF-16 does")
    if isinstance(fields, dict):  # null is as good as nothing, but for top_k, where it means all
        fields = {name: value for name, value in fields.items() if value is not None or name == "top_k"}
    if any("\ud800" <= c <= "\udfff" for c in json.dumps(fields, ensure_ascii=False)):
        return Line(number, {}, "it has half of a surrogate pair, which is no text")
    return Line(number, fields if isinstance(fields, dict) else {}, _fault(fields))


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


class Answers:
    """Where answers go: a file of JSON lines, or standard output.

    A file takes each answer when it is finished, so that an interrupted run loses none; at the end they are brought
    into the order of the prompts. Standard output gets each as soon as all before it are there.

    Args:
        path: Of the file; None or "-" is standard output.
        resume: Go on with a file that exists.
        run: A digest of the settings; answers made with others are not continued.

    Attributes:
        done: The answers that are there, by place.
        parallel: How processes share the work, if there are several.
        expected: The places of those that standard output still waits for, in order.
        given: How many standard output got.

    Raises:
        ValueError: If the file exists and `resume` is not given, or it holds something else or cannot be written.
    """

    def __init__(self, path: str | None, resume: bool = False, run: str = "") -> None:
        self.run = run
        self.path = None if path in (None, "-") else Path(path)
        self.done: dict[Place, dict[str, Any]] = {}
        self.expected: deque[Place] = deque()
        self.given = 0
        self.parallel: ParallelStrategy | None = None
        self._file: TextIO | None = None
        self._torn: dict[Path, int] = {}  # bytes of a last line that was not finished
        if self.path is None:
            if resume:
                raise ValueError("--resume continues a file: give it with --out.")
            return
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{path} is no file.")
        for file in (self.path, *self.parts()):
            if file.exists() and file.stat().st_size:
                if not resume:
                    raise ValueError(f"{file} exists: --resume continues it, or choose another name.")
                self._load(file)
        if not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written.")

    def _load(self, path: Path) -> None:
        try:
            *lines, torn = path.read_bytes().split(b"\n")
        except OSError as error:
            raise ValueError(f"{path} cannot be continued: {error.strerror}.") from error
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.done[key(record)] = {"prompt": record["prompt"], **record}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} cannot be continued: line {number} is no answer of a run before.") from error
        if not (torn.startswith(BEGIN) or BEGIN.startswith(torn)):
            raise ValueError(f"{path} cannot be continued: its last line is no answer of a run before.")
        self._torn[path] = len(torn)

    def parts(self) -> list[Path]:
        """The files of the processes that divided a run."""
        found = self.path.parent.glob(f"{glob.escape(self.path.name)}.part*")
        return sorted(file for file in found if file.name.rpartition(".part")[2].isdigit())

    def share(self, parallel: ParallelStrategy | None) -> None:
        """Says how processes share the work; those that divide it learn what any of them finished in a run before."""
        self.parallel = parallel
        if parallel is not None and parallel.divides_rows:
            for done in parallel.collectives.all_gather_object(self.done):
                self.done |= done

    def matches(self, number: int, sample: int, prompt: str) -> bool:
        """Whether an answer is there already.

        Raises:
            ValueError: If it answers another prompt, or was made with other settings.
        """
        record = self.done.get((number, sample))
        if record is not None and record.get("prompt") != prompt:
            raise ValueError(
                f"{self.path} answers other prompts than these: line {number} was {record['prompt']!r:.60}."
            )
        if record is not None and record.get("run", self.run) != self.run:
            raise ValueError(f"{self.path} was made with other settings than these: give it those, or another name.")
        return record is not None

    def add(self, record: dict[str, Any], elsewhere: bool = False) -> None:
        """Takes a finished answer; what was made `elsewhere` another process has written already."""
        record = {**record, "run": self.run} if self.run and self.path is not None else record
        self.done[key(record)] = record
        if self.parallel is not None and self.parallel.collectives.rank and not self.parallel.divides_rows:
            return  # process 0 has the same, and writes it
        if self.path is not None:
            if elsewhere:
                return
            if self._file is None:  # not before there is something to write
                self._file = self._open(self._mine)
            self._file.write(_json(record) + "\n")
            self._file.flush()
            return
        while self.expected and self.expected[0] in self.done:
            answer = self.done.pop(self.expected.popleft())
            if self.parallel is None or self.parallel.collectives.rank == 0:
                print(_json(answer), flush=True)
            self.given += 1

    @property
    def _mine(self) -> Path:
        """Where this process writes: each one has a part where they divide the prompts."""
        divided = self.parallel is not None and self.parallel.divides_rows
        return self.path.with_name(f"{self.path.name}.part{self.parallel.collectives.rank}") if divided else self.path

    def _open(self, path: Path) -> TextIO:
        try:
            if torn := self._torn.get(path):
                os.truncate(path, path.stat().st_size - torn)
            return path.open("a", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}.") from error

    def close(self) -> None:
        """Brings a file into the order of the prompts, and the processes' parts together."""
        if self._file is not None:
            self._file.close()
        if self.path is None:
            return
        if self.done and (self.parallel is None or self.parallel.collectives.rank == 0):
            self._write()
        if self.parallel is not None and self.parallel.divides_rows:
            self.parallel.synchronize()  # until the whole file is there
            self._mine.unlink(missing_ok=True)
            if self.parallel.collectives.rank == 0:
                for part in self.parts():  # of a run with more processes
                    part.unlink(missing_ok=True)

    def _write(self) -> None:
        path = self.path.resolve()
        try:
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as beside:
                beside.writelines(_json(self.done[place]) + "\n" for place in sorted(self.done))
                beside.flush()
                os.fsync(beside.fileno())
            like = next((file for file in (path, *self.parts()) if file.exists()), None)
            if like is not None:
                shutil.copymode(like, beside.name)
            os.replace(beside.name, path)
        except OSError as error:  # all answers are there, in the order in which they came
            with contextlib.suppress(OSError, NameError):
                os.unlink(beside.name)
            raise ValueError(f"{path} could not be put in order: {error.strerror}.") from error


def key(record: Mapping[str, Any]) -> Place:
    """The place of an answer."""
    return int(record["line"]), int(record.get("sample", 0))


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


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


def answer_file(
    llm: LLM,
    lines: Sequence[Line],
    answers: Answers,
    settings: Settings,
    args: KVCacheArgs | None,
    *,
    num_samples: int = 1,
    batch_size: int = 8,
    prefill: str = "min-length",
    prefill_chunk: int | None = None,
    logprobs: bool = False,
    begun: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Line]:
    """Answers the prompts of a file, `batch_size` at a time, and shows a progress bar on a terminal.

    Calls `begun` with all that will be answered when the cache is there.

    Returns:
        The lines that could not be used, with their error.
    """
    answers.share(llm.parallel)
    usable = _checked(llm, lines, settings, Limits.of(llm.model, args, prefill))
    tokens = max((row.sees for _, row in usable), default=1)  # of all, done or not: budgets may be a share of it
    usable = _checked(llm, [line for line, _ in usable], settings, Limits.of(llm.model, args, prefill, tokens))
    rows, places = [], []
    for line, _ in usable:
        for sample in range(num_samples):
            answers.expected.append((line.number, sample))
            if not answers.matches(line.number, sample, line.fields["prompt"]):
                rows.append(settings.row(llm, line.fields, len(rows), sample))
                places.append((line, sample))
    steps = llm.run(rows, args, batch_size, prefill, prefill_chunk, logprobs, tokens) if rows else ()
    begun(rows)
    total, hidden = len(rows) + len(answers.done), None if llm.fabric.is_global_zero else True  # None: on terminals
    with tqdm(total=total, initial=len(answers.done), unit="prompt", disable=hidden) as bar:
        for row in (row for drew in steps for row in drew if row.reason is not None):
            answers.add(_record(row, *places[row.index], many=num_samples > 1), row.elsewhere)
            bar.update()
    return [line for line in lines if line.error is not None]


def _checked(llm: LLM, lines: Sequence[Line], settings: Settings, limits: Limits) -> list[tuple[Line, Row]]:
    """The lines that can be used, with their rows; the others are given their error."""
    out = []
    for line in lines:
        if line.error is None:
            try:
                row = settings.row(llm, line.fields, 0)
                check(row.request, limits)
                out.append((line, row))
            except (ValueError, TypeError) as error:
                line.error = str(error)
    return out


def _record(row: Row, line: Line, sample: int, many: bool) -> dict[str, Any]:
    """One answer; seconds count from when the prompt's turn came."""
    record: dict[str, Any] = {"line": line.number, **({"sample": sample} if many else {})}
    record |= {name: line.fields[name] for name in ("id", "prompt") if name in line.fields}
    record |= {"text": row.text, "prompt_tokens": len(row.request.prompt), "new_tokens": len(row.tokens)}
    record |= {"finish_reason": row.reason}
    record["first_token_seconds"] = round(row.first - row.began, 6)
    record["seconds"] = round(row.ended - row.began, 6)
    return record | ({"tokens": row.tokens, "logprobs": row.logprobs} if row.logprobs else {})
