"""Measure cells and put them into results. A cell that is there is not measured again."""

from __future__ import annotations

import sys
import time
from typing import Any

from torch import Tensor
from tqdm import tqdm

from litgpt_kv.evaluate import fidelity
from litgpt_kv.evaluate.answering import Answered, Questions
from litgpt_kv.evaluate.candidates import Candidate
from litgpt_kv.evaluate.results import Cell, Results, standard_error
from litgpt_kv.evaluate.tasks import examples as examples_of
from litgpt_kv.llm.llm import LLM

CURVE = 250  # tokens of each point of a curve


def ask(
    llm: LLM,
    results: Results,
    compared: list[Candidate],
    tasks: list[str],
    lengths: list[int],
    questions: tuple[str, ...],
    examples: int,
    batch_size: int,
    until: int | None = None,
) -> None:
    """Ask every cache the same questions; each batch of texts is read once for all of them.

    Args:
        results: Where to put cells; its settings have `seed` and `haystack`, and may have `depths`.
        tasks: The kinds of questions.
        lengths: The tokens of their texts.
        questions: "seen", "unseen" or both.
        examples: How many questions of each kind and length.
        batch_size: How many questions at a time.
        until: Ask only so many of them now; None: all.
    """

    def count(text: str) -> int:
        return len(llm.tokenizer.encode(text, bos=False))

    settings, now = results.settings, examples if until is None else until
    kinds = [(task, tokens) for task in tasks for tokens in lengths]
    total = len(kinds) * len(questions) * len(compared) * now
    with tqdm(total=total, unit="question", disable=None, file=sys.stderr) as bar:
        for task, tokens in kinds:
            cells = {}
            for i, candidate in enumerate(compared):
                for question in questions:
                    key: Cell = {"cache": candidate.spec, "budget": candidate.budget, "task": task, "tokens": tokens}
                    key |= {"question": question}
                    cells[i, question] = results.find(**key) or {**key, "scores": []}
            bar.update(sum(now if "error" in c else min(now, len(c["scores"])) for c in cells.values()))
            asked: Questions | None = None
            while start := _unfinished(cells, now):
                if asked is None:
                    try:
                        how = settings["seed"], settings["haystack"], settings.get("depths")
                        made = examples_of(task, examples, tokens, count, *how)
                        asked = Questions(llm, made, batch_size)
                    except ValueError as error:
                        for cell in cells.values():
                            results.add(_failed(cell, error))
                        break
                first, stop, todo = start
                stop = min(stop, first + asked.rows)
                began = time.perf_counter()
                reading = asked.read(first, stop)
                seconds = (time.perf_counter() - began) / len(todo)
                for i, question in todo:
                    candidate = compared[i]
                    bar.set_description(f"{candidate.name}, {task}, {tokens}, {question}")
                    cell = cells[i, question]
                    try:
                        found = reading.answer(candidate.args, question == "seen")
                        cell = _more(cell, found, seconds)
                    except ValueError as error:
                        cell = _failed(cell, error)
                    cells[i, question] = cell
                    results.add(cell)
                    bar.update(stop - first if "error" not in cell else now - first)


def _unfinished(cells: dict[Any, Cell], examples: int) -> tuple[int, int, list] | None:
    """The first examples that cells lack, as far as the same cells lack them, and these cells; None: all are there."""
    have = {key: len(cell["scores"]) for key, cell in cells.items() if "error" not in cell}
    lacking = sorted({n for n in have.values() if n < examples})
    if not lacking:
        return None
    first, stop = [*lacking, examples][:2]
    return first, stop, [key for key, n in have.items() if n == first]


def _more(cell: Cell, found: Answered, reading_seconds: float) -> Cell:
    """A cell with more answers."""
    scores = [*cell["scores"], *found.scores]
    seconds = round(cell.get("seconds", 0.0) + found.seconds, 3)
    reading = round(cell.get("reading_seconds", 0.0) + reading_seconds, 3)
    key = {k: v for k, v in cell.items() if k in ("cache", "budget", "task", "tokens", "question")}
    return {
        **key,
        "score": sum(scores) / len(scores),
        "standard_error": standard_error(scores),
        "examples": len(scores),
        "bytes": max(cell.get("bytes", 0), found.bytes),
        "kept": max(cell.get("kept", 0), found.kept),
        "seconds": seconds,
        "reading_seconds": reading,
        "scores": scores,
    }


def _failed(cell: Cell, error: ValueError) -> Cell:
    key = {k: v for k, v in cell.items() if k in ("cache", "budget", "task", "tokens", "question")}
    return {**key, "error": str(error)}


def read(
    llm: LLM,
    results: Results,
    compared: list[Candidate],
    ids: Tensor,
    start: int,
    task: str = "text",
    **options: Any,
) -> None:
    """Read texts token by token with every cache, all side by side.

    Args:
        results: Where to put cells, one a cache.
        ids: (R, N) texts.
        start: How many tokens of each text are its prompt.
        task: The name of the cells' task.
        options: Other arguments of `fidelity.measure`.
    """
    rows, total = ids.shape
    key = {"task": task, "tokens": rows * (total - start - 1), "question": None}
    todo: list[tuple[Cell, str]] = []
    args = {}
    for candidate in compared:
        own = {"cache": candidate.spec, "budget": candidate.budget, **key}
        if results.find(**own) is None:
            try:
                fidelity.check(llm, candidate.args, total, start)
                todo.append((own, candidate.name))
                args[candidate.name] = candidate.args
            except ValueError as error:
                results.add({**own, "error": str(error)})
    if not todo:
        return
    with tqdm(total=total - start - 1, unit="token", desc=task, disable=None, file=sys.stderr) as bar:
        found = fidelity.measure(llm, ids, start, args, lambda done: bar.update(done - start - bar.n), **options)
    for own, name in todo:
        one = found[name]
        kl, top1, lost = (sum(x) / len(x) if x else None for x in (one.kl, one.agrees, one.lost))
        what = {"perplexity": one.perplexity, "kl": kl, "kl_standard_error": standard_error(one.kl)}
        curve = [sum(part) / len(part) for part in batched(one.nll, CURVE)] if rows == 1 else []
        cost = {"seconds": round(one.seconds, 3), "bytes": one.bytes, "text": total}
        results.add({**own, **what, "top1": top1, "lost": lost, **cost, "nll": curve})


def batched(values: list[float], size: int) -> list[list[float]]:
    """Parts of a list, the last one shorter."""
    return [values[i : i + size] for i in range(0, len(values), size)]
