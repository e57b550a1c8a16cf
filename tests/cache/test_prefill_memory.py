"""`tests/prefill_memory.py`, with a short prompt: it measures strategies with a file, too, and says what is over."""

from __future__ import annotations

import sys

import pytest
import torch

from litgpt_kv import KVCacheArgs
from tests import prefill_memory


def test_it_measures_and_judges(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    names = ["h2o", "triattention", "duo:model", "kvzip:pool"]
    monkeypatch.setattr(sys, "argv", ["prefill_memory.py", "--tokens", "600", "--layers", "2", "--caches", *names])
    assert prefill_memory.main() == 1  # what is read twice has blocks of scores that are large beside a short prompt
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:] if line]
    assert [row[0] for row in rows[:-1]] == ["dense", *names] and rows[0][3] == "1.00"
    assert all(float(row[3]) < 1.2 for row in rows[:4]) and " ".join(rows[-1]) == "Over their limits: kvzip:pool."


def test_a_peak_has_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.ones(1000)
        held = torch.ones(2000)
        (held + 1).sum()

    assert 16_000 <= prefill_memory.peak_bytes(run) < 17_000
    model = prefill_memory.model_of(64, 1)
    size, peak = prefill_memory.measure(model, KVCacheArgs("window", 16), 64)
    assert size < 16 * 2 * 64 * 4 + 1000 < peak
