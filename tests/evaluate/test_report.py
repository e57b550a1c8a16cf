"""The report and the pictures, from cells made by hand; what `results/make.py` measures."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from litgpt_kv import LLM, KVCacheArgs, registry
from litgpt_kv.evaluate.candidates import candidates
from litgpt_kv.evaluate.report import paired, report
from litgpt_kv.evaluate.results import Cell, Results, standard_error
from litgpt_kv.evaluate.runs import ask

MAKE = Path(__file__).parents[2] / "results" / "make.py"


def needle(cache: str, budget: str | None, scores: list[float], question: str = "unseen", tokens: int = 700) -> Cell:
    key = {"cache": cache, "budget": budget, "task": "needle", "tokens": tokens, "question": question}
    score = {"score": sum(scores) / len(scores), "standard_error": standard_error(scores)}
    return {**key, **score, "examples": len(scores), "bytes": 1000, "scores": scores}


def text(cache: str, budget: str | None, kl: float, size: int) -> Cell:
    cell = {"cache": cache, "budget": budget, "task": "text", "tokens": 100, "question": None, "kl": kl, "bytes": size}
    return {**cell, "kl_standard_error": 0.001, "top1": 0.9, "perplexity": 20.0, "text": 100, "seconds": 1.0, "nll": []}


def stream(cache: str, nll: list[float], total: int) -> Cell:
    cell = {"cache": cache, "budget": None, "task": "stream", "tokens": total - 513, "question": None, "kl": None}
    return {**cell, "perplexity": 20.0, "bytes": 1000, "text": total, "nll": nll}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    yes, no, half = [1.0] * 8, [0.0] * 8, [1.0, 0.0] * 4
    made = Results({"checkpoint": "small"}, tmp_path)
    made.cells += [
        needle("dense", None, yes),
        needle("dense", None, yes, "seen"),
        needle("dense", None, half, tokens=4000),
    ]
    made.cells += [needle("keydiff", "50%", half), needle("tova", "50%", yes), needle("sink", "50%", half)]
    made.cells += [needle("random", "50%", [1.0] + 7 * [0.0]), needle("keydiff", "25%", no)]
    made.cells += [
        text("dense", None, 1e-6, 2000),
        text("dense@int4", None, 0.01, 550),
        text("keydiff", "25%", 0.2, 500),
    ]
    made.cells += [stream("sink", [math.log(20)] * 78, 20_000), stream("dense", [math.log(10)] * 30, 8192)]
    made.cells.append({"cache": "kivi", "error": "refused", "task": "text"})
    return made


def test_report_says_where_the_order_differs(results: Results) -> None:
    said = report(results, "small")
    assert "TOVA is 50 points above KeyDiff" in said
    assert (
        "Of 6 pairs, 4 have the published order, 1 are equal here, and 1 have the other order, 1 of them by more"
        in said
    )
    assert "`random` finds 12%; 3 strategies are at least 30 points above it: keydiff, sink, tova." in said
    assert "| dense | all | 1,000 | 100 ± 0 | 100 ± 0 |" in said and "| 4,000 | 8 | 50 ± 19 |" in said
    assert "- `dense@int4` (0.0100) is nearer to the full cache than `keydiff` with 25% (0.2000)" in said
    assert "| dense@int4, all | 6 (28%) |" in said and "- kivi: refused" in said
    assert "| sink | all | 1,000 | 20.0 | 20.0 |" in said and "| dense | all | 1,000 | 10.0 | - |" in said
    assert report(Results({"checkpoint": "none"}), "x").count("\n") < 6


def test_paired_differences() -> None:
    gain, error = paired([1, 1, 0, 1], [0, 1, 0, 0])
    assert gain == 0.5 and error == pytest.approx(math.sqrt(1 / 3 / 4))
    assert paired([1], [0]) == (1, math.inf)


def test_make_measures_everything_and_writes_pictures(results: Results, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make", MAKE)
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    files = {name: Path("centres.safetensors") for name in ("triattention", "duo")}
    made = make.every_strategy(files)
    assert {c.args.strategy for c in made} == set(registry.names("strategy"))
    assert {c.budget for c in made if c.args.strategy != "dense"} == {"50%", "25%"}
    assert all(c.args.options == {"calibration": "centres.safetensors"} for c in made if c.args.strategy in files)
    keydiff, shared = (next(c for c in made if c.name == f"{spec} 25%") for spec in ("keydiff", "kvzip:model floor=0"))
    assert (keydiff.args.budget, keydiff.args.interval) == (175 + make.ROOM, make.ROOM), "175 of 700 tokens stay"
    assert (shared.args.budget, shared.args.interval) == ("25%", 1), "tokens leave in each layer there"
    assert {c.args.storage for c in make.storages()} == set(registry.names("storage")) - {"offload"}
    make.publish(results, tmp_path, 8192)
    names = [
        f"{make.NAME}-{what}.{kind}" for what in ("needles", "bytes", "storages", "stream") for kind in ("png", "svg")
    ]
    assert {path.name for path in tmp_path.iterdir()} == {f"{make.NAME}.md", *names}
    first = (tmp_path / names[1]).read_bytes()
    make.publish(results, tmp_path, 8192)
    assert (tmp_path / names[1]).read_bytes() == first, "the same results give the same file"


def test_cells_go_on_where_they_were(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    demo = LLM.load("demo", accelerator="cpu")
    settings = {"seed": 1, "haystack": "prose"}
    compared = candidates(["dense", "h2o"], [30], KVCacheArgs())
    whole = Results(settings)
    ask(demo, whole, compared, ["needle"], [60], ("unseen",), 4, batch_size=4)
    part = Results(settings, tmp_path)
    part.cells = [{**cell, "scores": cell["scores"][:n]} for cell, n in zip(whole.cells, (3, 1))]
    part.add(part.cells[0])
    again = Results(settings, tmp_path)
    again.resume()
    ask(demo, again, compared, ["needle"], [60], ("unseen",), 4, batch_size=2, until=2)
    assert [len(c["scores"]) for c in again.cells] == [3, 2]
    ask(demo, again, compared, ["needle"], [60], ("unseen",), 4, batch_size=2)
    assert [c["scores"] for c in again.cells] == [c["scores"] for c in whole.cells]
    assert [c["examples"] for c in again.cells] == [4, 4] and len(
        (tmp_path / "results.json").read_text().split("\n")
    ) > 4


def test_a_table_says_where_the_model_itself_finds_too_little() -> None:
    yes, no = [1.0, 0.0], [0.0, 0.0]
    hard = "- needle, 700 tokens, question unseen: `dense` finds 0%\n"
    none = "- needle, 700 tokens, question unseen\n"
    for cells, notes in (
        ([needle("dense", None, no), needle("h2o", "25%", no)], (True, False)),
        ([needle("dense@int8", None, no), needle("h2o", "25%", yes)], (True, False)),
        ([needle("dense", None, yes), needle("h2o", "25%", no)], (False, False)),
        ([needle("sink", "25%", no), needle("h2o", "25%", no)], (False, True)),
        ([needle("sink", "25%", no), needle("h2o", "25%", yes)], (False, False)),
    ):
        tables = Results({}, cells=cells).tables()
        assert (hard in tables, none in tables) == notes
        assert ("the model is too small" in tables, "No cache found anything" in tables) == notes
