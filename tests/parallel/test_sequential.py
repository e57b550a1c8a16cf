"""Layers over devices: on a machine with one, devices are pretended, and mixing tensors of two is an error as on GPUs.

What this cannot show is that GPUs work at the same time; that a thread asks for all pieces' work before it waits is
shown instead.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from litgpt.config import Config
from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs, registry
from litgpt_kv.generate import generate
from litgpt_kv.parallel.sequential import SequentialGPT, layer_devices, load_sequential
from tests.oracle.reference import kept_of, lift, logits_of, tokens_of
from tests.oracle.shrink import LLAMA, fill, shrink
from tests.oracle.strategies import FEW

MOVES = {"to", "copy_"}  # these may have tensors of two devices


class FakeDevices(TorchFunctionMode):
    """Treat cpu:0, cpu:1, ... as different devices: each tensor has one, and operations on two devices fail."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[int | None, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func == Tensor.device.__get__:
            index = index_of(args[0])
            return torch.device("cpu") if index is None else torch.device("cpu", index)
        name = getattr(func, "__name__", "")
        found = {index_of(t) for t in tensors if t.dim() or index_of(t) is not None}
        if len(found) > 1 and name not in MOVES:
            raise RuntimeError(f"{name}: tensors of devices {found}")
        targets = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.device)]
        if targets:
            index = targets[0].index
        else:
            index = index_of(args[0]) if name in MOVES else next(iter(found), None)
        out = func(*args, **kwargs)
        if name == "to" and targets and index is not None and index_of(args[0]) != index:
            self.moved.append((index_of(args[0]), index))
            out = out.clone()
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and index_of(t) is None and index is not None:
                t.fake_index = index
        return out


def index_of(x: Any) -> int | None:
    """Return the fake device of a tensor, None if it has none."""
    return getattr(x, "fake_index", None)


def put(device: int, x: Tensor) -> Tensor:
    """Put a tensor on a fake device."""
    x.fake_index = device
    return x


def on_first(x: Any) -> Any:
    return put(0, x) if isinstance(x, Tensor) else x


def config_of(layers: int, name: str = LLAMA) -> Config:
    config = copy.copy(shrink(name))
    config.n_layer = layers
    for field in ("sliding_window_indices", "rope_indices"):
        if (kinds := getattr(config, field)) is not None:
            setattr(config, field, (kinds * layers)[:layers])
    return config


def pair(config: Config, devices: int, pieces: int | None = None) -> tuple[GPT, SequentialGPT]:
    """Return a whole model, and the same one on several fake devices."""
    whole = fill(GPT(config)).double()
    parts = load_sequential(
        config, [torch.device("cpu", i) for i in range(devices)], whole.state_dict(), dtype=torch.float64
    )
    parts.pieces = devices if pieces is None else pieces
    lift(parts)
    for name, parameter in parts.named_parameters():
        put(parts.device_of(name).index, parameter)
    put(0, parts.cos), put(0, parts.sin)
    return lift(whole).eval(), parts


@pytest.mark.parametrize("layers", [1, 2, 5, 6, 32, 80])
@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_layers_lie_in_runs_of_nearly_one_length(layers: int, devices: int) -> None:
    if devices > layers:
        with pytest.raises(ValueError, match=f"{layers} layers can be laid over 1 to {layers} devices, not {devices}"):
            layer_devices(layers, devices)
        return
    found = layer_devices(layers, devices)
    lengths = [found.count(d) for d in range(devices)]
    assert found == sorted(found) and len(found) == layers
    assert max(lengths) - min(lengths) <= 1 and min(lengths) >= 1


ROWS, PROMPTS = [tokens_of(30 + i, n, 90) for i, n in enumerate((14, 11, 9))], [10, 3, 8]


