"""Caches repeated, saved and loaded go on as if nothing had happened; another model's cache is refused."""

import copy
import gc
import pickle

import pytest
import torch

from litgpt_kv import KVCache, KVCacheArgs, registry
from tests.oracle.reference import tiny
from tests.oracle.strategies import FEW, NAMES, options_of, plain

COMBOS = [(name, p) for name in NAMES for p in ("absolute", "cache") if name in FEW or p == plain(name).positions]


def seeded(model, name, positions, rows=2):
    budget = 10 if registry.get("strategy", name).evicts else None
    args = KVCacheArgs(name, budget, positions=positions, options=options_of(name, model.config))
    cache = KVCache.build(model, args, rows, 48)
    g = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        model(torch.randint(40, (rows, 14), generator=g), cache, torch.tensor([14, 9, 3][:rows]))
        for token in torch.randint(40, (5, rows, 1), generator=g):
            model(token, cache)
    return cache


def steps(model, cache, count=12):
    g = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        return [model(t.expand(cache.batch_size, 1), cache) for t in torch.randint(40, (count, 1, 1), generator=g)]


@pytest.mark.parametrize(("name", "positions"), COMBOS)
def test_a_saved_cache_goes_on(tmp_path, name, positions):
    model = tiny()
    cache = seeded(model, name, positions)
    cache.retire([1])
    cache.save(tmp_path / "a.safetensors")
    again = KVCache.load(tmp_path / "a.safetensors", model, cache.args)
    assert again.args == cache.args
    assert again.tokens() == cache.tokens()
    for a, b in zip(steps(model, cache), steps(model, again)):
        assert torch.equal(a[0], b[0])
    assert again.pos.tolist() == cache.pos.tolist() == [31, 14]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "storage"), [("snapkv", "plain"), ("snapkv", "int4"), ("h2o", "float8"), ("sink", "kivi")]
)
def test_a_cache_that_was_cast_comes_back_and_its_rows_are_cast_too(tmp_path, name, storage, dtype):
    model = tiny()
    cache = KVCache.build(model, KVCacheArgs(name, 10, storage=storage), 2, 48)
    with torch.inference_mode():
        model(torch.arange(28).view(2, 14), cache, torch.tensor([14, 9]))
    before = cache.row(0)
    cache.to(dtype)
    cache.save(tmp_path / "a")
    again = KVCache.load(tmp_path / "a", model)
    for layer, loaded, first in zip(cache.layers, again.layers, before.layers):
        for own, other, row in ((layer.keys, loaded.keys, first.keys), (layer.values, loaded.values, first.values)):
            before._refresh()
            assert own.read(10).dtype == dtype
            assert torch.equal(own.read(10), other.read(10)) and own.read(10).dtype == other.read(10).dtype
            assert torch.equal(own.read(10)[:1], row.read(10)) and row.read(10).dtype == dtype
    for a, b in zip(steps(model, cache, 3), steps(model, again, 3)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "positions"), COMBOS)
def test_a_repeated_cache_is_each_row_several_times_and_its_own(name, positions):
    model = tiny()
    cache = seeded(model, name, positions)
    three = cache.repeat(3)
    kept = {n: b.clone() for n, b in cache.named_buffers()}
    for both, single in zip(steps(model, three), steps(model, seeded(model, name, positions))):
        torch.testing.assert_close(both, single.repeat_interleave(3, 0), atol=1e-10, rtol=0)
    assert three.pos.tolist() == [31, 31, 31, 26, 26, 26]
    assert all(torch.equal(b, kept[n]) for n, b in cache.named_buffers())
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        cache.repeat(0)


def test_what_is_refused(tmp_path):
    model, file = tiny(), tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="cannot be read as a cache"):
        KVCache.load(file, model)
    file.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="cannot be read as a cache"):
        KVCache.load(file, model)
    seeded(model, "sink", "cache").save(file)
    with pytest.raises(ValueError, match="another model"):
        KVCache.load(file, tiny(seed=7))
    with pytest.raises(ValueError, match="another model"):
        KVCache.load(file, tiny(n_layer=3))
    with pytest.raises(ValueError, match="other arguments: strategy is 'sink', not 'h2o', budget is 10, not 9"):
        KVCache.load(file, model, KVCacheArgs("h2o", 9, positions="cache"))
    with pytest.raises(ValueError, match="cannot be written"):
        seeded(model, "sink", "cache").save(tmp_path / "no" / "folder")


def test_copies_and_the_cache_of_a_model_that_is_gone(tmp_path):
    model, file = tiny(), tmp_path / "a.safetensors"
    cache = seeded(model, "h2o", "absolute")
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        other.save(file)
        assert KVCache.load(file, model).seen == cache.seen == [19, 14]
    cache.repeat(2).save(file, model)
    assert KVCache.load(file, model).seen == [19, 19, 14, 14]
    with pytest.raises(ValueError, match="another model"):
        cache.save(file, tiny(seed=3))
    del model
    gc.collect()
    cache.save(file)
    assert KVCache.load(file, tiny()).seen == [19, 14]


def test_rows_are_numbers_or_a_mask():
    cache = seeded(tiny(), "h2o", "absolute", rows=3)
    cache.retire(torch.tensor([False, False, True]))
    assert cache.live.tolist() == [True, True, False]
    cache.reset(torch.tensor([2]))
    assert cache.live.tolist() == [True, True, True]
    assert cache.pos.tolist() == [19, 14, 0]
    for rows in (1, ["a"], [True], [3], [-1]):
        with pytest.raises(ValueError, match="ows"):
            cache.retire(rows)
    assert repr(cache) == "KVCache(h2o 10 tokens a row; 2 layers, 3 rows)"
