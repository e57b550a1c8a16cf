"""Semantics: precision, retired rows, memory, isolation, limits and errors (cases 18, 22 to 25).

NaN written into an unused slot (case 24) does change results: that unused slots hold zeros is the contract, and
`reference.check_stored` holds it. Case 22 holds at model level by `retire`; stop sequences are generation's.
"""

from __future__ import annotations

import gc
import itertools
import math
import types
from dataclasses import replace

import pytest
import torch

from litgpt_kv import GPT, KVCache, KVCacheArgs
from tests.oracle.reference import (
    Oracle,
    Policy,
    arguments,
    check_stored,
    compare,
    kept_of,
    logits_of,
    scores_of,
    slots_of,
    tiny,
    tokens_of,
    walk,
)

C, S = 8, 2  # the budget and the sinks
POSITIONS = ("absolute", "cache")
POLICIES = [Policy("window", C), Policy("sink", C, S), Policy("h2o", C, 0, C // 2), Policy("h2o", C, S, 1)]
EVERY = [replace(p, positions=at) for p in POLICIES for at in POSITIONS]


def text(policy: Policy) -> str:
    return f"{policy.name}-{policy.budget}-{policy.sinks}-{policy.recent}-{policy.positions}"


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def test_18_scores_grow_past_what_low_precision_counts() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny(n_layer=1, exact=False).to(dtype)
        cache = KVCache.build(model, arguments(Policy("h2o", 4, 0, 1))).to(dtype)
        model(torch.tensor([[1, 2, 3]]), cache, torch.tensor([3]))
        model(torch.tensor([[4]]), cache)
        slots = cache.slots[0]
        mass = slots.statistics["mass"]
        assert mass.dtype == torch.float32 and cache.layers[0].keys.read(4).dtype == dtype
        before = mass[0, 0, 0, 0].item()
        for _ in range(6000):
            slots.add_received("mass", torch.full((1, 1, 2, 4), 0.3), torch.ones(1, dtype=torch.bool))
        assert mass[0, 0, 0, 0].item() - before == pytest.approx(1800, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("prompt", [1, 300])
def test_18_keys_of_a_long_stream_keep_their_angles(dtype: torch.dtype, prompt: int) -> None:
    model, exact = tiny(n_layer=1, exact=False, block_size=320).to(dtype), tiny(n_layer=1, block_size=320)
    cache, tokens = KVCache.build(model, arguments(Policy("sink", 300, 4, positions="cache"))), tokens_of(18, 2000)
    reference, block = Oracle(exact, Policy()), model.transformer.h[0]
    for count in (301, 2000):
        if count == 301:
            for _ in walk(model, cache, [tokens[:301]], [prompt], "full"):
                pass
        else:
            with torch.no_grad():
                for token in tokens[301:]:
                    model(torch.tensor([[token]]), cache)
        pos, stored = slots_of(cache, 0, 0)[0][0], cache.layers[0].keys.read(300)[0, 0].double()
        assert sorted(pos.tolist()) == [*range(4), *range(count - 296, count)]
        qkv = block.attn.qkv(block.norm_1(model.transformer.wte(torch.tensor(tokens)))).double()
        raw = qkv[:, 4 * 6 : 5 * 6]  # after four query heads of six elements the first key head
        error = [(reference.rotate(raw[p], p, 0) - key).norm() / raw[p].norm() for p, key in zip(pos.tolist(), stored)]
        assert max(error) < 0.02, f"after {count} tokens"


@pytest.mark.parametrize("policy", [Policy(), *EVERY], ids=text)
def test_22_a_retired_row_stays_and_changes_nobody(gqa: GPT, policy: Policy) -> None:
    rows, prompts = [tokens_of(22, 4 * C), tokens_of(23, 2 * C + 2)], [C, 2 * C]
    cache = KVCache.build(gqa, arguments(policy), batch_size=2)
    (alone,) = logits_of(gqa, KVCache.build(gqa, arguments(policy)), rows[:1], prompts[:1], "full")
    frozen = None
    for at, logits in walk(gqa, cache, rows, prompts, "full"):
        close(logits[0], alone[at[0]], 1e-12)
        if at[1] is not None:
            frozen = kept_of(cache, 1), scores_of(cache, 1), [[x.clone() for x in s] for s in stored_of(cache, 1)]
    assert cache.pos.tolist() == [4 * C, 2 * C + 2]
    assert (kept_of(cache, 1), scores_of(cache, 1)) == frozen[:2]
    for now, then in zip(itertools.chain(*stored_of(cache, 1)), itertools.chain(*frozen[2])):
        close(now, then, 0)


@pytest.mark.parametrize("policy", [Policy(), *EVERY], ids=text)
def test_22_a_row_may_end_at_the_context_while_others_go_on(policy: Policy) -> None:
    model = tiny(block_size=16)
    rows, prompts = [tokens_of(22, 16), tokens_of(23, 14)], [9, 2]
    compare(model, policy, rows, prompts, "full")


def stored_of(cache: KVCache, b: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By layer what lies in a row's live slots, in the order of the text: keys and values."""
    found = []
    for i, layer in enumerate(cache.layers):
        pos, _ = slots_of(cache, i, b)
        order, empty = pos.argsort(-1).unsqueeze(-1), int((pos[0] < 0).sum())
        for buffer in (layer.keys, layer.values):
            x = buffer.read(pos.size(-1))[b]
            found.append(x.gather(1, order.expand(x.shape))[:, empty:])
    return list(zip(found[::2], found[1::2]))


def reachable(cache: KVCache) -> int:
    """Bytes of all tensors that can be reached from a cache, each place once."""
    found, todo, done = {}, [cache], set()
    while todo:
        thing = todo.pop()
        if id(thing) in done or isinstance(thing, (type, types.FunctionType, types.ModuleType)):
            continue
        done.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[thing.data_ptr()] = max(thing.nbytes, found.get(thing.data_ptr(), 0))
            assert thing.grad_fn is None
        todo += gc.get_referents(thing)
    return sum(found.values())


@pytest.mark.parametrize("policy", EVERY, ids=text)
def test_23_memory_is_as_documented_and_does_not_grow(policy: Policy) -> None:
    model = tiny(block_size=200)
    L, G, D, B = 2, model.config.n_query_groups, model.config.head_size, 2
    cache = KVCache.build(model, arguments(policy), batch_size=B)
    where = {name: buffer.data_ptr() for name, buffer in cache.named_buffers()}
    sizes = []
    for (i, _), _ in walk(model, cache, [tokens_of(b, 20 * C) for b in (1, 2)], [5, 5], "full"):
        sizes += [reachable(cache)] if i in (C + 1, 20 * C - 1) else []
    assert where == {name: buffer.data_ptr() for name, buffer in cache.named_buffers()}
    slots = B * C * (L * G if policy.name == "h2o" else 1)
    mass = 8 * slots if policy.name == "h2o" else 0
    keys = 8 * L * B * G * C * D
    counters = 17 * B  # position, prompt length, whether it is live
    buffers, angles = 2 * keys + 8 * slots + mass + counters, 24 * D  # at most an angle and two amplitudes an element
    assert sizes[0] == sizes[1]
    assert buffers <= sizes[0] <= buffers + angles
    promised = KVCache.nbytes(model.config, arguments(policy), B, 200, dtype=torch.float64)
    assert promised == cache.allocated()
    assert (promised["total"], promised["keys"]) == (buffers, keys)


@pytest.mark.parametrize("policy", [Policy(), *EVERY], ids=text)
def test_23_a_trainable_model_leaves_no_autograd_graph(policy: Policy) -> None:
    model = tiny().requires_grad_(True)
    cache = KVCache.build(model, arguments(policy))
    model(torch.tensor([tokens_of(23, C)]), cache, torch.tensor([C]))
    for token in tokens_of(24, 3):
        model(torch.tensor([[token]]), cache)
    assert not [name for name, buffer in cache.named_buffers() if buffer.requires_grad or buffer.grad_fn]


def poisoned() -> GPT:
    """A model whose token 60 gives NaN."""
    model = tiny()
    model.transformer.wte.weight[60] = math.nan
    return model


@pytest.mark.parametrize("policy", [Policy(), *EVERY], ids=text)
def test_24_reset_then_reuse_equals_fresh_even_after_nan(policy: Policy) -> None:
    model, row = poisoned(), [t % 60 for t in tokens_of(24, 3 * C)]
    (fresh,) = logits_of(model, KVCache.build(model, arguments(policy)), [row], [5], "full")
    cache = KVCache.build(model, arguments(policy), batch_size=3)
    rows = [row, [60] * 2 * C, [t % 60 for t in tokens_of(25, 2 * C)]]
    found = logits_of(model, cache, rows, [5, C + 1, 7], "full")
    assert found[1][2 * C - 1].isnan().all()
    for i, logits in fresh.items():
        close(found[0][i], logits, 1e-12)
    cache.reset(rows=[1])
    cache.reset(rows=[0, 2])
    found = logits_of(model, cache, [rows[2], row, row], [3, 5, 5], "full")
    for b in (1, 2):
        for i, logits in fresh.items():
            close(found[b][i], logits, 1e-12)


@pytest.mark.parametrize("policy", EVERY, ids=text)
def test_24_two_caches_on_one_model_and_training_beside_them(gqa: GPT, policy: Policy) -> None:
    rows, idx = [tokens_of(b, 3 * C) for b in (1, 2)], torch.tensor([tokens_of(3, 20)])
    plain, others = gqa(idx), [Policy("dense"), policy]
    alone = [logits_of(gqa, KVCache.build(gqa, arguments(p)), [r], [5], "full")[0] for p, r in zip(others, rows)]
    caches = [KVCache.build(gqa, arguments(p)) for p in others]
    for turns in zip(*(walk(gqa, c, [r], [5], "full") for c, r in zip(caches, rows))):
        assert torch.equal(gqa(idx), plain)
        for (at, logits), expected in zip(turns, alone):
            assert torch.equal(logits[0], expected[at[0]])


@pytest.mark.parametrize("policy", [p for p in EVERY if p.positions == "cache"], ids=text)
def test_25_cache_positions_run_past_the_context(policy: Policy) -> None:
    model = tiny(block_size=16)
    compare(model, policy, [tokens_of(25, 10 * 16)], [5], "full")
    assert KVCache.build(model, arguments(policy)).limit is None


@pytest.mark.parametrize("policy", [Policy(), *(p for p in EVERY if p.positions == "absolute")], ids=text)
def test_25_absolute_positions_raise_at_the_context_and_change_nothing(policy: Policy) -> None:
    model = tiny(block_size=16)
    cache = KVCache.build(model, arguments(policy))
    for _ in walk(model, cache, [tokens_of(25, 16)], [5], "full"):
        pass
    before = kept_of(cache, 0)
    for _ in range(2):
        with pytest.raises(ValueError, match="17 tokens, over the limit of 16"):
            model(torch.tensor([[1]]), cache)
    assert cache.pos.tolist() == [16] and kept_of(cache, 0) == before


def test_25_contradictions_raise(gqa: GPT) -> None:
    for wrong, message in (
        (dict(strategy="sink", budget=4, sinks=4), "more than the sinks"),
        (dict(strategy="sink", budget=3, sinks=4), "more than the sinks"),
        (dict(strategy="h2o", budget=8, recent=9), "exceed the budget"),
        (dict(strategy="h2o", budget=8, sinks=3, recent=6), "exceed the budget"),
        (dict(strategy="window", budget=0), "at least 1"),
        (dict(strategy="window", budget=97), "96"),
        (dict(strategy="none such"), "Unknown strategy"),
        (dict(strategy="window", budget=8, options={"none": 1}), "Unknown option"),
    ):
        with pytest.raises(ValueError, match=message):
            KVCache.build(gqa, KVCacheArgs(**wrong))
    cache = KVCache.build(gqa, KVCacheArgs("sink", 8, sinks=2), batch_size=2)
    two = torch.tensor([tokens_of(1, 9), tokens_of(2, 9)])
    for wrong, length, message in (
        (two[:, :0], [0, 0], "1 to 0 tokens"),
        (two, [0, 3], "1 to 9 tokens, got 0"),
        (two, [3, 10], "1 to 9 tokens, got 10"),
        (two, [3], "length must have shape"),
        (two[:1], [3], "2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            gqa(wrong, cache, torch.tensor(length))
    assert cache.pos.tolist() == [0, 0] and kept_of(cache, 0) == [[[], []]] * 2
    gqa(two, cache, torch.tensor([9, 4]))
    for action, message in (
        (lambda: gqa(two, cache, torch.tensor([9, 4])), "needs empty rows"),
        (lambda: gqa(two[:, :7], cache), "budget less sinks"),
        (lambda: cache.reset([2]), "rows 0 to 1"),
        (lambda: cache.row(2), "rows 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            action()
    assert cache.pos.tolist() == [9, 4]


@pytest.mark.parametrize("policy", [Policy(), *EVERY], ids=text)
def test_25_a_block_with_a_past_is_causal_inside(gqa: GPT, policy: Policy) -> None:
    rows, prompts, sizes = [tokens_of(b, 60) for b in (1, 2)], [C + 3, 2], [3, 1, C - S, 4, 1, 2, 5]
    cache = KVCache.build(gqa, arguments(policy), batch_size=2)
    idx = torch.tensor([row[: max(prompts)] for row in rows])
    gqa(idx, cache, torch.tensor(prompts))
    references, ends = [Oracle(gqa, policy) for _ in rows], list(prompts)
    for reference, row, n in zip(references, rows, prompts):
        reference.feed(row[:n])
    for n in sizes:
        parts = [row[end : end + n] for row, end in zip(rows, ends)]
        logits = gqa(torch.tensor(parts), cache)
        for b, (reference, part) in enumerate(zip(references, parts)):
            moments = reference.feed(part)
            close(logits[b], torch.stack([m.logits for m in moments]))
            assert kept_of(cache, b) == moments[-1].kept
        ends = [end + n for end in ends]
    for b, reference in enumerate(references):
        check_stored(cache, reference, b)
