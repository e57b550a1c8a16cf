"""In bfloat16 a cache costs no precision: cached logits stay within twice the error of the cacheless bfloat16 pass.

100 steps of what `python tests/model/low_precision.py --steps 2000` runs for more models and every strategy.
"""

from __future__ import annotations

import functools

import pytest
import torch

from litgpt_kv import KVCacheArgs
from litgpt_kv.cache.storage.plain import Plain
from tests.model.low_precision import Case, measure, settings

STEPS = 100
SETTINGS = {what: (args, evicting) for what, args, evicting in settings(STEPS)}
CASES = [(name, "dense, absolute") for name in ("demo", "Gemma-2-2b", "Gemma-3-1b-it", "latent")]
CASES += [(name, "sink, cache, budget 48") for name in ("demo", "Gemma-3-1b-it")]
CASES += [("Gemma-2-2b", what) for what in ("h2o, absolute", "h2o, cache", "sink, cache")]
case = functools.cache(lambda name: Case.of(name, STEPS))


@pytest.mark.parametrize(("name", "what"), CASES)
def test_cached_logits_are_within_twice_the_cacheless_error(name: str, what: str) -> None:
    args, evicting = SETTINGS[what]
    found = measure(case(name), args, evicting)
    assert found.plain.min() > 0 and len(found.cached) == STEPS + 1
    assert found.ratio < 2
    assert found.worst < 2


def test_a_coarser_storage_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Plain.write

    def coarse(self: Plain, slot: torch.Tensor, x: torch.Tensor, live: torch.Tensor | None = None) -> None:
        write(self, slot, x.to(torch.float8_e4m3fn).to(x.dtype), live)

    monkeypatch.setattr(Plain, "write", coarse)
    assert measure(case("Gemma-2-2b"), KVCacheArgs("dense")).ratio > 2
