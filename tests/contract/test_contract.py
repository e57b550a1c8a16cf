"""What every registered strategy and storage must hold; nothing is listed by name.

Registering a strategy or a storage is what adds it here. Every strategy runs with storage plain at its own kind of
positions, one of each sort at the other kind, too; every other storage runs with one strategy that goes by position,
one that goes by statistics and one that reads keys; every rope runs with one strategy for all that strategies need.
Sizes: C slots, S sinks, R recent tokens. Token 60 has an embedding of NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs, Strategy, Tokens, registry
from litgpt_kv.cache.spec import layer_spec
from litgpt_kv.generate import generate
from tests.oracle.reference import Oracle, Policy, compare, kept_of, logits_of, slots_of, tiny, walk
from tests.oracle.strategies import FEW, NAMES, ONE_OF_NEEDS, THREE, options_of, plain
from tests.oracle.walks import storages_for

C, S, R, ROOM = 8, 1, 3, 40
WAYS = ("streamed", "full", "admitted")
ROPES = {
    "partial": dict(rotary_percentage=0.67),
    "odd": dict(rotary_percentage=0.5),
    "one": dict(rotary_percentage=0.17),
    "llama3": dict(
        rope_adjustments=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)
    ),
    "linear": dict(rope_adjustments=dict(factor=4.0)),
    "yarn": dict(
        rope_adjustments=dict(factor=8.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=16, mscale_all_dim=0.8)
    ),
    "condensed": dict(rope_condense_ratio=4),
    "interleaved": dict(rope_interleave=True),
    "dual": dict(rope_local_base_freq=50.0, rope_indices=[0, 1]),
    "sliding": dict(sliding_window_size=9, sliding_window_indices=[1, 0]),
    "softcap": dict(attention_logit_softcapping=3.0, attention_scores_scalar=9),
}


class Combo(NamedTuple):
    """One strategy, storage and kind of positions."""

    strategy: str
    storage: str
    positions: str

    @property
    def evicts(self) -> bool:
        return registry.get("strategy", self.strategy).evicts

    def args(self, model: GPT, budget: int = C) -> KVCacheArgs:
        if model.config.latent_attention and self.strategy in NAMES and not plain(self.strategy).latent:
            pytest.skip(f"{self.strategy} is not defined for latent attention")
        keep = dict(budget=budget, sinks=S, recent=R) if self.evicts else {}
        own = options_of(self.strategy, model.config) if self.strategy in NAMES else {}
        stored = {"group": 4} if "group" in registry.options("storage", self.storage) else {}
        keep |= dict(storage=self.storage, storage_options=stored)
        if self.strategy in NAMES and plain(self.strategy).select == "pool":
            keep["select"] = "head"  # heads that share slots: tests/semantics/test_options.py
        return KVCacheArgs(self.strategy, positions=self.positions, options=own, **keep)

    def build(self, model: GPT, rows: int = 1, budget: int = C) -> KVCache:
        return KVCache.build(model, self.args(model, budget), batch_size=rows, max_tokens=ROOM)


POSITIONS = ("absolute", "cache")
PLAIN = [Combo(n, "plain", p) for n in NAMES for p in POSITIONS if p == plain(n).positions or n in FEW]
STORED = [(n, s) for n in THREE for s in storages_for(n) if s != "plain"]
COMBOS = PLAIN + [Combo(n, s, plain(n).positions) for n, s in STORED]
every = pytest.mark.parametrize("combo", COMBOS, ids="-".join)


def loss(storage: str) -> float:
    """The largest error of storing and reading, relative to the largest element of a token's vector."""
    x = torch.randn(1, 1, 64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for role in ("keys", "values"):
        buffer = registry.build("storage", storage, role, (1, 1, 64, 6), torch.float64, torch.device("cpu"))
        buffer.write(torch.arange(64).view(1, 1, 64), x)
        errors.append(float(((buffer.read(64) - x).abs().amax(-1) / x.abs().amax(-1)).max()))
    return max(errors)


def in_ways(
    name: str, ways: tuple[str, ...], holds: Callable[[Combo, str], bool] = lambda combo, way: True
) -> pytest.MarkDecorator:
    """Every combination in the last way; one strategy of each sort, and every storage, in all of them that `holds`."""
    some = [c for c in COMBOS if c.strategy in FEW]
    cases = [(c, w) for c in some for w in ways[:-1]] + [(c, ways[-1]) for c in COMBOS]
    cases = [case for case in cases if holds(*case)]
    return pytest.mark.parametrize(("combo", name), cases, ids=lambda x: x if isinstance(x, str) else "-".join(x))


@pytest.fixture(scope="module")
def model() -> GPT:
    model = tiny(seed=5)
    model.transformer.wte.weight[60] = math.nan
    return model


@pytest.fixture(scope="module")
def references(model: GPT) -> list[Oracle]:
    """What a first layer knows of three rows: its keys and values depend on the token alone."""
    oracles = [Oracle(model, Policy()) for _ in range(3)]
    for b, oracle in enumerate(oracles):
        oracle.feed(row_of(b + 1, 26))
    return oracles


def row_of(seed: int, n: int) -> list[int]:
    """No token comes twice: of two, some strategies would have scores that only rounding tells apart."""
    return torch.randperm(60, generator=torch.Generator().manual_seed(seed)).tolist()[:n]


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def same(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor], tol: float = 1e-8) -> None:
    """Logits by token index agree wherever both have them, and they do have some in common."""
    common = sorted(found.keys() & expected.keys())
    assert common and common[-1] == max(expected)
    for i in common:
        close(found[i], expected[i], tol)


