"""The cases of README.md, by number, against the naive reference (float64, 1e-8).

Cases 6, 7, 14, 15 are in test_semantics_probe.py; 18 and 22 to 25 in test_semantics_limits.py. The order "after" of
case 10 is no mode of the library: one slot more and evicting first equals it, which is what the test holds.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import litgpt.model as base
from litgpt_kv import GPT, KVCache
from tests.oracle.reference import (
    Policy,
    arguments,
    compare,
    kept_of,
    logits_of,
    oracle,
    passes,
    scores_of,
    tiny,
    tokens_of,
    walk,
)

C, S = 8, 2  # the budget and the sinks of most tests
WAYS = ("streamed", "full")
POSITIONS = ("absolute", "cache")
PROMPTS = (1, C - 1, C, C + 1, 3 * C)
POLICIES = [Policy("window", C), Policy("sink", C, S), Policy("h2o", C, 0, C // 2), Policy("h2o", C, S, 1)]
EVERY = [replace(p, positions=at) for p in POLICIES for at in POSITIONS]
ROPES = {
    "partial": dict(rotary_percentage=0.67),
    "odd": dict(rotary_percentage=0.5),
    "one": dict(rotary_percentage=0.17),
    "llama3": dict(
        rope_adjustments=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)
    ),
    "linear": dict(rope_adjustments=dict(factor=4.0)),
    "yarn": dict(
        rope_adjustments=dict(
            factor=8.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=16, mscale=1.0, mscale_all_dim=0.8
        )
    ),
    "condensed": dict(rope_condense_ratio=4),
    "interleaved": dict(rope_interleave=True),
    "dual": dict(rope_local_base_freq=50.0, rope_indices=[0, 1]),
    "sliding": dict(sliding_window_size=11, sliding_window_indices=[1, 0]),
    "gemma": dict(
        attention_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
        attention_scores_scalar=9,
        scale_embeddings=True,
        sliding_window_size=9,
        sliding_window_indices=[1, 0],
        norm_qk=True,
        post_attention_norm=True,
        post_mlp_norm=True,
        name="Gemma-tiny",
    ),
    "neox": dict(parallel_residual=True, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", bias=True),
    "olmo2": dict(norm_qk=True, norm_qk_type="olmo2", norm_1=False, norm_2=False, post_attention_norm=True),
}


def text(policy: Policy) -> str:
    return f"{policy.name}-{policy.budget}-{policy.sinks}-{policy.recent}-{policy.positions}"


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


@pytest.mark.parametrize("variant", [None, *ROPES])
def test_00_reference_without_eviction_is_litgpt(variant: str | None) -> None:
    ours = tiny(**ROPES.get(variant, {}))
    theirs = tiny(cls=base.GPT, **ROPES.get(variant, {}))
    theirs.load_state_dict(ours.state_dict())
    if variant == "yarn":  # litgpt's is the wrong way round (tests/test_litgpt_faults.py); all else is compared
        theirs.cos, theirs.sin = ours.cos, ours.sin
    tokens = tokens_of(0, 26)
    idx, moments = torch.tensor([tokens]), oracle(ours, Policy(), tokens, [26])
    close(torch.stack([m.logits for m in moments]), theirs(idx)[0])
    close(ours(idx), theirs(idx), 1e-12)


@pytest.mark.parametrize("prompt", [1, 9, 30])
def test_01_dense_equals_no_cache(gqa: GPT, prompt: int) -> None:
    tokens = tokens_of(1, 30)
    full = gqa(torch.tensor([tokens]))[0]
    found = logits_of(gqa, KVCache.build(gqa), [tokens], [prompt], "full")[0]
    assert sorted(found) == list(range(prompt - 1, 30))
    for i, logits in found.items():
        close(logits, full[i])


@pytest.mark.parametrize("variant", ROPES)
def test_02_budget_of_the_length_equals_dense_and_evicting_equals_the_reference(variant: str) -> None:
    model, tokens = tiny(seed=3, **ROPES[variant]), tokens_of(2, 26)
    full = model(torch.tensor([tokens]))[0]
    for policy in [Policy(), *POLICIES]:
        for positions in POSITIONS[: 1 if variant in ("odd", "one") else 2]:
            roomy = replace(policy, positions=positions, budget=26)
            for i, logits in logits_of(model, KVCache.build(model, arguments(roomy)), [tokens], [5], "full")[0].items():
                close(logits, full[i])
            compare(model, replace(policy, positions=positions), [tokens], [13], "full")


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("policy", POLICIES, ids=text)
@pytest.mark.parametrize("prompt", [1, C - 1, C, C + 1])
def test_03_first_difference_from_dense_is_at_the_budget(gqa: GPT, policy: Policy, positions: str, prompt: int) -> None:
    tokens = tokens_of(3, C + 4)
    full = gqa(torch.tensor([tokens]))[0]
    cache = KVCache.build(gqa, arguments(replace(policy, positions=positions)))
    different = [
        i for i, x in logits_of(gqa, cache, [tokens], [prompt], "full")[0].items() if (x - full[i]).abs().max() > 1e-6
    ]
    assert different == list(range(max(C, prompt), C + 4))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", EVERY, ids=text)
def test_04_oracle_grid(gqa: GPT, policy: Policy, way: str) -> None:
    for prompt, budget in itertools.product(PROMPTS, (C, max(policy.sinks, policy.recent) + 1)):
        if policy.sinks + policy.recent <= budget:
            compare(gqa, replace(policy, budget=budget), [tokens_of(prompt, prompt + 2 * C)], [prompt], way)


SLIDING = [tiny(seed=4, sliding_window_size=w, sliding_window_indices=which) for w, which in ((3, [1, 0]), (7, [1, 1]))]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_04_random_policies_of_two_layers(gqa: GPT, mqa: GPT, data: st.DataObject) -> None:
    positions, policies = data.draw(st.sampled_from(POSITIONS), "positions"), []
    for _ in range(2):
        budget = data.draw(st.integers(1, 14), "budget")
        sinks = data.draw(st.integers(0, budget - 1), "sinks")
        recent = data.draw(st.integers(0, budget - sinks), "recent")
        name = data.draw(st.sampled_from(["dense", "window", "sink", "h2o", "h2o"]), "strategy")
        plain = Policy(name, 40, positions=positions)
        policies.append(plain if name == "dense" else Policy(name, budget, sinks, recent, positions))
    prompts = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=3), "prompts")
    rows = [tokens_of(100 + b, n + data.draw(st.integers(0, 12), "more")) for b, n in enumerate(prompts)]
    model = data.draw(st.sampled_from([gqa, mqa, *SLIDING]), "model")
    compare(model, policies, rows, prompts, data.draw(st.sampled_from(WAYS), "way"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompt", [1, S, C, 3 * C])
def test_05_sinks_are_immortal(gqa: GPT, prompt: int, way: str) -> None:
    for policy in (Policy("sink", C, S), Policy("h2o", C, S, 3), Policy("window", C, S)):
        cache = KVCache.build(gqa, arguments(policy))
        for (i,), _ in walk(gqa, cache, [tokens_of(5, prompt + 3 * C)], [prompt], way):
            for head in itertools.chain(*kept_of(cache, 0)):
                if policy.name == "h2o":
                    assert set(range(min(S, i + 1))) | set(range(max(0, i - 2), i + 1)) <= set(head)
                else:
                    assert set(head) == {p for p in range(i + 1) if p < S or p > i - (C - S)}


def test_08_one_layer_sink_equals_a_dense_model_on_what_is_attended(gqa: GPT) -> None:
    one, two = tiny(seed=8, n_layer=1), gqa
    mqa = tiny(seed=9, n_layer=1, n_query_groups=1)
    sink, h2o = Policy("sink", C, S, positions="cache"), Policy("h2o", C, 0, 3, positions="cache")
    tokens = tokens_of(8, 5 * C)
    for model, policy, same in ((one, sink, True), (mqa, sink, True), (mqa, h2o, True), (two, sink, False)):
        cache = KVCache.build(model, arguments(policy))
        for (i,), logits in walk(model, cache, [tokens], [3], "full"):
            kept = kept_of(cache, 0)[-1][0]
            fresh = model(torch.tensor([[tokens[p] for p in kept]]))[0, -1]
            assert ((logits[0] - fresh).abs().max() < 1e-8) == (same or i < C), (i, policy)


@pytest.mark.parametrize("way", WAYS)
def test_09_window_identities(gqa: GPT, way: str) -> None:
    tokens, found = tokens_of(9, 4 * C), []
    for policy in (Policy("window", C), Policy("sink", C), Policy("h2o", C, 0, C)):
        for positions in POSITIONS:
            cache = KVCache.build(gqa, arguments(replace(policy, positions=positions)))
            found.append(logits_of(gqa, cache, [tokens], [2 * C], way)[0])
    for other in found[1:]:
        for i, logits in found[0].items():
            close(other[i], logits)


@pytest.mark.parametrize("policy", EVERY, ids=text)
def test_10_one_slot_more_equals_the_official_order_with_one_less(gqa: GPT, policy: Policy) -> None:
    tokens = tokens_of(10, 4 * C)
    recent = policy.recent + 1 if policy.name == "h2o" else 0
    cache = KVCache.build(gqa, arguments(replace(policy, budget=C + 1, recent=recent)))
    found = logits_of(gqa, cache, [tokens], [3], "full")[0]
    official = oracle(gqa, replace(policy, order="after"), tokens, [3] + [1] * (4 * C - 3))
    wrong = oracle(gqa, replace(policy, budget=C + 1, recent=recent, order="after"), tokens, [3] + [1] * (4 * C - 3))
    for i, logits in found.items():
        close(logits, official[i].logits)
    assert max((x - wrong[i].logits).abs().max() for i, x in found.items()) > 1e-3


@pytest.mark.parametrize("policy", EVERY, ids=text)
def test_11_split_of_a_prompt_within_the_budget_changes_nothing(gqa: GPT, policy: Policy) -> None:
    tokens, ends = tokens_of(11, 2 * C), []
    for prompt in (1, 3, C - 1, C):
        cache = KVCache.build(gqa, arguments(policy))
        found = logits_of(gqa, cache, [tokens], [prompt], "full")[0]
        scores = scores_of(cache, 0) if policy.name == "h2o" else kept_of(cache, 0)
        ends.append((found, scores))
    for found, scores in ends[1:]:
        for i, logits in found.items():
            if i in ends[0][0]:
                close(logits, ends[0][0][i])
        if policy.name == "h2o":
            for mine, theirs in zip(itertools.chain(*scores), itertools.chain(*ends[0][1])):
                assert mine == pytest.approx(theirs, rel=0, abs=1e-8)
        else:
            assert scores == ends[0][1]


@pytest.mark.parametrize("policy", EVERY, ids=text)
def test_12_prompt_beyond_the_budget(gqa: GPT, policy: Policy) -> None:
    tokens, prompt = tokens_of(12, 4 * C), 3 * C
    full = gqa(torch.tensor([tokens[:prompt]]))[0, -1]
    (one,) = logits_of(gqa, KVCache.build(gqa, arguments(policy)), [tokens], [prompt], "full")
    (two,) = logits_of(gqa, KVCache.build(gqa, arguments(policy)), [tokens], [prompt], "streamed")
    close(one[prompt - 1], full)
    assert (two[prompt - 1] - full).abs().max() > 1e-3
    for found, way in ((one, "full"), (two, "streamed")):
        moments = oracle(gqa, policy, tokens, passes(prompt, 4 * C, way, C))
        for i, logits in found.items():
            close(logits, moments[i].logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recent", [0, 1, 3, C])
def test_13_recent_tokens_stay_and_heavy_ones_are_older(gqa: GPT, recent: int, way: str) -> None:
    policy = Policy("h2o", C, 0, recent)
    for prompt in (1, C, 2 * C):
        cache = KVCache.build(gqa, arguments(policy))
        for (i,), _ in walk(gqa, cache, [tokens_of(13, 5 * C)], [prompt], way):
            for head in itertools.chain(*kept_of(cache, 0)):
                assert set(range(max(0, i + 1 - recent), i + 1)) <= set(head) and len(head) == min(i + 1, C)
        compare(gqa, policy, [tokens_of(13, 5 * C)], [prompt], way)


def test_16_prompt_queries_count_and_new_tokens_start_from_nothing(gqa: GPT) -> None:
    policy, tokens = Policy("h2o", C, 0, 2), tokens_of(16, 4 * C)
    found = logits_of(gqa, KVCache.build(gqa, arguments(policy)), [tokens], [2 * C], "full")[0]
    forgetful = oracle(gqa, replace(policy, prefill_scores=False), tokens, passes(2 * C, 4 * C, "full", C))
    assert max((x - forgetful[i].logits).abs().max() for i, x in found.items()) > 1e-3
    cache = KVCache.build(gqa, arguments(policy))
    for (i,), _ in walk(gqa, cache, [tokens], [C], "full"):
        if i >= C:  # the newest token's score is its own probability alone, and all probabilities of a step sum to 1
            total = [sum(s.values()) for s in itertools.chain(*scores_of(cache, 0))]
            assert all(0 < s[i] < 1 for s in itertools.chain(*scores_of(cache, 0))) and max(total) <= i + 1 + 1e-9


def test_17_query_heads_of_a_group_may_be_permuted(gqa: GPT, mha: GPT, mqa: GPT) -> None:
    for model in (mha, mqa):
        for policy in EVERY:
            compare(model, policy, [tokens_of(17, 3 * C)], [C + 1], "full")
    other, D, order = tiny(seed=0), gqa.config.head_size, [1, 0, 3, 2]
    for block in other.transformer.h:
        attn = block.attn
        weight = attn.qkv.weight.data
        weight[: 4 * D] = weight[: 4 * D].view(4, D, -1)[order].reshape(4 * D, -1)
        attn.proj.weight.data = attn.proj.weight.data.view(-1, 4, D)[:, order].reshape(-1, 4 * D)
    for policy in EVERY:
        caches = [KVCache.build(m, arguments(policy)) for m in (gqa, other)]
        found = [logits_of(m, c, [tokens_of(17, 3 * C)], [5], "full")[0] for m, c in zip((gqa, other), caches)]
        for i, logits in found[0].items():
            close(found[1][i], logits)
        assert kept_of(caches[0], 0) == kept_of(caches[1], 0)


def test_19_permuted_and_duplicate_rows(gqa: GPT) -> None:
    rows, prompts, order = [tokens_of(b, 3 * C) for b in (1, 2, 3, 1)], [5, C + 3, 2 * C, 5], [2, 0, 3, 1]
    for policy, way in itertools.product(EVERY, WAYS):
        first, second = (KVCache.build(gqa, arguments(policy), batch_size=4) for _ in range(2))
        plain = logits_of(gqa, first, rows, prompts, way)
        mixed = logits_of(gqa, second, [rows[b] for b in order], [prompts[b] for b in order], way)
        for place, b in enumerate(order):
            for i in plain[b]:
                close(mixed[place][i], plain[b][i], 1e-12)
        for i in plain[0]:
            close(plain[3][i], plain[0][i], 1e-12)
        assert kept_of(first, 0)[0] == kept_of(first, 3)[0] or policy.name != "h2o"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", [Policy(), *EVERY], ids=text)
def test_20_ragged_rows_equal_each_alone(gqa: GPT, policy: Policy, way: str) -> None:
    prompts = [1, S, C - 1, C, C + 1, 3 * C]
    compare(gqa, policy, [tokens_of(n, n + C) for n in prompts], prompts, way)


@pytest.mark.parametrize("policy", [Policy(), *EVERY], ids=text)
def test_21_partners_and_pads_are_irrelevant(gqa: GPT, policy: Policy) -> None:
    row, prompt = tokens_of(21, 3 * C), C + 2
    for way in WAYS:
        (alone,) = logits_of(gqa, KVCache.build(gqa, arguments(policy)), [row], [prompt], way)
        for partner, pad in ((1, 0), (prompt, 7), (2 * C, 60), (2 * C, 3)):
            cache = KVCache.build(gqa, arguments(policy), batch_size=2)
            rows = [tokens_of(partner + pad, 3 * C), row]
            found = logits_of(gqa, cache, rows, [partner, prompt], way, pad=pad)[1]
            for i, logits in alone.items():
                close(found[i], logits, 1e-12)
