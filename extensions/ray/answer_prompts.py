"""Answer a table of prompts with Ray Data, on as many machines as the Ray cluster has.

    python extensions/ray/answer_prompts.py CHECKPOINT PROMPTS OUT --workers 2 --kv_cache.strategy h2o

In the order in which a prompt meets it: `read` makes a dataset of JSONL or Parquet files, `answer` hands its rows to
workers, an `Answerer` is one worker, `write` stores the rows with their answers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
from ray import cloudpickle

from litgpt_kv import LLM
from litgpt_kv.arguments import RunArgs, StoppingArgs, check_count
from litgpt_kv.cli.groups import check_names
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Request
from litgpt_kv.generate.limits import Limits
from litgpt_kv.llm.text_request import TextRequest

Format = Literal["jsonl", "parquet"]
FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
GIVEN = ("prompt", "messages", "sys_prompt", *(f.name for kind in (StoppingArgs, SamplingArgs) for f in fields(kind)))
ANSWER = pa.schema(
    [
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("new_tokens", pa.int64()),
        ("error", pa.string()),
    ]
)

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need litgpt_kv, but not this file


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout that every worker can read, or "demo".
        kv_cache: The cache.
        sampling, stopping: What counts where a row says nothing.
        run: How prompts are read; `batch_size` is the number of rows of the cache.
        max_tokens: The most tokens of a row, prompt and answer, of which a budget in percent is a share. None: the most
            that a batch has, so that a budget must be a number of tokens.
        precision, accelerator: As in `LLM.load`.

    Raises:
        ValueError: If a budget is in percent and `max_tokens` is missing.
    """

    checkpoint_dir: str
    kv_cache: KVCacheArgs = KVCacheArgs()
    sampling: SamplingArgs = SamplingArgs()
    stopping: StoppingArgs = StoppingArgs()
    run: RunArgs = RunArgs(batch_size=8)
    max_tokens: int | None = None
    precision: str | None = None
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        budget = self.kv_cache.budget
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens, 1, 2**31 - 1)
        elif any(isinstance(part, str) for part in (budget if isinstance(budget, (list, tuple)) else [budget])):
            raise ValueError(f"A budget in percent needs max_tokens, of which it is a share, got budget {budget!r}.")


class Answerer:
    """A worker: loads the model once, then answers batches of rows.

    A row has the keys of a line in a prompt file: `prompt` or `messages`, and settings by name. Other columns are kept
    as they are. A row that cannot be answered gets an `error`; the others are still answered.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.cache_args = settings, KVCacheArgs.of(settings.kv_cache)
        self.llm = LLM.load(settings.checkpoint_dir, precision=settings.precision, accelerator=settings.accelerator)
        self.limits = Limits.of(self.llm.model, self.cache_args, settings.run.prefill, settings.max_tokens)
        self.defaults = TextRequest(stopping=settings.stopping, sampling=settings.sampling)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the rows of a table with the columns of `ANSWER` added."""
        if taken := [name for name in ANSWER.names if name in table.column_names]:
            raise ValueError(f"The prompts have a column {taken[0]!r} already, in which the answers would be.")
        answers: list[dict[str, Any]] = [{} for _ in range(len(table))]
        requests = list(self._requests(table, answers))
        if requests:
            run = self.llm.run(requests, self.cache_args, self.settings.run, self.settings.max_tokens)
            for sequence in run.sequences():
                answer = answers[sequence.index]
                answer |= dict(text=sequence.text, finish_reason=sequence.reason, error=sequence.error)
                answer |= dict(prompt_tokens=len(sequence.prompt), new_tokens=len(sequence.tokens))
        for name, column in zip(ANSWER.names, pa.Table.from_pylist(answers, ANSWER).columns):
            table = table.append_column(name, column)
        return table

    def _requests(self, table: pa.Table, answers: list[dict[str, Any]]) -> Iterator[Request]:
        given = table.select([name for name in table.column_names if name in GIVEN])
        for number, row in enumerate(given.to_pylist()):
            try:  # a table has a null where a line of JSON had no key
                text = self.defaults.read({name: value for name, value in row.items() if value is not None})
                request = self.llm.request(text, number)
                self.limits.check(request)
            except (ValueError, TypeError, OverflowError) as error:
                answers[number] |= dict(finish_reason="error", error=str(error))
            else:
                yield request


