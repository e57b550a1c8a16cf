"""Measure what the speed of this library is held to, and print a table: goal, measured, held or not.

    python -m tests.speed_goals --out build/goals --checkpoint checkpoints/SmolLM2 --gguf SmolLM2.gguf

Sections, each an interleaved run whose results are stored in the folder `--out`; a section that is stored there is not
measured again, so a run can be interrupted. `--only` names sections, `--again` measures them anew, `--small` tries
everything on a small model in a few minutes (its figures mean nothing). Run nothing else beside.

- dense: the 12 × 768 model at 1,024, 4,096 and 16,384 tokens, against litgpt and transformers, eager and compiled.
- flat: h2o and sink with 512 tokens from 1,024 to 65,536, all contexts in one interleaved run, and dense at 16,384.
- ragged: 8 rows of 205 to 2,048 tokens against transformers' left padding.
- int8: a checkpoint with int8 weights against llama.cpp on the GGUF file that it was made from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from litgpt_kv.benchmark.decode import Shape, random_model
from litgpt_kv.benchmark.peers.base import Job
from litgpt_kv.benchmark.peers.ours import Ours
from litgpt_kv.benchmark.peers.picture import check_picture, draw_costs
from litgpt_kv.benchmark.peers.report import Settings, compare_peers
from litgpt_kv.benchmark.peers.run import Measured, decode, named_peers, read_prompts
from litgpt_kv.benchmark.processor import processor
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.llm import checkpoint
from litgpt_kv.model.packed import pack

BUDGET, CHUNK = 512, 256
Report = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run. contexts: Of dense. flat: Contexts of the strategies that evict. ragged: The longest row."""

    shape: Shape = Shape()
    contexts: tuple[int, ...] = (1024, 4096, 16384)
    flat: tuple[int, ...] = (1024, 4096, 16384, 65536)
    budget: int = BUDGET
    ragged: int = 2048
    int8: int = 512
    steps: int = 16
    repeats: int = 5


SMALL = Sizes(Shape(n_layer=2, n_embd=96, n_head=6), (64, 128, 192), (64, 128, 192, 256), 32, 160, 64, 4, 2)


@dataclass(frozen=True)
class Goal:
    """A line of the table. measured: None if it could not be measured; then `why` says the reason."""

    text: str
    wanted: str
    measured: float | None
    held: bool | None
    why: str = ""


