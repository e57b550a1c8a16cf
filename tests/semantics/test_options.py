"""Interval, kept prompts, pools and prompts in pieces, against the naive reference (cases 26 to 31)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from litgpt_kv import GPT, KVCache, KVCacheArgs, Strategy, Tokens, registry
from litgpt_kv.cache.plan import pattern
from litgpt_kv.generate import generate
from tests.oracle.reference import Policy, compare, kept_of, logits_of, scores_of, tiny, tokens_of, walk
from tests.oracle.strategies import FEW, NAMES, options_of, plain

C = 9
LENGTHS = [1, C - 1, C, 2 * C + 1]
WAYS = ("streamed", "full", "admitted")
NAMED = [Policy("window", C), Policy("sink", C, 2, 0), Policy("h2o", C, 1, 3), Policy("h2o", C, 0, 1)]
POSITIONS = ("absolute", "cache")
both_positions = pytest.mark.parametrize("positions", POSITIONS)
every_way = pytest.mark.parametrize("way", WAYS)


def rows_of(prompts: list[int], new: int = 11) -> list[list[int]]:
    return [tokens_of(n + 1, n + new) for n in prompts]


# -- 26, 27: interval --------------------------------------------------------------------------------------------------


@every_way
@both_positions
@pytest.mark.parametrize("interval", [2, 5])
@pytest.mark.parametrize("policy", NAMED, ids=lambda p: f"{p.name}-{p.sinks}-{p.recent}")
def test_26_27_interval_equals_the_reference_in_ragged_batches(
    gqa: GPT, policy: Policy, interval: int, positions: str, way: str
) -> None:
    compare(gqa, replace(policy, interval=interval, positions=positions), rows_of(LENGTHS), LENGTHS, way)


@both_positions
def test_26_interval_under_sliding_windows(positions: str) -> None:
    model = tiny(seed=4, sliding_window_size=12, sliding_window_indices=[1, 0])
    for policy in NAMED[1:3]:
        compare(model, replace(policy, interval=4, positions=positions), rows_of(LENGTHS, 20), LENGTHS, "full")


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_26_a_row_holds_between_budget_less_interval_and_budget(gqa: GPT, interval: int) -> None:
    cache = KVCache.build(gqa, KVCacheArgs("h2o", budget=C, sinks=1, recent=2, interval=interval), max_tokens=60)
    counts = []
    for _ in walk(gqa, cache, rows_of([4], 40), [4], "full"):
        counts.append({len(head) for heads in kept_of(cache, 0) for head in heads})
    assert counts[: C - 3] == [{n} for n in range(4, C + 1)], "the first eviction comes when the row is full"
    expected = [{C - interval + 1 + (i % interval)} for i in range(len(counts) - (C - 3))]
    assert counts[C - 3 :] == expected


def test_26_blocks_under_an_interval_evict_before_they_attend(gqa: GPT) -> None:
    cache = KVCache.build(gqa, KVCacheArgs("window", budget=C, interval=4))
    assert not cache.exact_blocks
    tokens = tokens_of(3, 30)
    gqa(torch.tensor([tokens[:8]]), cache, torch.tensor([8]))
    gqa(torch.tensor([tokens[8:11]]), cache)  # one is free: two must leave, so four do
    assert kept_of(cache, 0)[0][0] == list(range(4, 11))
    gqa(torch.tensor([tokens[11:12]]), cache)
    assert kept_of(cache, 0)[0][0] == list(range(4, 12))


# -- 28: kept prompts --------------------------------------------------------------------------------------------------


@both_positions
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("policy", NAMED, ids=lambda p: f"{p.name}-{p.sinks}-{p.recent}")
def test_28_each_row_keeps_its_own_prompt(gqa: GPT, policy: Policy, interval: int, positions: str) -> None:
    prompts = [1, 3, 5] if policy.recent < 3 else [1, 2, 3]
    policy = replace(policy, keep_prompt=True, interval=interval, positions=positions)
    for way in WAYS:
        compare(gqa, policy, rows_of(prompts, 20), prompts, way)


def test_28_exactly_one_token_too_many_is_refused(gqa: GPT) -> None:
    args = KVCacheArgs("h2o", budget=C, sinks=0, recent=2, interval=3, keep_prompt=True)
    cache = KVCache.build(gqa, args)
    tokens = torch.tensor([tokens_of(1, 10)])
    with pytest.raises(ValueError, match=r"budget of at least 10: prompt 5 \+ recent 2 \+ interval 3; the budget is 9"):
        gqa(tokens[:, :5], cache, torch.tensor([5]))
    with pytest.raises(ValueError, match="budget of at least 10"):
        cache.set_prompt_lengths({0: 5})
    gqa(tokens[:, :4], cache, torch.tensor([4]))
    for t in range(4, 10):
        gqa(tokens[:, t : t + 1], cache)
    assert all(set(range(4)) <= set(head) for heads in kept_of(cache, 0) for head in heads)


# -- 29: pools ---------------------------------------------------------------------------------------------------------


@every_way
@both_positions
@pytest.mark.parametrize(("groups", "pools"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("interval", [1, 3])
def test_29_a_pool_keeps_what_the_reference_keeps(
    groups: int, pools: int, interval: int, positions: str, way: str
) -> None:
    model = tiny(seed=8, n_query_groups=groups)
    policy = Policy("h2o", C, 1, 2, positions, interval=interval, select="pool", pools=pools, floor=0.35)
    compare(model, policy, rows_of(LENGTHS), LENGTHS, way)


def test_29_a_pool_of_one_head_is_that_head(mqa: GPT) -> None:
    rows, found = rows_of([4, 12]), []
    for select in ("head", "pool"):
        cache = KVCache.build(mqa, KVCacheArgs("h2o", budget=C, recent=2, select=select), 2)
        found.append((logits_of(mqa, cache, rows, [4, 12], "full"), kept_of(cache, 0), kept_of(cache, 1)))
    assert found[0][1:] == found[1][1:]
    assert all(torch.equal(found[0][0][b][i], x) for b in range(2) for i, x in found[1][0][b].items())


@dataclass(frozen=True)
class Favourite(Strategy):
    """Tokens of one head are worth more than those of all others, or all are worth the same."""

    head: int = -1
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score(self, tokens: Tokens) -> Tensor:
        bonus = torch.zeros(tokens.keys.shape[:3])
        if self.head >= 0:
            bonus[:, self.head] = 1.0
        return bonus


def test_29_shares_floors_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KINDS["strategy"], "favourite", Favourite)
    model, tokens = tiny(seed=8, n_query_groups=4), tokens_of(1, 60)
    for head, floor, expected in ((-1, 0.2, [10] * 4), (2, 0.2, [2, 2, 34, 2]), (0, 0.5, [25, 5, 5, 5])):
        args = KVCacheArgs("favourite", budget=10, recent=1, select="pool", floor=floor, options={"head": head})
        cache = KVCache.build(model, args, max_tokens=90)
        logits_of(model, cache, [tokens], [45], "full")
        counts = [len(kept) for kept in kept_of(cache, 0)[1]]
        assert sum(counts) == 40 and counts == expected, (head, counts)
        assert cache.layers[0].keys.read(40).shape == (1, 1, 40, 6)
        promised = KVCache.nbytes(model.config, args, 1, 90, dtype=torch.float64)
        assert promised == cache.allocated() and promised["keys"] == 2 * 4 * 10 * 6 * 8


@dataclass(frozen=True)
class Incomparable(Favourite):
    """Every head has its own scale: compared as they are, head 1 would take all."""

    comparable: ClassVar[bool] = False

    def score(self, tokens: Tokens) -> Tensor:
        scale = torch.tensor([1.0, 1000.0, 1.0, 1.0]).view(1, 4, 1)
        return (tokens.pos + 1).clamp(min=0) * scale


def test_29_scores_that_cannot_be_compared_are_divided_by_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KINDS["strategy"], "incomparable", Incomparable)
    model, tokens = tiny(seed=8, n_query_groups=4), torch.tensor([tokens_of(1, 45)])
    args = KVCacheArgs("incomparable", budget=10, recent=0, sinks=0, select="pool", floor=0.0)
    cache = KVCache.build(model, args, max_tokens=90)
    model(tokens, cache, torch.tensor([45]))
    assert kept_of(cache, 0)[0] == [list(range(35, 45))] * 4


def test_29_pools_must_divide_the_heads(gqa: GPT) -> None:
    for args, message in (
        (dict(pools=3, select="pool"), "pools must divide the 2 key/value heads, got 3"),
        (dict(pools=2), "pools 2 goes with select 'pool' only"),
        (dict(select="pool", floor=1.0), "floor 1 keeps 9 tokens a head"),
    ):
        with pytest.raises(ValueError, match=message):
            KVCache.build(gqa, KVCacheArgs("h2o", budget=C, **args))


def test_one_choice_for_a_layer_is_the_mean_over_its_heads(gqa: GPT) -> None:
    cache = KVCache.build(gqa, KVCacheArgs("h2o", budget=C, sinks=0, recent=2, select="layer"))
    apart = KVCache.build(gqa, KVCacheArgs("h2o", budget=60, sinks=0, recent=2))
    tokens = [tokens_of(2, 20)]
    for c in (cache, apart):
        gqa(torch.tensor([tokens[0][:12]]), c, torch.tensor([12]))
    first, second = kept_of(cache, 0)[0]
    assert first == second and len(first) == C
    a, b = scores_of(apart, 0)[0]
    mean = {p: (a[p] + b[p]) / 2 for p in range(10)}
    assert sorted([*sorted(mean, key=lambda p: -mean[p])[: C - 2], 10, 11]) == first


# -- budgets by pattern ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "layers"), list(itertools.product((20, 64, 101), (1, 2, 5, 32))))
def test_a_pattern_keeps_the_total(budget: int, layers: int) -> None:
    budgets = pattern("pyramid", budget, layers)
    assert sum(budgets) == budget * layers and min(budgets) >= 1 and budgets == sorted(budgets, reverse=True)
    assert pattern("funnel", budget, layers) == budgets[::-1]


def test_a_pyramid_is_allocated(gqa: GPT) -> None:
    args = KVCacheArgs("window", budget=20, budget_pattern="pyramid")
    assert [layer.keys.read(99).size(2) for layer in KVCache.build(gqa, args).layers] == [39, 1]
    with pytest.raises(ValueError, match="spreads one budget"):
        KVCacheArgs("window", budget=[1, 2], budget_pattern="pyramid")


# -- 30: pieces of a prompt --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastQueries(Strategy):
    """Reads everything: the last queries, keys, values, own statistics of entering tokens."""

    statistics: ClassVar[tuple[str, ...]] = ("mass", "last", "size", "seen")
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "queries"})
    window: ClassVar[int] = 4

    def enter(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"size": tokens.values.norm(dim=-1)}

    def update(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"seen": tokens["seen"] + (tokens["last"] > 0.1)}

    def score(self, tokens: Tokens) -> Tensor:
        queries, pos = tokens.queries
        keys = tokens.keys
        groups = queries.unflatten(1, (keys.size(1), -1)) * (pos >= 0)[:, None, None, :, None]
        scores = torch.einsum("bgrwd,bgnd->bgn", groups, keys) * tokens.layer.scale
        return scores + tokens["mass"] + tokens["last"] + 0.1 * tokens["size"] + 0.01 * tokens["seen"]


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KINDS["strategy"], "last-queries", LastQueries)


MODELS = {
    "gqa": {},
    "sliding": dict(sliding_window_size=7, sliding_window_indices=[1, 0]),
    "softcap": dict(attention_logit_softcapping=3.0),
    "yarn": dict(
        rope_adjustments=dict(factor=8.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=16, mscale_all_dim=0.8)
    ),
}


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("kind", MODELS)
@both_positions
@pytest.mark.parametrize("name", [*FEW, "last-queries"])
def test_30_pieces_equal_one_pass(name: str, positions: str, kind: str) -> None:
    pieces_equal_one_pass(name, positions, kind, ("head", "pool") if kind == "gqa" else ("head",))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in FEW and not plain(n).rereads])
def test_30_pieces_equal_one_pass_for_every_strategy(name: str) -> None:
    pieces_equal_one_pass(name, plain(name).positions, "gqa", (plain(name).select,))


def test_30_prompts_that_are_read_twice_are_read_in_one_pass(gqa: GPT) -> None:
    cache = KVCache.build(gqa, KVCacheArgs("kvzip", budget=C, options={"chunk": 30}))
    with pytest.raises(ValueError, match="reads them in one pass, not in pieces"):
        cache.read_in_pieces(0, 20)
    context = gqa.max_seq_length
    with pytest.raises(ValueError, match=f"read again 30 tokens at a time, is over the limit of {context}"):
        gqa(torch.zeros(1, context - 29, dtype=torch.int64), cache, torch.tensor([context - 29]))
    with pytest.raises(ValueError, match=r"Prompt 0 does not fit: A prompt of .* read again 30 tokens at a time"):
        generate(gqa, [[1] * (context - 29)], cache, max_new_tokens=2, prefill="full")
    cache.reset()
    gqa(torch.zeros(1, context - 30, dtype=torch.int64), cache, torch.tensor([context - 30]))


@torch.no_grad()
def pieces_equal_one_pass(name: str, positions: str, kind: str, selects: tuple[str, ...]) -> None:
    """A prompt in pieces gives the logits, the kept tokens, the scores and the later logits of one pass."""
    model, tokens = tiny(seed=3, **MODELS[kind]), torch.tensor([torch.randperm(61).tolist()[:40]])
    own = options_of(name, model.config) if name in NAMES else {}
    keep = dict(budget=C, sinks=1, recent=2) if registry.get("strategy", name).evicts else {}
    for select in selects:
        args = KVCacheArgs(name, positions=positions, select=select, options=own, **keep)
        whole = KVCache.build(model, args, 2)
        whole.retire([0])
        first = model(tokens[:, :25], whole.row(1), torch.tensor([25]))
        for sizes in ([25], [1] * 25, [7, 7, 7, 4], [24, 1]):
            cache = KVCache.build(model, args, 2)
            cache.retire([0])
            reader, start = cache.read_in_pieces(1, 25), 0
            for size in sizes:
                logits = model(tokens[:, start : start + size], reader)
                start += size
            assert reader.remaining == 0 and cache.seen == [0, 25]
            torch.testing.assert_close(logits, first, rtol=0, atol=1e-8)
            assert kept_of(cache, 1) == kept_of(whole, 1)
            for found, expected in zip(scores_of(cache, 1), scores_of(whole, 1)):
                assert [pytest.approx(head, rel=0, abs=1e-8) for head in expected] == found
        for t in range(25, 36):
            token = tokens[:, t : t + 1].expand(2, 1)
            torch.testing.assert_close(model(token, cache)[1], model(token, whole)[1], rtol=0, atol=1e-8)
        assert kept_of(cache, 1) == kept_of(whole, 1)


def test_30_what_pieces_refuse(gqa: GPT) -> None:
    cache = KVCache.build(gqa, "h2o", 2)
    reader = cache.read_in_pieces(0, 10)
    with pytest.raises(ValueError, match="longer than the 10 that remain"):
        gqa(torch.ones(1, 11, dtype=torch.int64), reader)
    gqa(torch.ones(1, 4, dtype=torch.int64), reader)
    with pytest.raises(ValueError, match="longer than the 6 that remain"):
        gqa(torch.ones(1, 7, dtype=torch.int64), reader)
    with pytest.raises(ValueError, match="over the limit of 96"):
        cache.read_in_pieces(1, 97)
    gqa(torch.ones(1, 6, dtype=torch.int64), reader)
    with pytest.raises(ValueError, match="A prompt needs empty rows"):
        cache.read_in_pieces(0, 3)


# -- 31: steps that fail -----------------------------------------------------------------------------------------------


class Failure(Exception):
    pass


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["dense", "h2o"])
@torch.no_grad()
def test_31_a_step_that_fails_in_a_layer_is_noticed(name: str, layer: int) -> None:
    model, tokens = tiny(seed=2, n_layer=3), torch.tensor([tokens_of(b, 30) for b in (1, 2)])
    cache = KVCache.build(model, KVCacheArgs(name, budget=None if name == "dense" else C), 2, max_tokens=40)
    length = torch.tensor([10, 6])
    expected = model(tokens[:, :10], cache, length)
    step = model(tokens[:, 10:11], cache)

    def fail(*_: object) -> None:
        raise Failure

    for again in range(3):
        cache.reset()
        hook = model.transformer.h[layer].mlp.register_forward_pre_hook(fail)
        if again == 0:  # a prefill
            with pytest.raises(Failure):
                model(tokens[:, :10], cache, length)
        hook.remove()
        if again:
            model(tokens[:, :10], cache, length)
            cache.retire([1] if again == 2 else [])
            hook = model.transformer.h[layer].mlp.register_forward_pre_hook(fail)
            with pytest.raises(Failure):
                model(tokens[:, 10:11], cache)
            hook.remove()
            assert cache.seen == cache.pos.tolist() == [10, 6], "a failed step counts nothing"
        broken = "Row 0 is" if again == 2 else "Rows 0, 1 are"
        for call in (
            lambda: model(tokens[:, 10:11], cache),
            lambda: model(tokens[:, 10:12], cache),
            lambda: model(tokens[:, :10], cache, length),
            lambda: cache.save("nowhere"),
            lambda: cache.repeat(2),
        ):
            with pytest.raises(ValueError, match=f"{broken} in the middle of a step"):
                call()
        cache.reset([0])
        if again == 2:  # the retired row was not part of it
            cache.revive()
            row = model(tokens[:1, :10], cache.row(0), length[:1])
            torch.testing.assert_close(row, expected[:1], rtol=0, atol=1e-8)
        else:
            with pytest.raises(ValueError, match="Row 1 is in the middle of a step"):
                model(tokens[:, 10:11], cache)
            cache.reset([1])
            torch.testing.assert_close(model(tokens[:, :10], cache, length), expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(model(tokens[:, 10:11], cache), step, rtol=0, atol=1e-8)


@dataclass(frozen=True)
class Breaks(Strategy):
    """Fails when it is asked."""

    statistics: ClassVar[tuple[str, ...]] = ("mass",)

    def score(self, tokens: Tokens) -> Tensor:
        raise Failure


@torch.no_grad()
def test_31_a_strategy_and_a_storage_that_fail_are_noticed(gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KINDS["strategy"], "breaks", Breaks)
    cache = KVCache.build(gqa, KVCacheArgs("breaks", budget=C))
    tokens = torch.tensor([tokens_of(1, 30)])
    gqa(tokens[:, :C], cache, torch.tensor([C]))
    with pytest.raises(Failure):
        gqa(tokens[:, C : C + 1], cache)
    with pytest.raises(ValueError, match="Row 0 is in the middle of a step"):
        gqa(tokens[:, C : C + 1], cache)
    cache.reset()
    with pytest.raises(Failure):
        gqa(tokens[:, : C + 1], cache, torch.tensor([C + 1]))
    with pytest.raises(ValueError, match="Row 0 is in the middle of a step"):
        gqa(tokens[:, :C], cache, torch.tensor([C]))
    other = KVCache.build(gqa, "h2o")
    gqa(tokens[:, :5], other, torch.tensor([5]))
    with monkeypatch.context() as patch:
        patch.setattr(type(other.layers[1].values), "write", lambda *_: (_ for _ in ()).throw(Failure()))
        with pytest.raises(Failure):
            gqa(tokens[:, 5:6], other)
    with pytest.raises(ValueError, match="Row 0 is in the middle of a step"):
        gqa(tokens[:, 5:6], other)


def test_31_a_piece_that_fails_is_noticed(gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, tokens = KVCache.build(gqa, "h2o", 2), torch.tensor([tokens_of(1, 12)])
    reader = cache.read_in_pieces(1, 12)
    gqa(tokens[:, :4], reader)
    with monkeypatch.context() as patch:
        patch.setattr(gqa.transformer.h[1].mlp, "forward", lambda x: (_ for _ in ()).throw(Failure()))
        with pytest.raises(Failure):
            gqa(tokens[:, 4:8], reader)
    with pytest.raises(ValueError, match="A piece of this prompt failed"):
        gqa(tokens[:, 4:8], reader)
    cache.reset([1])
    again = cache.read_in_pieces(1, 12)
    whole = KVCache.build(gqa, "h2o")
    for part in (tokens[:, :4], tokens[:, 4:]):
        logits = gqa(part, again)
    torch.testing.assert_close(logits, gqa(tokens, whole, torch.tensor([12])), rtol=0, atol=1e-8)