def state(cache: KVCache, b: int) -> list[torch.Tensor]:
    """Copies of all that a row holds."""
    row = cache.row(b)
    return [buffer.clone() for name, buffer in sorted(row.named_buffers()) if not name.endswith(".live")]


def variants() -> Iterator[object]:
    for combo in COMBOS:
        yield pytest.param(combo, {}, id="-".join(combo))
    for combo, (name, rope) in itertools.product(PLAIN, ROPES.items()):
        odd = name in ("odd", "one")
        if combo.strategy not in ONE_OF_NEEDS or (combo.positions != plain(combo.strategy).positions and odd):
            continue
        if not odd or (combo.positions == "absolute" and "rope" not in plain(combo.strategy).needs):
            yield pytest.param(combo, rope, id="-".join((*combo, name)))


@pytest.mark.parametrize(("combo", "rope"), list(variants()))
def test_budget_of_the_whole_sequence_equals_no_cache(combo: Combo, rope: dict) -> None:
    model, tokens, tol = tiny(seed=6, **rope), row_of(1, 20), max(1e-8, 30 * loss(combo.storage))
    full = dict(enumerate(model(torch.tensor([tokens]))[0]))
    for prompt in (1, 11):
        same(logits_of(model, combo.build(model, budget=20), [tokens], [prompt], "full")[0], full, tol)


# Storages that lose digits are not "streamed" here: a first pass sees its own keys as they are, and all rows' first
# passes are as long as the shortest prompt. The engine reads each prompt by itself, and is held with them below.
@in_ways("way", WAYS, lambda combo, way: way != "streamed" or not loss(combo.storage))
def test_row_of_a_ragged_batch_equals_the_prompt_alone(model: GPT, combo: Combo, way: str) -> None:
    rows, prompts = (
        [row_of(b, n + 12) for b, n in enumerate((1, C + 1, C - 2, 2 * C + 3))],
        [1, C + 1, C - 2, 2 * C + 3],
    )
    nan = [60] * 24
    together = logits_of(model, combo.build(model, 5), [*rows, nan], [*prompts, C + 5], way)
    assert all(logits.isnan().all() for logits in together[-1].values())
    pairs = logits_of(model, combo.build(model, 2), rows[1:3], prompts[1:3], way)
    for b, (row, prompt) in enumerate(zip(rows, prompts)):
        (alone,) = logits_of(model, combo.build(model), [row], [prompt], way)
        same(together[b], alone)
        if b in (1, 2):
            same(pairs[b - 1], alone)


