"""Compiled decoding reads few lengths: the same results, few graphs, and their time apart."""

from __future__ import annotations

import functools
import gc
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs, registry
from litgpt_kv.cache import steps
from litgpt_kv.cache.decode import read_length_for
from litgpt_kv.cache.storage.base import scatter
from litgpt_kv.generate import Stats, compiled, generate
from litgpt_kv.generate.compiled import CompiledDecoder, keep_compiled
from litgpt_kv.generate.cuda_graph import can_record
from tests.model.test_compile import Counting
from tests.oracle.reference import kept_of, logits_of, tiny, tokens_of
from tests.oracle.strategies import FEW
from tests.oracle.walks import steps_agree

GREEDY = SamplingArgs(temperature=0.0)


@pytest.fixture
def short_lengths(monkeypatch) -> None:
    """Read lengths of 4, 8, 12, ... tokens."""
    monkeypatch.setattr(steps, "read_length_for", lambda tokens: -(-tokens // 4) * 4)


def test_read_lengths_hold_every_row_and_waste_at_most_a_quarter() -> None:
    lengths = [read_length_for(n) for n in range(1, 40_000)]
    assert all(found >= n for n, found in enumerate(lengths, 1)) and lengths == sorted(lengths)
    assert all(found <= 1.25 * n + 1 for n, found in enumerate(lengths, 1) if n > 1024)
    assert sorted(set(lengths))[:6] == [512, 1024, 1280, 1536, 1792, 2048]
    assert len(set(lengths[: 32 * 1024])) == 22


CACHES = {name: KVCacheArgs(name, **(dict(budget=14) if registry.get("strategy", name).evicts else {})) for name in FEW}
CACHES |= {
    "pool": KVCacheArgs("h2o", 14, select="pool"),
    "interval": KVCacheArgs("h2o", 14, interval=3),
    "cache positions": KVCacheArgs("sink", 14, positions="cache"),
    "int8": KVCacheArgs("dense", storage="int8"),
    "per layer": KVCacheArgs(["dense", "h2o"], [None, 14]),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_static_cache_reads_no_further_than_it_must(short_lengths: None, name: str) -> None:
    """Rows begin at 3 and 9 tokens and one ends early; beyond the read length there is NaN, which nobody sees."""
    model, rows, prompts = tiny(), [tokens_of(1, 30), tokens_of(2, 14)], [3, 9]
    plain, static = (KVCache.build(model, CACHES[name], 2, 40, static=flag) for flag in (False, True))
    reaches: list[int | None] = []

    def step(token: Tensor, cache: KVCache) -> Tensor:
        seen = max(n for n, alive in zip(cache.seen, cache.live.tolist()) if alive)
        with cache.expect(seen):
            reaches.append(cache.read_length)
            beyond = [
                buffer[:, :, (cache.read_length or 40) * layer.heads :]
                for layer in cache.layers
                for buffer in (*layer.keys.buffers(), *layer.values.buffers())
                if buffer.is_floating_point() and buffer.dim() == 4
            ]
            before = [part.clone() for part in beyond]
            for part in beyond:
                part.fill_(float("nan"))
            logits = model(token, cache)
            for part, old in zip(beyond, before):
                part.copy_(old)
            return logits

    expected = logits_of(model, plain, rows, prompts, "full")
    found = logits_of(model, static, rows, prompts, "full", step=step)
    for b in range(2):
        for i, logits in expected[b].items():
            torch.testing.assert_close(found[b][i], logits, rtol=0, atol=1e-10)
    assert kept_of(plain, 0) == kept_of(static, 0)
    assert static.read_length is None and static.evicting
    most = max(plan.slots for plan in static.plans)
    assert {r for r in reaches if r} == {r for r in range(12, 36, 4) if r < most}
    assert (None in reaches) == (most < 30)


@torch.inference_mode()
@torch._dynamo.config.patch(recompile_limit=2)  # torch's own is 8, which read lengths may exceed
def test_graphs_are_as_many_as_lengths_met_and_announced(short_lengths: None) -> None:
    torch._dynamo.reset()
    model, notes, stats = tiny(n_layer=1), [], Stats()
    counting = Counting()

    def slow(graph: torch.fx.GraphModule, inputs: list) -> object:
        time.sleep(0.2)
        return counting(graph, inputs)

    decoder = CompiledDecoder(model, notes.append, slow)
    prompts, new = [tokens_of(1, 3), tokens_of(2, 6)], [14, 5]
    expected = generate(model, prompts, "dense", max_new_tokens=new, sampling=GREEDY)
    for _ in range(2):  # the second run finds all graphs
        cache = KVCache.build(model, "dense", 2, 60)
        found = generate(
            model, prompts, cache, max_new_tokens=new, sampling=GREEDY, decoder=decoder, prefill="full", stats=stats
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        if decoder.graphs and stats.compile_seconds:
            first = stats.compile_seconds
    lengths = {-(-(n + 1) // 4) * 4 for n in range(6, 16)}
    assert counting.graphs == decoder.graphs == len(lengths) == 3
    assert len(notes) == 2 * len(lengths) and "up to 8 tokens" in notes[0] and "done in" in notes[1]
    assert first == pytest.approx(decoder.seconds) and first > 0.2 * len(lengths)
    assert stats.compile_seconds == 0 and 0 < stats.decode_seconds


@torch.inference_mode()
def test_warming_up_leaves_an_empty_cache_and_a_graph() -> None:
    torch._dynamo.reset()
    model, counting = tiny(n_layer=1), Counting()
    decoder = CompiledDecoder(model, backend=counting)
    cache = KVCache.build(model, "h2o", 2, 60)
    decoder.warm_up(cache)
    assert counting.graphs == decoder.graphs == 1 and cache.seen == [0, 0] and cache.static
    generate(model, [[1, 2], [3]], cache, max_new_tokens=4, sampling=GREEDY, decoder=decoder)
    assert counting.graphs == 1


class Recorded:
    """Takes the place of `CudaGraph`, which needs a GPU: it runs the step."""

    made: ClassVar[list] = []

    def __init__(self, step: Callable, token: Tensor, cache: KVCache) -> None:
        self.step, self.token, self.cache = step, token, weakref.ref(cache)
        self.state = (cache.evicting, cache.read_length)
        self.made.append(self)

    def __call__(self) -> Tensor:
        cache = self.cache()
        assert (cache.evicting, cache.read_length) == self.state
        return self.step(self.token, cache)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Steps are recorded as on a GPU, when they come for the second time; returns the graphs."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "RECORD_AFTER", 2)
    monkeypatch.setattr(compiled, "can_record", lambda model, cache: True)
    monkeypatch.setattr(compiled, "CudaGraph", Recorded)
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


@torch.inference_mode()
def test_a_step_is_recorded_when_it_comes_again_once_for_each_state_of_a_cache(
    short_lengths: None, recording: list[Recorded]
) -> None:
    model = tiny(n_layer=1)
    decoder = CompiledDecoder(model, backend="eager")
    prompts, facts = [tokens_of(1, 3), tokens_of(2, 6)], dict(max_new_tokens=14, sampling=GREEDY, prefill="full")
    expected = generate(model, prompts, KVCache.build(model, "h2o", 2, 60), **facts)
    cache = KVCache.build(model, "h2o", 2, 60)
    decoder.warm_up(cache, 6)
    assert not recording and cache.seen == [0, 0]
    for _ in range(2):
        cache.reset()
        found = generate(model, prompts, cache, decoder=decoder, **facts)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    states = [graph.state for graph in recording]
    assert len(states) == len(set(states)) == decoder.graphs > 2
    cache.to(torch.float64)  # its buffers may be elsewhere now
    cache.reset()
    generate(model, prompts, cache, decoder=decoder, **facts)
    assert len(recording) > len(states) and len(decoder._known[cache].graphs) <= len(states)
    gone, cache = weakref.ref(cache), None
    gc.collect()
    assert gone() is None and not decoder._known


def test_a_graph_is_of_the_tokens_the_weights_and_the_mode_that_it_was_recorded_with(recording: list[Recorded]) -> None:
    model = tiny(n_layer=1)
    decoder = CompiledDecoder(model, backend="eager")
    plain, cache = (KVCache.build(model, "dense", 2, 60, static=flag) for flag in (False, True))
    text = torch.tensor([tokens_of(1, 40), tokens_of(2, 40)])

    steps = functools.partial(steps_agree, decoder, model, [cache, plain], text)
    with torch.no_grad():
        for c in (plain, cache):
            model(text[:, :4], c, torch.tensor([4, 4]))
        steps(4, 8)
    assert len(recording) == 1 and recording[0].token.is_contiguous() and not recording[0].token.is_inference()
    with torch.inference_mode():
        steps(8, 12)
    assert len(recording) == 2
    with torch.no_grad():
        steps(12, 14)
        assert len(recording) == 2
        model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
        steps(14, 18)
    assert len(recording) == 3


@torch.inference_mode()
def test_a_step_that_cannot_be_recorded_is_run_and_said(
    recording: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        recording.append(None)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(compiled, "CudaGraph", fails)
    model, notes = tiny(n_layer=1), []
    cache = KVCache.build(model, "dense", 1, 60)
    generate(model, [[1, 2]], cache, max_new_tokens=9, sampling=GREEDY, decoder=CompiledDecoder(model, notes.append))
    assert len(recording) == 1
    assert notes[-1] == "This step is not recorded as a CUDA graph: operation not permitted when stream is capturing"


def test_what_can_be_recorded(gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache.build(gqa, "dense", 1, 8, static=True)
    assert not can_record(gqa, cache)  # on a CPU
    device = torch.device("cuda", 0)
    monkeypatch.setattr(type(cache), "pos", SimpleNamespace(device=device))
    with torch.no_grad():
        for layer in cache.layers:
            assert not can_record(gqa, cache)
            layer.device = device
        assert can_record(gqa, cache)
    assert not can_record(gqa, cache)  # with gradients
    cache.static = False
    assert not can_record(gqa, cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 5, 4), 2), ((2, 3, 2, 5), 3), ((2, 5), 1)])
def test_scatter_is_torchs_whether_compiled_or_not(monkeypatch, shape: tuple, dim: int, dtype: torch.dtype) -> None:
    buffer = torch.randint(-9, 9, shape).to(dtype)
    index = torch.rand(shape).argsort(dim).narrow(dim, 0, 2)
    x = torch.randint(10, 99, index.shape).to(dtype)
    expected = buffer.clone().scatter_(dim, index, x)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda flag=compiling: flag)
        found = buffer.clone()
        scatter(found, dim, index, x)
        assert torch.equal(found, expected)


def test_compiled_code_is_kept_in_the_users_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled() == tmp_path / "litgpt_kv" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "litgpt_kv" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert keep_compiled() == tmp_path / "own"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled() is None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