class Run:
    """What all sections share.

    Args:
        sizes: See `Sizes`. folder: A checkpoint for `int8`, and for `ragged` if there is one. gguf: Its GGUF file.
        peers: The libraries of `dense`.

    The sections get the file that they are stored in.
    """

    def __init__(self, sizes: Sizes, folder: str | None, gguf: str | None, peers: tuple[str, ...]) -> None:
        self.sizes, self.folder, self.gguf, self.peers = sizes, folder, gguf, peers
        self.settings = Settings(steps=sizes.steps, repeats=sizes.repeats)

    def random(self, tokens: int) -> GPT:
        """The model of 12 × 768 with random weights and a context of `tokens` and the steps."""
        config = self.sizes.shape.config(tokens + self.settings.new_tokens + 1)
        model = random_model(config, checkpoint.fabric_for(None, "cpu"))
        pack(model)  # as `LLM.load` does
        return model

    def loaded(self, quantize: str | None = None) -> GPT:
        folder = checkpoint.find(self.folder)
        fabric = checkpoint.fabric_for("32-true", "cpu", quantize)
        model = checkpoint.load_model(folder, checkpoint.load_config(folder), fabric, quantize)
        pack(model)
        return model

    def dense(self, file: Path) -> Report:
        """Each context is stored when it is measured; those in the file are kept."""
        report: Report = json.loads(file.read_text()) if file.is_file() else {"rows": []}
        settings = replace(self.settings, peers=self.peers, compiled=True)
        model = self.random(max(self.sizes.contexts))
        for context in self.sizes.contexts:
            if any(row["context"] == context for row in report["rows"]):
                continue
            part = compare_peers(model, [context], replace(settings, prefills=1 if context > 4096 else 3))
            report = {**part, "rows": report["rows"] + part["rows"]}
            file.write_text(json.dumps(report, indent=2) + "\n")
        return report

    def flat(self, file: Path) -> Report:
        """All contexts in turns, so that what else happens on the machine happens to all of them."""
        sizes, torch_threads = self.sizes, torch.get_num_threads()
        model, dense_at = self.random(max(sizes.flat)), sizes.flat[2]
        cells = [(name, context) for context in sizes.flat for name in ("h2o", "sink")] + [("dense", dense_at)]
        entries, rows = [], []
        with torch.inference_mode():
            for name, context in tqdm(cells, desc="prompts", file=sys.stderr, disable=None):
                job = Job(model, (context,), self.settings.new_tokens, budget=sizes.budget)
                chunk = min(CHUNK, sizes.budget // 2)
                entry = Measured("litgpt_kv", Ours(job, name, False, None if name == "dense" else chunk))
                g = torch.Generator().manual_seed(context)
                tokens = torch.randint(model.config.vocab_size, (context + job.new_tokens,), generator=g)
                read_prompts(entry, [tokens[:context]], last=True)
                entries.append((entry, tokens[context:].unsqueeze(1)))
            for i in tqdm(range(sizes.repeats + 1), desc="rounds", file=sys.stderr, disable=None):
                for entry, later in entries:
                    decode(entry, later[i * sizes.steps : (i + 1) * sizes.steps], warm_up=i == 0)
        for (name, context), (entry, _) in zip(cells, entries):
            both = [1e3 * f(entry.step_seconds) for f in (min, statistics.median)]
            rows.append({"library": "litgpt_kv", "cache": name, "context": context, "rows": 1, "decode_ms": both})
            print(f"{name:<8}{context:>9,} tokens  {both[0]:8.2f} {both[1]:8.2f} ms a step")
        return {"machine": processor(), "threads": torch_threads, "rows": rows}

    def ragged(self, file: Path) -> Report:
        longest = self.sizes.ragged
        model = self.random(longest) if self.folder is None else self.loaded()
        settings = replace(self.settings, peers=("transformers",), rows=8, ragged=True, compiled=True, prefills=1)
        return compare_peers(model, [longest], settings)

    def int8(self, file: Path) -> Report:
        if self.folder is None:
            raise SystemExit("The section int8 needs --checkpoint, and --gguf with the file that it was made from.")
        files = tuple(filter(None, (self.gguf, "q8_0")))
        settings = replace(self.settings, peers=("llama.cpp",), compiled=True, gguf=files)
        return compare_peers(self.loaded("int8"), [self.sizes.int8], settings)


SECTIONS = ("dense", "flat", "ragged", "int8")


# -- the table -------------------------------------------------------------------------------------------------------


def find(report: Report, library: str, way: str, context: int | None = None) -> dict[str, Any] | None:
    """The row of a library whose cache is called `way`, or whose weights are; None if there is none."""
    for row in report["rows"]:
        fits = row.get("cache") == way or (library == "llama.cpp" and row.get("weights") == way)
        if row["library"] == library and fits and context in (None, row["context"]):
            return row
    return None


def ratio(report: Report, ours: str, library: str, ways: list[str], context: int | None = None) -> float | None:
    """How many times as fast our way is as the fastest of another library's ways, best against best."""
    own = find(report, "litgpt_kv", ours, context)
    others = [row for way in ways if (row := find(report, library, way, context)) is not None]
    if own is None or not others:
        return None
    return min(row["decode_ms"][0] for row in others) / own["decode_ms"][0]


def at_least(text: str, measured: float | None, least: float, why: str = "not measured") -> Goal:
    held = None if measured is None else measured >= least
    return Goal(text, f"at least {least:g}", measured, held, "" if measured is not None else why)


def goals(reports: dict[str, Report], sizes: Sizes) -> Iterator[Goal]:
    """Compare the stored results with what is wanted."""
    if report := reports.get("dense"):
        yield from dense_goals(report, sizes)
    if report := reports.get("flat"):
        yield from flat_goals(report, sizes)
    if report := reports.get("ragged"):
        for ours, ways in PAIRS.items():
            measured = ratio(report, ours, "transformers", ways)
            yield at_least(
                f"8 ragged rows, {ours}, against transformers' left padding", measured, 2.0, problems(report)
            )
    if report := reports.get("int8"):
        kinds = [row["weights"] for row in report["rows"] if row["library"] == "llama.cpp" and "weights" in row]
        for kind in kinds or ["any file"]:
            for ours in PAIRS:
                measured = ratio(report, ours, "llama.cpp", [kind])
                yield at_least(f"int8 weights, {ours}, against llama.cpp with {kind}", measured, 0.7, problems(report))


PAIRS = {"dense": ["dynamic cache", "static cache"], "dense, compiled": ["static cache, compiled"]}


def dense_goals(report: Report, sizes: Sizes) -> Iterator[Goal]:
    for context, least in zip(sizes.contexts, (1.3, 1.8, 8.0)):
        measured = ratio(report, "dense", "litgpt", ["own cache"], context)
        yield at_least(f"dense against litgpt at {context:,}", measured, least, problems(report))
    for context, least in zip(sizes.contexts, (1.2, 1.4, 2.0)):
        for ours, ways in PAIRS.items():
            measured = ratio(report, ours, "transformers", ways, context)
            yield at_least(f"{ours}, against transformers' best at {context:,}", measured, least, problems(report))
    for ours, least in (("dense", 0.7), ("dense, compiled", 0.85)):
        for context in sizes.contexts:
            row = find(report, "litgpt_kv", ours, context)
            yield at_least(f"share of the read bandwidth, {ours}, at {context:,}", row and row["of_limit"], least)
    context = sizes.contexts[1]
    row = find(report, "litgpt", "own cache", context)
    yield at_least(f"prefill of {context:,} against litgpt", row and row["prefill_ratio"][0], 1.8, problems(report))


def flat_goals(report: Report, sizes: Sizes) -> Iterator[Goal]:
    for name in ("h2o", "sink"):
        times = [find(report, "litgpt_kv", name, context)["decode_ms"][0] for context in sizes.flat]
        middle = (max(times) + min(times)) / 2
        away = (max(times) - min(times)) / 2 / middle
        text = f"{name} {sizes.budget}, how far times are apart from {sizes.flat[0]:,} to {sizes.flat[-1]:,} tokens"
        yield Goal(text, "at most ± 0.05", away, away <= 0.05)
        own = find(report, "litgpt_kv", "dense", sizes.flat[2])["decode_ms"][0]
        yield at_least(f"{name} {sizes.budget} against own dense at {sizes.flat[2]:,}", own / times[2], 1.8)


def problems(report: Report) -> str:
    """Why libraries could not run, on one line."""
    found = dict.fromkeys(f"{row['library']}: {row['problem']}" for row in report["rows"] if "problem" in row)
    return "; ".join(found) or "not measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections")
    parser.add_argument("--again", action="store_true", help="measure sections that are stored already")
    parser.add_argument("--checkpoint", help="for int8 and ragged; without it int8 is left out")
    parser.add_argument("--gguf", help="the GGUF file that the checkpoint was made from")
    parser.add_argument("--peers", default="litgpt,transformers", help="libraries of dense; the goals are about these")
    parser.add_argument("--plot", type=Path, help="draw the cost of a token against the context, of dense")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="try it on a small model")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = SMALL if given.small else Sizes()
    picture = None if given.plot is None else check_picture(str(given.plot))
    run = Run(sizes, given.checkpoint, given.gguf, tuple(named_peers(given.peers)))
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        file = given.out / f"{name}.json"
        if given.again:
            file.unlink(missing_ok=True)
        whole = file.is_file() and "seconds" in json.loads(file.read_text())
        if whole or (name == "int8" and given.checkpoint is None):
            continue
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        report = getattr(run, name)(file)
        report |= {"seconds": time.perf_counter() - began, "small": given.small, "when": time.strftime("%F %R %Z")}
        file.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{name} took {report['seconds']:,.0f} s")
    stored = {name: given.out / f"{name}.json" for name in SECTIONS}
    reports = {name: json.loads(file.read_text()) for name, file in stored.items() if file.is_file()}
    if picture is not None and "dense" in reports:
        draw_costs(reports["dense"]["rows"], picture)
    table = list(goals(reports, sizes))
    (given.out / "goals.json").write_text(json.dumps([asdict(goal) for goal in table], indent=2) + "\n")
    print(f"\n{processor()}")
    print(f"{'goal':<72}{'wanted':<16}{'measured':>9}  held")
    for goal in table:
        measured = "-" if goal.measured is None else f"{goal.measured:.3f}"
        held = {True: "yes", False: "no", None: goal.why}[goal.held]
        print(f"{goal.text:<72}{goal.wanted:<16}{measured:>9}  {held}")


if __name__ == "__main__":
    main()