@pytest.mark.parametrize("method", ["min-length", "full"])
@pytest.mark.parametrize(("strategy", "storage"), STORED, ids="-".join)
def test_the_engine_answers_a_row_as_alone_with_storages_that_lose(strategy: str, storage: str, method: str) -> None:
    model, prompts = tiny(seed=5), [row_of(b, n) for b, n in enumerate((3, C + 4, 2 * C + 3))]
    args = Combo(strategy, storage, plain(strategy).positions).args(model)
    options = dict(max_new_tokens=8, sampling=SamplingArgs(temperature=0), prefill=method)
    together = generate(model, prompts, args, **options)
    for prompt, found in zip(prompts, together):
        assert torch.equal(generate(model, [prompt], args, **options)[0], found)


@every
def test_permuted_rows_give_permuted_results(model: GPT, combo: Combo) -> None:
    rows, prompts, order = [row_of(b, 20) for b in range(3)], [3, C + 4, C], [2, 0, 1]
    for way in WAYS:
        first, second = combo.build(model, 3), combo.build(model, 3)
        plain = logits_of(model, first, rows, prompts, way)
        mixed = logits_of(model, second, [rows[b] for b in order], [prompts[b] for b in order], way)
        for place, b in enumerate(order):
            same(mixed[place], plain[b], 1e-12)
            assert kept_of(second, place) == kept_of(first, b)


@every
@torch.no_grad()
def test_prefill_equals_shorter_prefill_and_decode(model: GPT, combo: Combo) -> None:
    tol = max(1e-8, 30 * loss(combo.storage))
    for T in (2, C):
        idx, one, two = torch.tensor([row_of(T, T)]), combo.build(model), combo.build(model)
        at_once = model(idx, one, torch.tensor([T]))
        model(idx[:, :-1], two, torch.tensor([T - 1]))
        close(model(idx[:, -1:], two)[:, 0], at_once, tol)
        assert kept_of(one, 0) == kept_of(two, 0) == [[list(range(T))] * one.layers[0].spec.groups] * 2
        for x, y in zip(state(one, 0), state(two, 0)):
            if x.dtype == torch.float64:
                close(x, y, tol)


@every
def test_first_difference_is_at_the_step_the_budget_says(model: GPT, combo: Combo) -> None:
    tokens = row_of(7, C + 6)
    if not combo.evicts:
        cache = combo.build(model)
        for _ in walk(model, cache, [row_of(7, ROOM)], [C], "full"):
            pass
        with pytest.raises(ValueError, match=f"limit of {ROOM}"):
            model(torch.tensor([[1]]), cache)
        return
    (roomy,) = logits_of(model, combo.build(model, budget=C + 6), [tokens], [1], "streamed")
    for prompt, way in itertools.product((1, C - 1, C, C + 2), WAYS):
        (small,) = logits_of(model, combo.build(model), [tokens], [prompt], way)
        (large,) = logits_of(model, combo.build(model, budget=C + 6), [tokens], [prompt], way)
        different = [i for i in small if (small[i] - large.get(i, roomy[i])).abs().max() > 1e-7]
        first = C if way == "streamed" else max(C, prompt)
        if loss(combo.storage) == 0:
            assert different == list(range(first, C + 6)), (prompt, way)
        elif way != "streamed":
            assert different[0] == first, (prompt, way)


@in_ways("way", WAYS)
def test_slots_hold_what_they_say(model: GPT, references: list[Oracle], combo: Combo, way: str) -> None:
    rows, prompts, error = [row_of(b, 26) for b in (1, 2, 3)], [1, C + 5, C], loss(combo.storage)
    cache = combo.build(model, 3)
    for at, _ in walk(model, cache, rows, prompts, way):
        for b, i in enumerate(at):
            if i is None:
                continue
            for layer in range(2):
                pos, _ = slots_of(cache, layer, b)
                for head in pos.tolist():
                    held = sorted(p for p in head if p >= 0)
                    assert len(held) == len(set(held)) <= pos.size(-1) and held[-1] == i
                    if combo.evicts:
                        assert pos.size(-1) == C and set(held) >= {p for p in range(i + 1) if p < S or p > i - R}
                    else:
                        assert held == list(range(i + 1))
            stored, (pos, _) = cache.layers[0], slots_of(cache, 0, b)
            keys, values = stored.keys.read(pos.size(1))[b], stored.values.read(pos.size(1))[b]
            for g, slot in (pos >= 0).nonzero().tolist():
                p = int(pos[g, slot])
                key, value = references[b].keys[0][p, g], references[b].values[0][p, g]
                key = references[b].arranged(key) if stored.stores_unrotated else references[b].rotate(key, p, 0)
                for x, y in ((keys[g, slot], key), (values[g, slot], value)):
                    close(x, y, 1e-10 + 2 * error * float(y.abs().max()))
            assert not torch.cat((keys[pos < 0], values[pos < 0]), -1).any(), "an empty slot is not zero"


