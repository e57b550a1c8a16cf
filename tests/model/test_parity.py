"""Every model litgpt knows, and feature combinations that none has: litgpt's own forward is what every cache must give.

litgpt's forward without a cache agrees with Hugging Face (tests/test_hf.py), its own cache does not: it is no oracle.
All in float64 to 1e-8, on small models with every feature of the big ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from litgpt.config import Config, name_to_config
from litgpt_kv import GPT, KVCache, KVCacheArgs, registry
from litgpt_kv.attention.yarn import is_yarn
from litgpt_kv.cache.spec import layer_spec
from tests.oracle.reference import Policy, compare, lift, logits_of, tokens_of
from tests.oracle.shrink import GROUPED_MOE, LLAMA, SYNTHETIC, WINDOW, YARN, shrink, twins
from tests.oracle.strategies import FEW, plain

# sizes and names: what they do to a model of this size shows in other fields
SIZES = {"name", "hf_config", "block_size", "vocab_size", "padding_multiple", "padded_vocab_size", "norm_eps"}
SIZES |= {"rope_base"}
DUAL = dict(sliding_window_size=WINDOW, sliding_window_indices=[1, 0], rope_local_base_freq=50.0, rope_indices=[1, 0])
MORE = {
    "dual-window-yarn": shrink(LLAMA, **DUAL, rope_adjustments=YARN),
    "dual-window-interleaved": shrink(LLAMA, **DUAL, rope_interleave=True, rope_adjustments=None),
    "dual-window-softcap": shrink(LLAMA, **DUAL, attention_logit_softcapping=1.5, rope_adjustments={"factor": 8.0}),
    "dual-window-odd": shrink(LLAMA, **DUAL, head_size=10, rotary_percentage=0.5, rope_adjustments=None),
    "yarn-interleaved-partial": shrink(LLAMA, rope_interleave=True, rope_adjustments=YARN, rotary_percentage=0.5),
    "yarn-no-mscale": shrink(LLAMA, rope_adjustments={k: v for k, v in YARN.items() if "mscale" not in k}),
    "grouped-moe-window-norms": shrink("Gemma-3-1b-it", **GROUPED_MOE),
    "parallel-window-softcap": shrink("phi-2", sliding_window_size=WINDOW, attention_logit_softcapping=1.5),
    "projection-norms-mqa-window": shrink("OLMo-2-1124-7B", n_query_groups=1, sliding_window_size=WINDOW),
    "one-window": shrink("Mistral-7B-v0.1", head_size=4, rotary_percentage=0.25),
    "none-window": shrink("Mistral-7B-v0.1", rotary_percentage=0.0),
    "scores-scalar-condensed-window": shrink("Mistral-7B-v0.1", attention_scores_scalar=5, rope_condense_ratio=3),
}


def signature(config: Config) -> tuple:
    """All that two configs of the same small size may differ in."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in SIZES}
    return repr(fields), config.norm_class.__name__ if isinstance(config.norm_class, type) else str(config.norm_class)


def families() -> dict[str, Config]:
    """The first name of each distinct signature among litgpt's configs."""
    found: dict[tuple, str] = {}
    for name in sorted(name_to_config):
        found.setdefault(signature(shrink(name)), name)
    return {name: shrink(name) for name in found.values()}


CONFIGS = {**families(), **SYNTHETIC, **MORE}
PROMPTS = [2, 2 * WINDOW + 2]  # inside the window and far beyond it
LENGTHS = [n + 3 * WINDOW for n in PROMPTS]  # decoded through three windows
WAYS = ("streamed", "full")
STRATEGIES = [(name, p) for name in FEW for p in ("absolute", "cache") if plain(name).needs <= {"keys"}]


