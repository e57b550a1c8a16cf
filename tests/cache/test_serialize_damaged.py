"""Whatever is in a file, loading it gives the cache that was saved or a ValueError; a save is whole or not at all."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from litgpt_kv import GPT, KVCache, KVCacheArgs
from litgpt_kv.cache import serialize
from tests.cache.test_serialize import COMBOS, seeded, steps
from tests.oracle.reference import tiny


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny()


@pytest.fixture
def saved(model: GPT, tmp_path: Path) -> tuple[KVCache, Path]:
    cache = seeded(model, "h2o", "cache")
    cache.retire([1])
    cache.save(tmp_path / "a.safetensors")
    return cache, tmp_path / "a.safetensors"


def same(a: KVCache, b: KVCache) -> bool:
    buffers = dict(b.named_buffers())
    for name, x in a.named_buffers():
        y = buffers.pop(name, None)
        if y is None or x.dtype != y.dtype or not torch.equal(x, y):
            return False
    return not buffers and a.args == b.args and a.seen == b.seen and a.max_tokens == b.max_tokens


def outcome(path: Path, model: GPT, cache: KVCache) -> str:
    """How loading a damaged file went; all but the two right ways raise."""
    try:
        found = KVCache.load(path, model)
    except ValueError as error:
        assert str(error).startswith(f"{path} cannot be read as a cache: ")
        return "refused"
    assert same(cache, found)
    return "right"


@pytest.mark.parametrize("part", ["header", "data"])
def test_a_flipped_bit_is_found(model: GPT, saved: tuple[KVCache, Path], part: str) -> None:
    cache, path = saved
    whole, rng = path.read_bytes(), random.Random(15)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = range(header) if part == "header" else range(header, len(whole))
    counts = {"refused": 0, "right": 0}
    for place in rng.sample(places, 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        counts[outcome(path, model, cache)] += 1
    assert counts["refused"] >= (290 if part == "header" else 300), counts  # a key's order or a space may change
    path.write_bytes(whole)
    assert outcome(path, model, cache) == "right"


def test_a_file_that_was_cut_or_has_more_is_refused(model: GPT, saved: tuple[KVCache, Path]) -> None:
    cache, path = saved
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:100], whole[:-1], whole + b"\0", whole[8:], whole * 2, b"\xff" * 99):
        path.write_bytes(damaged)
        assert outcome(path, model, cache) == "refused"


Changes = dict[str, Any]


def craft(path: Path, about: Changes, buffers: Changes, metadata: Changes | None = None) -> None:
    """Writes a file anew with other content and the right checksum; None leaves a thing out."""
    with serialize.safe_open(str(path), framework="pt") as file:
        found = file.metadata()
    described = {**json.loads(found["cache"]), **{k: v for k, v in about.items() if k != "args"}}
    described["args"] = {**described["args"], **about.get("args", {})}
    found |= {"cache": json.dumps(described), **(metadata or {})}
    tensors = {k: v for k, v in {**load_file(path), **buffers}.items() if v is not None}
    found["checksum"] = serialize.checksum(found, tensors)
    save_file(tensors, path, found)


HUGE = 2**62
CRAFTED_ARGS: list[Changes] = [
    {"strategy": "nope"},
    {"strategy": "my_file.py:Strategy"},
    {"strategy": ["h2o"]},
    {"strategy": [["h2o", "h2o"], "h2o"]},
    {"strategy": {"h2o": 1}},
    {"strategy": None},
    {"strategy": 7},
    {"strategy": "dense"},
    {"storage": "nope"},
    {"storage": ["plain", 3]},
    {"budget": 11},
    {"budget": HUGE},
    {"budget": 10**400},
    {"budget": -1},
    {"budget": "nan%"},
    {"budget": "100%"},
    {"budget": [10, 9]},
    {"budget": {"a": 1}},
    {"budget": True},
    {"sinks": 10},
    {"sinks": HUGE},
    {"recent": 99},
    {"positions": "elsewhere"},
    {"positions": []},
    {"options": {"unknown": 1}},
    {"options": []},
    {"options": None},
    {"options": {"class_path": "os.abort"}},
    {"more": 1},
]
CRAFTED_ABOUT: list[Changes] = [
    {"batch_size": 3},
    {"batch_size": 1},
    {"batch_size": 0},
    {"batch_size": -2},
    {"batch_size": HUGE},
    {"batch_size": 10**9},
    {"batch_size": True},
    {"batch_size": "2"},
    {"batch_size": 2.0},
    {"batch_size": None},
    {"max_tokens": 0},
    {"max_tokens": HUGE},
    {"max_tokens": 10**400},
    {"max_tokens": None},
    {"max_tokens": [1]},
    {"dtype": "float32"},
    {"dtype": "int64"},
    {"dtype": "nn"},
    {"dtype": "__dict__"},
    {"dtype": "load"},
    {"dtype": None},
    {"dtype": []},
]


@pytest.mark.parametrize(
    "about", [{"args": a} for a in CRAFTED_ARGS] + CRAFTED_ABOUT, ids=lambda about: str(about)[:60]
)
def test_a_crafted_description_is_refused_before_anything_is_allocated(
    model: GPT, saved: tuple[KVCache, Path], monkeypatch: pytest.MonkeyPatch, about: Changes
) -> None:
    cache, path = saved
    craft(path, about, {})
    monkeypatch.setattr(KVCache, "build", lambda *_: pytest.fail("memory was asked for"))
    assert outcome(path, model, cache) == "refused"


def first(x: torch.Tensor, value: Any) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[0] = value
    return x


CRAFTED_BUFFERS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor | None]]] = [
    ("clock.pos", lambda x: first(x, -1)),
    ("clock.pos", lambda x: first(x, HUGE)),
    ("clock.pos", lambda x: first(x, 5)),
    ("clock.pos", lambda x: x.float()),
    ("clock.pos", lambda x: x[:1]),
    ("clock.pos", lambda x: None),
    ("clock.live", lambda x: x.to(torch.uint8)),
    ("clock.prompt_length", lambda x: first(x, -1)),
    ("clock.prompt_length", lambda x: first(x, HUGE)),
    ("slots.0.pos", lambda x: first(x, -2)),
    ("slots.0.pos", lambda x: first(x, -1)),
    ("slots.0.pos", lambda x: first(x, 19)),
    ("slots.0.pos", lambda x: first(x, HUGE)),
    ("slots.0.pos", lambda x: x[..., :1].expand_as(x).contiguous()),
    ("slots.0.pos", lambda x: x.to(torch.int32)),
    ("slots.0.pos", lambda x: x.unsqueeze(0)),
    ("slots.0.statistic_mass", lambda x: first(x, float("nan"))),
    ("slots.0.statistic_mass", lambda x: x.float()),
    ("slots.0.statistic_mass", lambda x: None),
    ("layers.0.keys.data", lambda x: first(x, float("nan"))),
    ("layers.0.keys.data", lambda x: x.to(torch.int8)),
    ("layers.1.values.data", lambda x: x[:, :, :4].contiguous()),
    ("layers.1.values.data", lambda x: x.mT.contiguous()),
    ("layers.9.values.data", lambda x: torch.zeros(1)),
]


@pytest.mark.parametrize(("name", "change"), CRAFTED_BUFFERS)
def test_a_crafted_buffer_is_refused(model: GPT, saved: tuple[KVCache, Path], name: str, change: Callable) -> None:
    cache, path = saved
    craft(path, {}, {name: change(load_file(path).get(name))})
    assert outcome(path, model, cache) == "refused"


def test_tokens_in_slots_that_must_be_empty_are_refused(model: GPT, tmp_path: Path) -> None:
    """A row of three tokens fills three slots; steps rely on where the empty ones are."""
    cache = KVCache.build(model, KVCacheArgs("h2o", 10), 1, 48)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache, torch.tensor([3]))
    path = tmp_path / "a.safetensors"
    for name in ("slots.0.pos", "slots.0.statistic_mass"):
        cache.save(path)
        assert outcome(path, model, cache) == "right"
        buffer = load_file(path)[name]
        craft(path, {}, {name: buffer.roll(1, -1) if name == "slots.0.pos" else first(buffer.flip(-1), 1.0).flip(-1)})
        assert outcome(path, model, cache) == "refused"


@pytest.mark.parametrize("value", [-1, 2, HUGE])
def test_owners_of_a_pool_are_its_heads(model: GPT, tmp_path: Path, value: int) -> None:
    cache, path = KVCache.build(model, KVCacheArgs("h2o", 10, select="pool"), 1, 48), tmp_path / "a"
    with torch.inference_mode():
        model(torch.arange(14).unsqueeze(0), cache, torch.tensor([14]))
    cache.save(path)
    assert outcome(path, model, cache) == "right"
    craft(path, {}, {"slots.0.owner": first(load_file(path)["slots.0.owner"], value)})
    assert outcome(path, model, cache) == "refused"


def test_damaged_metadata_is_refused(model: GPT, saved: tuple[KVCache, Path]) -> None:
    cache, path = saved
    whole = path.read_bytes()
    nested = "[" * 100_000
    for metadata in (
        {"cache": "{"},
        {"cache": "[]"},
        {"cache": "null"},
        {"cache": nested},
        {"cache": '{"args": ' + nested},
        {"cache": '{"batch_size": ' + "9" * 5000 + "}"},
        {"format": "litgpt_kv cache 1"},
        {"model": ""},
    ):
        path.write_bytes(whole)
        craft(path, {}, {}, metadata)
        assert outcome(path, model, cache) == "refused"
    save_file({"a": torch.zeros(1)}, path)
    assert outcome(path, model, cache) == "refused"


def test_what_is_no_file_is_neither_read_nor_written(model: GPT, saved: tuple[KVCache, Path], tmp_path: Path) -> None:
    cache, _ = saved
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "none"):
        assert outcome(path, model, cache) == "refused"
    for path in (1, 1.5, None, object()):  # 1 is standard output
        with pytest.raises(TypeError):
            KVCache.load(path, model)
        with pytest.raises(TypeError):
            cache.save(path)
    with pytest.raises(ValueError, match="cannot be read as a cache: there is no such file"):
        KVCache.load("x" * 20_000, model)
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(ValueError, match=f"{path} cannot be written: it is a (folder|device), not a file"):
            cache.save(path)


def test_a_save_is_whole_or_not_at_all(
    model: GPT, saved: tuple[KVCache, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = saved
    link = path.with_name("link")
    link.symlink_to(path.name)
    path.chmod(0o640)

    def killed(tensors: dict, file: str, *_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(serialize, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.save(link)
    monkeypatch.undo()
    assert outcome(path, model, cache) == "right"
    cache.reset([0])
    cache.save(link)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert outcome(path, model, cache) == "right"
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.safetensors", "link"]


@pytest.mark.parametrize(("name", "positions"), COMBOS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_buffer_comes_back_in_its_dtype(
    model: GPT, tmp_path: Path, name: str, positions: str, dtype: torch.dtype
) -> None:
    """Keys may be stored in another dtype than values, the model's, or that of the statistics."""
    cache = seeded(model, name, positions)
    for layer in cache.layers:  # as a storage of its own dtype has it
        layer.keys.data = layer.keys.data.to(dtype)
    cache.save(tmp_path / "a")
    again = KVCache.load(tmp_path / "a", model)
    kinds = {n: b.dtype for n, b in cache.named_buffers()}
    assert {n: b.dtype for n, b in again.named_buffers()} == kinds
    assert kinds["layers.0.keys.data"] is dtype and kinds["layers.0.values.data"] is torch.float64
    for a, b in zip(steps(model, cache), steps(model, again)):
        assert torch.equal(a, b)


def test_a_cache_of_another_dtype_than_the_models_comes_back(model: GPT, tmp_path: Path) -> None:
    cache = KVCache.build(model, KVCacheArgs("h2o", 10), 2, 48, torch.float16)
    with torch.inference_mode():
        model(torch.ones(2, 14, dtype=torch.int64), cache, torch.tensor([14, 9]))
    cache.save(tmp_path / "a")
    assert same(cache, again := KVCache.load(tmp_path / "a", model))
    assert again.dtype is torch.float16
    with torch.inference_mode():  # buffers made inside could not be used outside of it
        inside = KVCache.load(tmp_path / "a", model)
    nn.Module.to(inside, torch.bfloat16)
    inside.save(tmp_path / "b")
    assert same(inside, KVCache.load(tmp_path / "b", model))