@every
def test_reset_then_rerun_is_identical(model: GPT, combo: Combo) -> None:
    rows, cache = [row_of(1, 22), [60] * 22], combo.build(model, 2)
    first = logits_of(model, cache, rows, [C + 2, 4], "full")
    end = state(cache, 0)
    cache.reset()
    assert cache.pos.tolist() == [0, 0] and not any(itertools.chain(*kept_of(cache, 1)))
    again = logits_of(model, cache, rows, [C + 2, 4], "full")
    assert all(torch.equal(again[0][i], first[0][i]) for i in first[0])
    assert all(torch.equal(x, y) for x, y in zip(state(cache, 0), end))
    cache.reset(rows=[1])
    cache.reset(rows=[0])
    swapped = logits_of(model, cache, rows[::-1], [4, C + 2], "full")  # where the NaN was
    same(swapped[1], first[0], 1e-12)


@every
def test_bytes_are_as_announced_and_do_not_grow(combo: Combo) -> None:
    model = tiny(seed=5, block_size=ROOM)
    cache = combo.build(model, 3)
    before, where = cache.allocated(), {n: b.data_ptr() for n, b in cache.named_buffers()}
    assert before == KVCache.nbytes(model.config, cache.args, 3, ROOM, dtype=torch.float64)
    assert before["total"] == sum(before[n] for n in ("keys", "values", "positions", "statistics")) > 0
    for _ in walk(model, cache, [row_of(b, ROOM) for b in range(3)], [C + 1] * 3, "full"):
        pass
    assert cache.allocated() == before and where == {n: b.data_ptr() for n, b in cache.named_buffers()}


@every
@torch.no_grad()
def test_retired_rows_stay_and_change_nobody(model: GPT, combo: Combo) -> None:
    rows, cache = [row_of(b, 30) for b in (1, 2, 3)], combo.build(model, 3)
    model(torch.tensor([row[:C] for row in rows]), cache, torch.tensor([C, C, C]))
    (alone,) = logits_of(model, combo.build(model), rows[:1], [C], "full")
    cache.retire([2])
    frozen = state(cache, 2), kept_of(cache, 2)
    for i in range(C, 30):
        logits = model(torch.tensor([[rows[0][i]], [rows[1][i]], [i % 60]]), cache)[:, 0]
        close(logits[0], alone[i])
        if i == C + 4:
            cache.retire([1])
    assert cache.pos.tolist() == [30, C + 5, C] and kept_of(cache, 2) == frozen[1]
    assert all(torch.equal(x, y) for x, y in zip(state(cache, 2), frozen[0]))


@every
@torch.no_grad()
def test_a_retired_row_may_hold_more_than_the_others(model: GPT, combo: Combo) -> None:
    rows, cache = [row_of(1, 30), row_of(2, 30)], combo.build(model, 2)
    model(torch.tensor([rows[0][:5], rows[1][:5]]), cache, torch.tensor([2, 5]))
    (alone,) = logits_of(model, combo.build(model), rows[:1], [2], "full")
    cache.retire([1])
    for i in range(2, 12):
        close(model(torch.tensor([[rows[0][i]], [0]]), cache)[0, 0], alone[i])