def answer(
    prompts: ray.data.Dataset,
    settings: Settings,
    *,
    worker: type[Answerer] = Answerer,
    workers: int = 1,
    rows: int = 64,
    cpus: float = 1,
    gpus: float = 0,
) -> ray.data.Dataset:
    """Answer the rows of a dataset.

    If a worker dies, Ray starts another one and gives the batches that it had not finished to a worker again, however
    often that happens. A row is in the result once. The order of rows may change.

    Args:
        prompts: The rows; see `Answerer`.
        settings: What each worker needs to know.
        worker: The class of workers.
        workers: How many copies of the model.
        rows: How many rows a worker gets at a time, and has to do again if it dies.
        cpus, gpus: What each worker takes of its machine.
    """
    for name, value in (("workers", workers), ("rows", rows)):
        check_count(name, value, 1, 2**31 - 1)
    return prompts.repartition(target_num_rows_per_block=rows).map_batches(
        worker,
        fn_constructor_args=(settings,),
        batch_size=rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )


def read(path: str, kind: Format | None = None) -> ray.data.Dataset:
    """Make a dataset of a file or folder, wherever Ray reads: a path, s3://, gs://, hdfs://.

    Raises:
        ValueError: If `kind` is missing and the path's ending says nothing.
    """
    return {"jsonl": ray.data.read_json, "parquet": ray.data.read_parquet}[_format(path, kind)](_whole(path))


def write(answers: ray.data.Dataset, path: str, kind: Format) -> None:
    """Compute a dataset, and write it as files into a new folder.

    Raises:
        ValueError: If the folder exists.
    """
    method = {"jsonl": answers.write_json, "parquet": answers.write_parquet}[kind]
    method(_whole(path), mode=ray.data.SaveMode.CREATE)


def _whole(path: str) -> str:
    """Return a path from the root, because workers may run in another folder; an address as it is."""
    return path if "://" in path else os.path.abspath(path)


def _format(path: str, kind: Format | None) -> Format:
    found = kind or FORMATS.get(PurePosixPath(path).suffix.lower())
    if found is None:
        raise ValueError(f"{path} may be JSONL or Parquet: say which with --format jsonl or --format parquet.")
    return found


def warn_if_full(workers: int, cpus: float) -> None:
    """Say so if the workers take all CPUs of a cluster: a job that waits for a CPU to read with waits for ever."""
    ray.init(ignore_reinit_error=True)
    there = ray.cluster_resources().get("CPU", 0)
    if workers * cpus > there - 1:
        message = (
            f"{workers} workers with {cpus:g} CPUs each leave less than one of {there:g} CPUs to read and write files"
        )
        print(f"warning: {message}: take fewer workers or --cpus, if the cluster does not grow.", file=sys.stderr)


def main(
    checkpoint_dir: str,
    prompts: str,
    out: str,
    *,
    format: Format | None = None,
    workers: int = 1,
    rows: int = 64,
    cpus: float = 1,
    gpus: float = 0,
    max_tokens: int | None = None,
    precision: str | None = None,
    accelerator: str = "auto",
    kv_cache: KVCacheArgs = KVCacheArgs(),
    sampling: SamplingArgs = SamplingArgs(),
    stopping: StoppingArgs = StoppingArgs(),
    run: RunArgs = RunArgs(),
) -> None:
    """Answer a table of prompts with Ray Data.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout that every worker can read, or "demo".
        prompts: JSONL or Parquet: a file or a folder, a path or an address that Ray reads (s3://, gs://).
        out: A new folder for the prompts with their answers, in the same format.
        format: jsonl or parquet, if the ending of `prompts` does not say it.
        workers: How many copies of the model.
        rows: How many rows a worker gets at a time, and has to do again if it dies.
        cpus: CPU cores of each worker.
        gpus: GPUs of each worker.
        max_tokens: The most tokens of a row, prompt and answer; a budget in percent is a share of it.
        precision: A precision of Lightning Fabric.
        accelerator: cpu, cuda, mps, or auto.
        kv_cache: What to keep.
        sampling: How tokens are chosen, where a row says nothing.
        stopping: When a text ends, where a row says nothing.
        run: How prompts are read and batched; batch_size is 8 where nothing is said.
    """
    check_names(vars(kv_cache))  # a YAML file may not name a file of code to import
    run = replace(run, batch_size=run.batch_size or 8)
    checkpoint_dir = str(Path(checkpoint_dir).resolve()) if Path(checkpoint_dir).is_dir() else checkpoint_dir
    settings = Settings(checkpoint_dir, kv_cache, sampling, stopping, run, max_tokens, precision, accelerator)
    kind = _format(prompts, format)
    limits = dict(workers=workers, rows=rows, cpus=cpus, gpus=gpus)
    warn_if_full(workers, cpus)
    write(answer(read(prompts, kind), settings, **limits), out, kind)
    print(f"The answers are in {out}.")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(main)
    except (ValueError, TypeError) as error:
        sys.exit(f"error: {error}")