@functools.cache
def case(name: str) -> tuple[GPT, list[list[int]], list[dict[int, torch.Tensor]]]:
    """Our model, rows of tokens, and the logits of litgpt's forward without a cache for each of their tokens."""
    ours, theirs = (lift(model).requires_grad_(False) for model in twins(CONFIGS[name]))
    if is_yarn(ours.config):  # litgpt's tables are the wrong way round: tests/test_litgpt_faults.py
        theirs.cos, theirs.sin = ours.cos, ours.sin
    rows = [tokens_of(seed, n, 90) for seed, n in enumerate(LENGTHS)]
    return ours, rows, [dict(enumerate(theirs(torch.tensor([row]))[0])) for row in rows]


def same(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor], count: int) -> None:
    assert len(found) >= count and max(found) == max(expected)
    for i, logits in found.items():
        torch.testing.assert_close(logits, expected[i], rtol=0, atol=1e-8, msg=lambda m, i=i: f"token {i}: {m}")


def test_the_sweep_has_every_family() -> None:
    """A signature that lumps families together, or a helper that drops a flag, would hide them."""
    assert len(families()) >= 26
    found = [(c, layer_spec(c, i)) for c in families().values() for i in range(c.n_layer)]
    for what in (
        lambda c, f: f.window is None and c.sliding_window_size is not None,
        lambda c, f: f.softcap is not None and f.window is not None,
        lambda c, f: c.rope_indices is not None and f.groups == 1,
        lambda c, f: c.norm_qk and c.norm_qk_type == "olmo2",
        lambda c, f: c.parallel_residual and c.shared_attention_norm and f.groups == 1,
        lambda c, f: 0 < f.rope_size < f.key_size,
        lambda c, f: c.mlp_class_name == "LLaMAMoE",
        lambda c, f: c.attn_bias and not c.bias,
        lambda c, f: not c.norm_1 and c.post_attention_norm,
        lambda c, f: c.rope_condense_ratio != 1,
    ):
        assert any(what(c, f) for c, f in found)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_cache(name: str) -> None:
    model, rows, expected = case(name)
    for row, theirs in zip(rows, expected):
        logits = dict(enumerate(model(torch.tensor([row]))[0]))
        assert logits[0].std() > 1e-3
        same(logits, theirs, len(row))


def build(model: GPT, strategy: str, positions: str, **others: Any) -> KVCache:
    if registry.get("strategy", strategy).evicts:
        others["budget"] = max(LENGTHS)
    args = KVCacheArgs(strategy, positions=positions, **others)
    return KVCache.build(model, args, batch_size=len(LENGTHS), max_tokens=max(LENGTHS))


@pytest.mark.parametrize("name", CONFIGS)
def test_with_a_cache_that_keeps_all(name: str) -> None:
    model, rows, expected = case(name)
    for strategy, positions in STRATEGIES:
        if positions == "cache" and layer_spec(model.config, 0).rope_size % 2:  # litgpt's odd sizes are no rotation
            with pytest.raises(ValueError, match="even number of rotated elements"):
                build(model, strategy, positions)
            continue
        for way in WAYS:
            found = logits_of(model, build(model, strategy, positions), rows, PROMPTS, way)
            for row, theirs in zip(found, expected):
                same(row, theirs, 3 * WINDOW + 1)


# the budgets are on both sides of the window; prompts are shorter and longer than either
EVICTING = [
    (Policy("h2o", WINDOW + 2, 1, 3), "full"),
    (Policy("h2o", WINDOW - 1, 0, 2, "cache"), "streamed"),
    (Policy("sink", WINDOW - 1, 1, 0, "cache"), "streamed"),
    (Policy("window", WINDOW + 2), "full"),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_evicting_equals_the_naive_reference(name: str) -> None:
    model, rows, _ = case(name)
    for policy, way in EVICTING:
        if policy.positions == "absolute" or layer_spec(model.config, 0).rope_size % 2 == 0:
            compare(model, policy, [row[: n + WINDOW] for row, n in zip(rows, PROMPTS)], PROMPTS, way)
