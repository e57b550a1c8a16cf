"""The sections of docs/strategies.md that are made when the documentation is built."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from litgpt_kv import registry
from tests.docs.pages import ROOT

sys.path.append(str(ROOT / "docs" / "_ext"))
strategy_pages = importlib.import_module("strategy_pages")


def cell(cache: str, budget: str | None, score: float, question: str = "unseen", tokens: int = 700) -> dict:
    size = 1000 if budget is None else 10 * int(budget[:-1])
    shape = {"cache": cache, "budget": budget, "question": question, "tokens": tokens, "bytes": size}
    return {**shape, "task": "needle", "score": score}


CELLS = [
    *(cell("dense", None, score) for score in (1.0, 0.9)),
    *(cell("h2o", budget, score) for budget, score in (("50%", 0.5), ("25%", 0.25))),
    cell("h2o", "50%", 0.7, "seen"),
    cell("h2o:pool", "50%", 0.6),
    cell("h2o@int8", "50%", 0.1),
    cell("dense", None, 0.3, tokens=4000),
    {"cache": "h2o", "budget": None, "error": "no"},
]


def test_without_a_measurement_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(strategy_pages, "RESULTS", tmp_path / "no.json")
    assert strategy_pages.measured() == [] and strategy_pages.curve("h2o", []) == []
    text = strategy_pages.sections()
    assert "Measured" not in text
    for name in registry.names("strategy"):
        assert f"## {name}\n" in text or not registry.get("strategy", name).__module__.startswith("litgpt_kv.")


def test_the_measurement_of_a_strategy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"cells": CELLS}))
    monkeypatch.setattr(strategy_pages, "RESULTS", file)
    cells = strategy_pages.measured()
    assert strategy_pages.points(cells, "h2o", "unseen") == [(250, 25.0), (500, 50.0)]
    assert strategy_pages.points(cells, "dense", "unseen") == [(1000, 95.0)]  # not the longer text
    _, picture, table = strategy_pages.curve("h2o", cells)
    assert picture.count("<circle") == 3 and ">h2o:pool</text>" in picture and ">dense</text>" in picture
    assert "| `h2o` | 50% | 500 | 50% | 70% |" in table and "int8" not in table
    assert strategy_pages.curve("sink", cells) == []


def test_links_lead_to_pages_or_say_the_path() -> None:
    docs = ROOT / "docs"
    text = (
        "[a](start.md#first-commands) [b](../CONTRIBUTING.md#rules) [c](../SECURITY.md) ![d](../x.svg) [e](https://x.y)"
    )
    pages = "[a](start.md#first-commands) [b](contributing.md) c (`SECURITY.md`) ![d](../x.svg) [e](https://x.y)"
    assert strategy_pages.with_links(text, docs, docs) == pages
    assert strategy_pages.with_links("[a](litgpt_kv/cache/README.md)", ROOT, docs) == "[a](one_step.md)"
