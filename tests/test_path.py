"""The main path stays short: frames and files from the command line to the dot product, meetings of model and cache."""

from __future__ import annotations

import inspect
import sys
import traceback
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.nn.functional as F

import litgpt_kv
from litgpt_kv import KVCache
from litgpt_kv.__main__ import main
from tests.oracle.reference import tiny

OURS = Path(litgpt_kv.__file__).parent
LIMIT = 12


def test_twelve_frames_and_files_from_the_command_line_to_the_dot_product(monkeypatch, capsys) -> None:
    deepest: list[list[traceback.FrameSummary]] = []
    plain = F.scaled_dot_product_attention

    def watched(*args, **options):
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(OURS)]
        deepest.append(frames)
        return plain(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    main(["generate", "demo", "--accelerator", "cpu", "--prompt", "def f(x):", "--max-new-tokens", "1"])
    assert capsys.readouterr().out.startswith("def f(x):")
    frames = deepest[0]
    assert [frames[0].name, frames[-1].name] == ["main", "causal_attention"]
    assert len(frames) <= LIMIT and len({frame.filename for frame in frames}) <= LIMIT, [f.name for f in frames]


@pytest.mark.parametrize("strategy", ["dense", "h2o", "sink"])
def test_model_and_cache_meet_two_times_and_once_a_layer_in_a_decode_step(strategy: str) -> None:
    model = tiny(seed=3, n_layer=3)
    cache = KVCache.build(model, strategy, 1, 20)
    model(torch.tensor([[1, 2, 3]]), cache, torch.tensor([3]))
    met: list[str] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_back is None:
            return
        caller, called = Path(frame.f_back.f_code.co_filename), Path(frame.f_code.co_filename)
        if caller.parent == OURS / "model" and called.is_relative_to(OURS / "cache"):
            met.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        model(torch.tensor([[4]]), cache)
    finally:
        sys.setprofile(None)
    properties = {name for name, _ in inspect.getmembers(KVCache, lambda member: isinstance(member, property))}
    assert [name for name in met if name not in properties] == ["begin_decode", *["attend"] * 3, "commit"]