@pytest.mark.parametrize(
    ("devices", "name", "method", "positions"),
    [
        (2, LLAMA, "streamed", "cache"),  # 5 layers on 2 devices are 2 and 3: litgpt's misses a move there
        (2, "Gemma-3-1b-it", "full", "absolute"),
        (3, LLAMA, "full", "cache"),
        (3, "Gemma-3-1b-it", "streamed", "absolute"),
    ],
)
def test_same_logits_and_tokens_kept_as_on_one_device(devices: int, name: str, method: str, positions: str) -> None:
    whole, parts = pair(config_of(5, name), devices)
    for strategy in FEW:
        budget = 6 if registry.get("strategy", strategy).evicts else None
        args = KVCacheArgs(strategy, budget=budget, positions=positions)
        alone = KVCache.build(whole, args, 3, 16)
        expected = logits_of(whole, alone, ROWS, PROMPTS, method)
        with FakeDevices():
            cache = KVCache.build(parts, args, 3, 16)
            found = logits_of(lambda *given: parts(*map(on_first, given)), cache, ROWS, PROMPTS, method)
        layer_of = [next(layer.keys.buffers()).fake_index for layer in cache.layers]
        assert layer_of == parts.layer_devices
        assert {s.pos.fake_index for s in cache.slots} == set(range(devices))
        for logits, reference in zip(found, expected):
            assert logits.keys() == reference.keys()
            for i in reference:
                torch.testing.assert_close(logits[i], reference[i], rtol=0, atol=1e-8)
        assert [kept_of(cache, b) for b in range(3)] == [kept_of(alone, b) for b in range(3)]
    prompts = [row[:n] for row, n in zip(ROWS, PROMPTS)]
    options = dict(max_new_tokens=4, sampling=SamplingArgs(temperature=1.0, top_k=9, top_p=0.9, seed=2))
    with FakeDevices():  # sampling and stopping, too
        texts = generate(parts, prompts, KVCacheArgs("h2o", budget=6), **options)
    for tokens, expected in zip(texts, generate(whole, prompts, KVCacheArgs("h2o", budget=6), **options)):
        assert tokens.tolist() == expected.tolist()


def test_a_missing_move_is_noticed() -> None:
    _, parts = pair(config_of(5), 2)
    idx = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), FakeDevices() as devices:
        parts(put(0, idx))
        assert devices.moved.count((0, 1)) >= 1
    parts.transformer.h[2]._forward_pre_hooks.clear()
    with torch.no_grad(), FakeDevices(), pytest.raises(RuntimeError, match="tensors of devices"):
        parts(put(0, idx))


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_pieces_of_rows_change_nothing(pieces: int) -> None:
    whole, parts = pair(config_of(4), 2, pieces)
    prompts = [tokens_of(50 + i, 3 + 2 * i, 90) for i in range(5)]
    for strategy in FEW:
        for sampling in (SamplingArgs(temperature=0.0), SamplingArgs(temperature=1.0, seed=4)):
            args = KVCacheArgs(strategy, budget=None if strategy == "dense" else 8)
            runs = [generate(m, prompts, args, max_new_tokens=6, sampling=sampling) for m in (whole, parts)]
            assert [r.tolist() for r in runs[0]] == [r.tolist() for r in runs[1]]


def test_all_pieces_are_asked_for_before_anything_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, parts = pair(config_of(4), 2)
    cache = KVCache.build(parts, KVCacheArgs("h2o", budget=6), 4, 20)
    idx = torch.tensor([tokens_of(i, 5, 90) for i in range(4)])
    with torch.no_grad():
        parts(idx, cache, torch.full((4,), 5))
        seen, waits = [], []
        for i, block in enumerate(parts.transformer.h):
            block.register_forward_pre_hook(lambda m, a, i=i: seen.append((i, len(a[0]))))
        for name in ("item", "tolist", "__bool__", "cpu"):
            monkeypatch.setattr(Tensor, name, lambda *a, name=name: waits.append(name))
        parts(idx[:, :1], cache)
    assert seen == [(i, 2) for _ in range(2) for i in range(4)]  # two rows through all layers, then the other two
    assert waits == []


def test_views_of_a_cache_do_not_keep_it_alive() -> None:
    _, parts = pair(config_of(2), 2)
    cache = KVCache.build(parts, "dense", 2, 12)
    with torch.no_grad():
        parts(torch.zeros(2, 3, dtype=torch.int64), cache, torch.tensor([3, 2]))
    gone, held = weakref.ref(cache), weakref.ref(cache.layers[0].keys)
    gc.disable()  # not even for a while
    try:
        del cache
        assert gone() is None and held() is None
    finally:
        gc.enable()


def test_a_batch_that_does_not_fit_changes_no_row() -> None:
    _, parts = pair(config_of(2), 2)
    cache = KVCache.build(parts, "dense", 2, 4)
    with torch.no_grad():
        parts(torch.zeros(2, 4, dtype=torch.int64), cache, torch.tensor([3, 4]))
        with pytest.raises(ValueError, match="over the limit of 4"):
            parts(torch.zeros(2, 1, dtype=torch.int64), cache)
    assert cache.pos.tolist() == [3, 4]


def test_it_is_an_ordinary_model_otherwise() -> None:
    whole, parts = pair(config_of(4), 2)
    assert isinstance(parts, nn.Module) and parts.state_dict().keys() == whole.state_dict().keys()
    idx = torch.tensor([tokens_of(9, 7, 90)])
    with torch.no_grad():
        torch.testing.assert_close(parts(idx), whole(idx), rtol=0, atol=1e-8)