@in_ways("how", ("never retired", "retired", "retired, reset through the view"))
@torch.no_grad()
def test_a_row_is_admitted_without_changing_the_others(model: GPT, combo: Combo, how: str) -> None:
    rows, new, cache = [row_of(1, 34), [60] * 34], row_of(9, 20), combo.build(model, 2)  # NaN must leave too
    model(torch.tensor([row[: C + 1] for row in rows]), cache, torch.tensor([C + 1, C - 2]))
    (old,) = logits_of(model, combo.build(model), rows[:1], [C + 1], "full")
    (fresh,) = logits_of(model, combo.build(model), [new], [5], "full")
    if how != "never retired":
        cache.retire([1])
    model(torch.tensor([[rows[0][C + 1]], [60]]), cache)
    view, before = cache.row(1), state(cache, 0)
    (view if "view" in how else cache).reset([0] if "view" in how else [1])
    view = cache.row(1)
    close(model(torch.tensor([new[:5]]), view, torch.tensor([5]))[0], fresh[4])
    assert all(torch.equal(x, y) for x, y in zip(state(cache, 0), before)) and cache.pos.tolist() == [C + 2, 5]
    for i in range(5, 20):
        logits = model(torch.tensor([[rows[0][C + i - 3]], [new[i]]]), cache)[:, 0]
        close(logits[0], old[C + i - 3])
        close(logits[1], fresh[i])
    assert cache.tokens()["seen"] == cache.seen == [C + 17, 20]


@pytest.mark.parametrize("combo", [c for c in PLAIN if c.positions == plain(c.strategy).positions], ids="-".join)
@torch.no_grad()
def test_fifty_steps_are_one_graph(combo: Combo) -> None:
    """Every strategy; every storage is in tests/cache/test_storages.py."""
    model, graphs = tiny(seed=5, n_layer=1), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, fullgraph=True)
    rows, prompts = [row_of(1, C - 2 + 51), row_of(2, C + 2 + 51)], [C - 2, C + 2]
    caches = [KVCache.build(model, combo.args(model), batch_size=2, static=static) for static in (False, True)]
    eager = logits_of(model, caches[0], rows, prompts, "full")
    compiled = logits_of(model, caches[1], rows, prompts, "full", step=step)
    for b in range(2):
        same(compiled[b], eager[b])
    assert kept_of(caches[0], 0) == kept_of(caches[1], 0)
    assert len(graphs) == 1


@dataclass(frozen=True)
class Equal(Strategy):
    """Scores all tokens alike."""

    def score(self, tokens: Tokens) -> torch.Tensor:
        return torch.ones_like(tokens.pos, dtype=torch.float32)


@pytest.mark.parametrize("prompt", [1, C, 2 * C])
def test_on_a_tie_the_earlier_token_stays(model: GPT, monkeypatch: pytest.MonkeyPatch, prompt: int) -> None:
    monkeypatch.setitem(registry._KINDS["strategy"], "equal", Equal)
    cache = Combo("equal", "plain", "absolute").build(model, 2)
    rows = [row_of(b, 3 * C) for b in (1, 2)]
    for at, _ in walk(model, cache, rows, [prompt, 3], "full"):
        for b, i in enumerate(at):
            if i is not None:
                expected = [p for p in range(i + 1) if p < C - R or p > i - R]
                assert all(head == expected for heads in kept_of(cache, b) for head in heads), (i, kept_of(cache, b))


PLAINEST = [c for c in PLAIN if c.strategy in FEW and not plain(c.strategy).needs]


@pytest.mark.parametrize("combo", PLAINEST, ids="-".join)
def test_equals_the_naive_reference(model: GPT, combo: Combo) -> None:
    """Others: tests/semantics/test_strategies.py."""
    policy = Policy(combo.strategy, C, S, R, combo.positions) if combo.evicts else Policy(positions=combo.positions)
    prompts = [1, C - 1, C, C + 1, 2 * C]
    for way in WAYS:
        compare(model, policy, [row_of(n, n + 10) for n in prompts], prompts, way)


def test_every_storage_takes_the_key_and_value_widths_of_a_layer(model: GPT) -> None:
    facts = layer_spec(model.config, 0)
    for name in storages_for("dense"):
        for width in {facts.key_size, facts.value_size}:
            buffer = registry.build("storage", name, "keys", (2, 2, 4, width), torch.float32, torch.device("cpu"))
            assert buffer.read(4).shape == (2, 2, 4, width) and not buffer.read(4).any()
