"""Views of rows, what a row holds, and the static mode of compiled models."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from litgpt_kv import GPT, KVCache, KVCacheArgs, Strategy, Tokens, registry
from tests.oracle.reference import Policy, arguments, kept_of, logits_of, tiny, tokens_of
from tests.semantics.test_options import LENGTHS, C, rows_of

# -- views, moves and what a row holds ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_view_follows_its_cache_to_other_buffers(gqa: GPT) -> None:
    cache = KVCache.build(gqa, KVCacheArgs("h2o", budget=C), 3)
    view, tokens = cache.row(1), torch.tensor([tokens_of(1, 20)])
    assert cache.row(1) is view
    cache.to(torch.float32).to(torch.float64)  # new buffers, twice
    logits = gqa(tokens[:, :12], view, torch.tensor([12]))
    alone = KVCache.build(gqa, KVCacheArgs("h2o", budget=C))
    torch.testing.assert_close(logits, gqa(tokens[:, :12], alone, torch.tensor([12])), rtol=0, atol=1e-8)
    assert cache.seen == [0, 12, 0] and kept_of(cache, 1) == kept_of(alone, 0)
    view.row(0).reset()
    assert cache.seen == cache.pos.tolist() == [0, 0, 0]


@pytest.mark.parametrize("how", ["view", "reset", "expect"])
@pytest.mark.parametrize("budget", [14, 7])
@torch.no_grad()
def test_a_short_row_of_a_pool_leaves_no_gaps_for_the_pads_of_a_long_one(gqa: GPT, how: str, budget: int) -> None:
    """When the long row has ended, a step reads no more slots than the short one has filled."""
    args, rows = KVCacheArgs("h2o", budget, select="pool"), torch.tensor([tokens_of(b, 10) for b in (1, 2)])
    cache, alone = KVCache.build(gqa, args, 2, 40, static=how == "expect"), KVCache.build(gqa, args, 1, 40)
    gqa(rows[:, :9], cache, torch.tensor([3, 9]))
    gqa(rows[:1, :3], alone, torch.tensor([3]))
    if how == "reset":
        cache.reset([1])
    cache.retire([1])
    with cache.expect(3):
        cache.read_length = 4 if how == "expect" else None  # shorter than the real lengths
        logits = gqa(rows[:1, 3:4], cache.row(0)) if how == "view" else gqa(rows[:, 3:4], cache)[:1]
    torch.testing.assert_close(logits, gqa(rows[:1, 3:4], alone), rtol=0, atol=1e-8)
    assert kept_of(cache, 0) == kept_of(alone, 0)


@torch.no_grad()
def test_inspect_says_what_a_row_holds(gqa: GPT) -> None:
    cache, tokens = (
        KVCache.build(gqa, KVCacheArgs("h2o", budget=C), 2),
        torch.tensor([tokens_of(b, 14) for b in (1, 2)]),
    )
    gqa(tokens[:, :13], cache, torch.tensor([13, 4]))
    layers = cache.inspect(0)
    assert len(layers) == 2 and all(len(layer.heads) == 2 and not layer.unrotated for layer in layers)
    for head in layers[1].heads:
        assert head.positions.shape == (C,) and head.positions.tolist() == sorted(head.positions.tolist())
        assert torch.equal(head.scores, head.statistics["mass"]) and head.keys.shape == head.values.shape == (C, 6)
    assert [head.positions.tolist() for head in cache.inspect(1)[0].heads] == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match="The cache has rows 0 to 1, got 2"):
        cache.inspect(2)


def test_a_static_cache_counts_and_evicts_as_another(gqa: GPT) -> None:
    rows, prompts = rows_of(LENGTHS), LENGTHS
    for policy in (Policy("sink", C, 2, 0, interval=3), Policy("h2o", C, 1, 2, interval=3), Policy("h2o", C, 1, 2)):
        caches = [KVCache.build(gqa, arguments(policy), 4, static=static) for static in (False, True)]
        plain, static = (logits_of(gqa, cache, rows, prompts, "full") for cache in caches)
        assert caches[0].seen == caches[1].seen
        for b in range(4):
            assert kept_of(caches[0], b) == kept_of(caches[1], b)
            for i, logits in plain[b].items():
                torch.testing.assert_close(static[b][i], logits, rtol=0, atol=1e-10)
        caches[1].static = False
        assert caches[1].seen == caches[0].seen
        token = torch.tensor([[1]] * 4)
        for cache in caches:
            cache.revive()
        torch.testing.assert_close(gqa(token, caches[1]), gqa(token, caches[0]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("budget", [14, 5])
@torch.no_grad()
def test_a_row_takes_the_state_of_a_static_cache(gqa: GPT, budget: int) -> None:
    """The host of a static cache does not count decode steps; that of another one must know them."""
    tokens = torch.tensor([tokens_of(1, 12)])
    static, cache = (KVCache.build(gqa, KVCacheArgs("h2o", budget), 1, 40, static=flag) for flag in (True, False))
    gqa(tokens[:, :3], static, torch.tensor([3]))
    for i in range(3, 9):
        gqa(tokens[:, i : i + 1], static)
    cache.restore(0, static.row(0).repeat(1))
    assert cache.seen == [9]
    torch.testing.assert_close(gqa(tokens[:, 9:10], cache), gqa(tokens[:, 9:10], static), rtol=0, atol=1e-8)


def test_too_large_a_cache_is_refused_with_its_size(monkeypatch):
    plain, model = KVCache.__init__, tiny()
    size = KVCache.nbytes(model.config, "dense", 3, 48, torch.float64)["total"]

    def full(self, *args):
        if args[6][0].type == "cpu":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes.")
        plain(self, *args)

    monkeypatch.setattr(KVCache, "__init__", full)
    with pytest.raises(ValueError, match=f"A cache of {size:,} bytes does not fit the memory: 3 rows"):
        KVCache.build(model, "dense", 3, 48)


@dataclass(frozen=True)
class Misshapen(Strategy):
    needs = frozenset({"values"})

    def score(self, tokens: Tokens) -> object:
        norm = tokens.values.norm(dim=-1)
        return {1: norm[..., :1], 2: norm.mean(1), 3: tokens.values, 4: None}[Misshapen.kind]


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_a_score_of_another_shape_is_refused(kind: int, gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KINDS["strategy"], "misshapen", Misshapen)
    monkeypatch.setattr(Misshapen, "kind", kind, raising=False)
    cache = KVCache.build(gqa, KVCacheArgs("misshapen", budget=6), 1, 30)
    with pytest.raises(ValueError, match=r"Misshapen.score must give a number for each token, \(1, 2, 9\) here"):
        gqa(torch.arange(9)[None], cache, torch.tensor([9]))
