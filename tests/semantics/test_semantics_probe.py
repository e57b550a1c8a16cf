"""Semantics by a probe: a model whose logits show what each head sees and how far away (cases 6, 7, 14, 15)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from litgpt_kv import GPT, KVCache
from tests.oracle.reference import Policy, arguments, compare, kept_of, logits_of, tiny, tokens_of, walk

C, S = 8, 2  # the budget and the sinks
WAYS = ("streamed", "full")
POSITIONS = ("absolute", "cache")
PROMPTS = (1, C - 1, C, C + 1, 3 * C)
POLICIES = [Policy("window", C), Policy("sink", C, S), Policy("h2o", C, 0, C // 2), Policy("h2o", C, S, 1)]
EVERY = [replace(p, positions=at) for p in POLICIES for at in POSITIONS]


def text(policy: Policy) -> str:
    return f"{policy.name}-{policy.budget}-{policy.sinks}-{policy.recent}-{policy.positions}"


def probe(salience: torch.Tensor, amplitude: float = 3.0, block_size: int = 64) -> GPT:
    """A one-layer model whose logits show, head by head, which tokens a query sees and how far away.

    The score of token t at distance d in head h is amplitude * sin(d / 64) + salience[h, t]; a token's value is its
    name, so logit h * V + t is a positive multiple of the attention that head h pays to token t.
    """
    H, V = salience.shape
    sizes = dict(n_layer=1, n_head=H, n_query_groups=H, n_embd=V + H * V + 1, head_size=V, block_size=block_size)
    rope = dict(rotary_percentage=2.5 / V, rope_condense_ratio=64)
    model = tiny(**sizes, **rope, padded_vocab_size=H * V, vocab_size=H * V, norm_1=False)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "ln_f" in name else 0.0)
    eye, attn = torch.eye(V, dtype=torch.float64), model.transformer.h[0].attn
    model.transformer.wte.weight[:V, :V], model.transformer.wte.weight[:, -1] = eye, 1.0
    for h in range(H):
        q, k, v = (attn.qkv.weight[(n * H + h) * V : (n * H + h + 1) * V] for n in range(3))
        q[0, -1], q[2, -1], k[1, -1], k[2, :V], v[:, :V] = amplitude * V**0.5, V**0.5, 1.0, salience[h], eye
    attn.proj.weight[V:-1] = torch.eye(H * V, dtype=torch.float64)
    model.lm_head.weight[:, V:-1] = torch.eye(H * V, dtype=torch.float64)
    return model


def read(logits: torch.Tensor, own: int, salience: torch.Tensor, amplitude: float = 3.0) -> list[dict[int, float]]:
    """By head the tokens that a query of token `own` sees, with their signed distances."""
    found = []
    for row, salient in zip(logits.view(salience.shape), salience):
        seen = [t for t in range(row.numel()) if row[t] > 1e-12]
        sines = [(math.log(row[t] / row[own]) - float(salient[t] - salient[own])) / amplitude for t in seen]
        found.append({t: 64 * math.asin(max(-1.0, min(1.0, sine))) for t, sine in zip(seen, sines)})
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", EVERY, ids=text)
def test_06_07_probe_measures_the_distances(policy: Policy, way: str) -> None:
    generator = torch.Generator().manual_seed(6)
    salience = torch.randn(2, 48, generator=generator, dtype=torch.float64)
    model, row = probe(salience), torch.randperm(48, generator=generator).tolist()
    for prompt in PROMPTS:
        cache = KVCache.build(model, arguments(policy))
        for (i,), logits in walk(model, cache, [row[: prompt + 2 * C]], [prompt], way):
            whole = way == "full" and i == prompt - 1
            for h, distances in enumerate(read(logits[0], row[i], salience)):
                order = sorted(row.index(t) for t in distances)
                if policy.name != "h2o":
                    expected = [p for p in range(i + 1) if whole or p < policy.sinks or p > i - (C - policy.sinks)]
                    assert order == expected
                elif not whole:
                    assert order == kept_of(cache, 0)[0][h] and len(order) == min(i + 1, C)
                measured = [distances[row[p]] for p in order]
                rank = policy.positions == "cache" and not whole
                true = [len(order) - 1 - n if rank else i - p for n, p in enumerate(order)]
                assert measured == pytest.approx(true, rel=0, abs=1e-6), (policy, prompt, i)
                assert measured[-1] == pytest.approx(0, abs=1e-9) and all(d > 0.5 for d in measured[:-1])


def test_14_salient_token_survives_and_dull_one_dies_at_the_predicted_step() -> None:
    salience, recent = torch.zeros(1, 32, dtype=torch.float64), 4
    salience[0, 0], salience[0, 1] = 6.0, -6.0
    model = probe(salience, amplitude=0.0, block_size=400)
    row = [2 + t for t in tokens_of(14, 20 * C, 30)]
    row[2], row[5] = 0, 1  # the salient one at position 2, the dull one at 5
    for positions, way in itertools.product(POSITIONS, WAYS):
        cache = KVCache.build(model, arguments(Policy("h2o", C, 0, recent, positions)))
        for (i,), logits in walk(model, cache, [row], [3], way):
            assert logits[0, 0] > 1e-12, f"the salient token is gone at step {i}"
            # at i the last 4 positions are safe: 5 first is a candidate at 9, and nothing else received as little
            assert (logits[0, 1] > 1e-12) == (5 <= i <= 5 + recent - 1), i


def test_15_heads_and_rows_keep_their_own_tokens() -> None:
    salience = torch.zeros(2, 32, dtype=torch.float64)
    salience[0, 0], salience[1, 1] = 6.0, 6.0
    model = probe(salience, amplitude=0.0)

    def fill(seed: int, n: int) -> list[int]:
        return [2 + t for t in tokens_of(seed, n, 30)]

    one, two = [*fill(1, 20), 0, 1, *fill(2, 20)], [*fill(3, 24), 1, 0, *fill(4, 17)]
    policy = Policy("h2o", C, 0, 4)
    cache = KVCache.build(model, arguments(policy), batch_size=2)
    found = logits_of(model, cache, [one, two], [6, 10], "full")
    for b, places in enumerate(((20, 21), (25, 24))):
        first, second = kept_of(cache, b)[0]
        assert places[0] in first and places[0] not in second and places[1] in second and places[1] not in first
    compare(model, policy, [one, two], [6, 10], "full")
    for row, prompt, mine in zip((one, two), (6, 10), found):
        (alone,) = logits_of(model, KVCache.build(model, arguments(policy)), [row], [prompt], "full")
        assert all((alone[i] - mine[i]).abs().max() < 1e-12 for i in alone)
