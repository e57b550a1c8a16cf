"""What was measured: a JSON file that grows cell by cell, tables in Markdown, and a picture."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from litgpt_kv import __version__
from litgpt_kv.disk import write_text

Cell = dict[str, Any]
KEY = ("cache", "budget", "task", "tokens", "question")
HARD = 0.2  # a share of answers of `dense`, below which a column compares nothing


@dataclass
class Results:
    """Cells of one evaluation.

    Attributes:
        settings: What the numbers depend on besides the cells' own keys.
        cells: A cell for each cache, task, length and question.
        folder: Where files go; None: nowhere.
        name: The name of the JSON file.
    """

    settings: dict[str, Any]
    folder: Path | None = None
    cells: list[Cell] = field(default_factory=list)
    name: str = "results.json"

    @property
    def path(self) -> Path | None:
        return None if self.folder is None else self.folder / self.name

    def find(self, **key: Any) -> Cell | None:
        """The cell with these values, if it was measured."""
        return next((cell for cell in self.cells if all(cell.get(k) == key.get(k) for k in KEY)), None)

    def add(self, cell: Cell) -> None:
        """Take a cell, in the place of one with the same key, and write the file anew: little is lost in a stop."""
        known = self.find(**{k: cell.get(k) for k in KEY})
        if known is None:
            self.cells.append(cell)
        else:
            self.cells[self.cells.index(known)] = cell
        if self.path is not None:
            write_text(self.path, self.as_json())

    def as_json(self) -> str:
        """One line a cell, so that a file can be read, and compared with another, by people."""
        whole = self.as_dict()
        cells = ",\n".join(f"  {json.dumps(cell)}" for cell in whole.pop("cells"))
        return json.dumps(whole, indent=1).removesuffix("\n}") + f',\n "cells": [\n{cells}\n ]\n}}\n'

    def as_dict(self) -> dict[str, Any]:
        versions = {"litgpt_kv": __version__, "torch": torch.__version__, "python": platform.python_version()}
        machine = f"{processor()}, {torch.get_num_threads()} threads"
        if hasattr(os, "getloadavg"):
            machine += f", load average {os.getloadavg()[1]:.1f}"
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        return {"settings": self.settings, "date": date, "machine": machine, "versions": versions, "cells": self.cells}

    def resume(self, unused: Sequence[str] = ()) -> None:
        """Take the cells of a run before.

        Args:
            unused: Settings that nothing depends on that is measured now; they stay as they are in the file.

        Raises:
            ValueError: If there is a file that cannot be read, or that was made with other settings, which are named.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text())
            settings, cells = found["settings"], found["cells"]
            if not isinstance(settings, dict) or not all(isinstance(cell, dict) for cell in cells):
                raise ValueError("it has no settings or cells")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} cannot be continued: {error}.") from error
        self.settings |= {k: settings[k] for k in unused if k in settings}
        if differs := [k for k in {**settings, **self.settings} if settings.get(k) != self.settings.get(k)]:
            name = differs[0]
            raise ValueError(
                f"{self.path} was made with another {name}: {settings.get(name)!r}, now {self.settings.get(name)!r}. "
                "Choose another folder, or the same settings."
            )
        self.cells = cells

    def tables(self) -> str:
        """Two tables in Markdown: answers, and the text that was read token by token."""
        answered = [cell for cell in self.cells if "score" in cell]
        read = [cell for cell in self.cells if "perplexity" in cell]
        parts = [_answers_table(answered), *_too_hard(answered)] if answered else []
        parts += [_text_table(read)] if read else []
        failed = dict.fromkeys(f"{cell['cache']}: {cell['error']}" for cell in self.cells if "error" in cell)
        return "\n".join(parts + ["Not run:\n\n" + "\n".join(f"- {line}" for line in failed)] * bool(failed))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)])


def standard_error(values: Sequence[float]) -> float:
    """The standard error of a mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def processor() -> str:
    """The processor's name, where Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _answers_table(cells: list[Cell]) -> str:
    columns = list(dict.fromkeys((c["task"], c["tokens"], c["question"]) for c in cells))
    rows: dict[tuple, dict[tuple, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell["cache"], cell["budget"]), {})[cell["task"], cell["tokens"], cell["question"]] = cell

    def mean(row: dict[tuple, Cell]) -> float:
        return sum(cell["score"] for cell in row.values()) / len(row)

    head = [f"{task}, {tokens:,} tokens, question {question}" for task, tokens, question in columns]
    lines = [_row("cache", "budget", "bytes a row", *head), _row(*["---"] * (3 + len(head)))]
    for (cache, budget), row in sorted(rows.items(), key=lambda item: -mean(item[1])):
        size = max(cell["bytes"] for cell in row.values())
        scores = [
            f"{100 * row[c]['score']:.0f} ± {100 * row[c]['standard_error']:.0f}" if c in row else "" for c in columns
        ]
        lines.append(_row(cache, "all" if budget is None else budget, f"{size:,}", *scores))
    return "Percent of the answers found, ± the standard error.\n\n" + "\n".join(lines) + "\n"


def _too_hard(cells: list[Cell]) -> list[str]:
    """Return a note on the questions that this model cannot answer with every token, so that they say nothing."""
    columns: dict[tuple, list[Cell]] = {}
    for cell in cells:
        columns.setdefault((cell["task"], cell["tokens"], cell["question"]), []).append(cell)
    hard, unknown = [], []
    for (task, tokens, question), column in columns.items():
        name = f"{task}, {tokens:,} tokens, question {question}"
        whole = [cell["score"] for cell in column if str(cell["cache"]).partition("@")[0] == "dense"]
        if whole and max(whole) < HARD:
            hard.append(f"- {name}: `dense` finds {100 * max(whole):.0f}%")
        elif not whole and all(cell["score"] == 0 for cell in column):
            unknown.append(f"- {name}")
    notes = []
    if hard:
        notes.append(
            "`dense` keeps every token. Where it finds almost nothing, the model is too small for the questions or the "
            "texts are too long for it, and the column says nothing about a cache. Try shorter texts (`--lengths`) or "
            'another model; `--text prose --tasks "[]"` compares caches with any model.\n\n' + "\n".join(hard) + "\n"
        )
    if unknown:
        notes.append(
            "No cache found anything here. Add `dense` to `--strategies`: it keeps every token and shows what the "
            "model itself can answer.\n\n" + "\n".join(unknown) + "\n"
        )
    return notes


def _text_table(cells: list[Cell]) -> str:
    lines = [
        _row(
            "cache",
            "budget",
            "bytes a row",
            "perplexity",
            "KL to full",
            "same top token",
            "attention lost",
            "ms a token",
        ),
        _row(*["---"] * 8),
    ]
    for c in sorted(cells, key=lambda c: (c["kl"] if c["kl"] is not None else math.inf, c["perplexity"])):
        kl = "" if c["kl"] is None else f"{c['kl']:.4f} ± {c['kl_standard_error']:.4f}"
        top, lost = ("" if c[k] is None else f"{100 * c[k]:.1f}%" for k in ("top1", "lost"))
        budget = "all" if c["budget"] is None else c["budget"]
        ms = 1000 * c["seconds"] / c["tokens"]
        lines.append(_row(c["cache"], budget, f"{c['bytes']:,}", f"{c['perplexity']:.3f}", kl, top, lost, f"{ms:.1f}"))
    total, tokens = cells[0]["text"], cells[0]["tokens"]
    prompt = total - tokens - 1
    what = f"A text of {total:,} tokens: {prompt:,} were compressed as a prompt, then {tokens:,} more were compared."
    return f"{what}\n\n" + "\n".join(lines) + "\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
