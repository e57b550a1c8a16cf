"""What users choose is checked when they choose it, and layers' facts are read off litgpt's config as litgpt does."""

from __future__ import annotations

import dataclasses
import math

import pytest

import litgpt.model as base
from litgpt.config import Config, name_to_config
from litgpt_kv import KVCacheArgs, SamplingArgs
from litgpt_kv.cache.spec import layer_spec
from litgpt_kv.config import per_layer, percent
from tests.oracle.shrink import LATENT, SYNTHETIC, YARN, shrink

# -- KVCacheArgs -------------------------------------------------------------------------------------------------------


def test_the_default_keeps_everything() -> None:
    args = KVCacheArgs()
    assert (args.strategy, args.budget, args.storage, args.options) == ("dense", None, "plain", {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.budget = 3


@pytest.mark.parametrize("field", ["budget", "sinks", "recent"])
@pytest.mark.parametrize("value", [-1, 1.5, 0.2, True, "many", [4, -1], [4, "x"], [4, 2.0]])
def test_counts_are_counts(field: str, value: object) -> None:
    if (field, value) == ("budget", 0.2):
        pytest.skip("a fraction: see the next test")
    with pytest.raises(ValueError, match=field):
        KVCacheArgs(**{field: value})


def test_a_fraction_is_a_percentage_and_a_mapping_is_what_yaml_has() -> None:
    assert KVCacheArgs(budget=0.2) == KVCacheArgs(budget="20%") == KVCacheArgs(budget="0.2")
    assert KVCacheArgs(budget=[0.125, 3, None]).budget == ["12.5%", 3, None]
    assert KVCacheArgs(budget=(4, 5)).budget == (4, 5)
    given = {"strategy": "snapkv", "budget": 0.5, "window": 8, "options": {"kernel": 3}}
    args = KVCacheArgs("snapkv", "50%", options={"window": 8, "kernel": 3})
    assert KVCacheArgs.of(given) == args and KVCacheArgs.of({"strategy": "none"}) is None
    for wrong in (0.0, 1.0, -0.1, 2.5, float("nan"), "1.5", "0.0"):
        with pytest.raises(ValueError, match="fraction between 0 and 1"):
            KVCacheArgs(budget=wrong)
    with pytest.raises(TypeError, match="A key of kv_cache must be a text, got 3"):
        KVCacheArgs.of({3: 4})


def test_zero() -> None:
    assert KVCacheArgs(sinks=0, recent=0).sinks == 0
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        KVCacheArgs(budget=0)


@pytest.mark.parametrize("field", ["sinks", "recent"])
def test_only_a_budget_may_be_a_percentage(field: str) -> None:
    KVCacheArgs(budget="20%")
    with pytest.raises(ValueError, match=f"{field} must be a number of tokens, got '20%'"):
        KVCacheArgs(**{field: "20%"})


def test_lists_hold_one_value_a_layer() -> None:
    args = KVCacheArgs(strategy=["h2o", "dense"], budget=[4, None], sinks=(0, 1), recent=[None, 2])
    assert per_layer("budget", args.budget, 2) == [4, None]
    assert per_layer("sinks", args.sinks, 2) == [0, 1]
    assert per_layer("storage", args.storage, 3) == ["plain"] * 3
    with pytest.raises(ValueError, match="budget has 2 values for 3 layers"):
        per_layer("budget", args.budget, 3)


@pytest.mark.parametrize("positions", ["relative", "Cache", ""])
def test_positions_are_one_of_two(positions: str) -> None:
    assert KVCacheArgs(positions="cache").positions == "cache"
    with pytest.raises(ValueError, match="'absolute' or 'cache'"):
        KVCacheArgs(positions=positions)


@pytest.mark.parametrize(
    ("text", "of", "count"), [("20%", 1000, 200), ("100%", 7, 7), ("0.1%", 100, 1), ("12.5%", 64, 8), ("50%", 5, 2)]
)
def test_percent(text: str, of: int, count: int) -> None:
    assert percent(text, of) == count


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "20", "%", "x%", "", "nan%", "inf%", "20 percent"])
def test_a_bad_percentage_is_refused_when_it_is_chosen(text: str) -> None:
    with pytest.raises(ValueError, match="percentage over 0% and up to 100%"):
        percent(text, 100)
    with pytest.raises(ValueError, match="budget"):
        KVCacheArgs(budget=text)


# -- SamplingArgs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": t} for t in (-0.1, math.inf, math.nan)),
        *({"top_k": k} for k in (0, -1)),
        *({"top_p": p} for p in (-0.1, 1.1, math.nan)),
        {"seed": -1},
    ],
)
def test_sampling_says_what_is_wrong(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingArgs(**wrong)


def test_sampling_limits_are_allowed() -> None:
    SamplingArgs(temperature=0, top_k=1, top_p=0.0, seed=0)
    SamplingArgs(temperature=2.5, top_k=None, top_p=1.0)


# -- facts of a layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*name_to_config, *SYNTHETIC])
def test_facts_are_what_litgpts_attention_uses(name: str) -> None:
    """Widths against the buffers of litgpt's own cache; scale, softcap and window against its attention module."""
    config = SYNTHETIC[name] if name in SYNTHETIC else shrink(name)
    model = base.GPT(config)
    for index, block in enumerate(model.transformer.h):
        facts, attn = layer_spec(config, index), block.attn
        assert facts.index == index
        assert (facts.heads, facts.latent) == (config.n_head, bool(config.latent_attention))
        if facts.latent:  # litgpt's cache holds what each head makes of them
            assert facts.groups == 1
            assert facts.value_size == attn.kv_a_norm.weight.numel()
            assert facts.key_size + facts.value_size == attn.kv_a_proj_with_mqa.out_features
        else:
            cache = attn.build_kv_cache(1, 32, model.rope_cache_length())
            assert facts.groups == config.n_query_groups
            assert facts.key_size == cache.k.size(-1)
            assert facts.value_size == cache.v.size(-1)
        sliding = bool(getattr(attn, "apply_sliding_window_attention", False))
        assert facts.window == (config.sliding_window_size if sliding else None)
        assert facts.softcap == config.attention_logit_softcapping
        width = config.qk_head_dim if config.latent_attention else config.head_size
        scale = attn.mscale**2 / math.sqrt(config.attention_scores_scalar or width)
        assert facts.scale == pytest.approx(scale, rel=1e-12)


def test_facts_by_hand() -> None:
    gemma = Config.from_name("Gemma-3-27b-it")
    local, far = layer_spec(gemma, 0), layer_spec(gemma, 5)
    assert (local.window, far.window) == (1024, None)
    assert (local.heads, local.groups, local.key_size, local.rope_size) == (32, 16, 128, 128)
    assert local.scale == pytest.approx(168**-0.5)
    pythia = layer_spec(Config.from_name("pythia-14m"), 0)
    assert (pythia.key_size, pythia.rope_size, pythia.window) == (32, 8, None)
    assert layer_spec(Config.from_name("Gemma-2-2b"), 0).softcap == 50.0
    yarn = layer_spec(shrink("Llama-3.2-1B", rope_adjustments=YARN), 0)
    assert yarn.scale == pytest.approx((0.1 * 0.8 * math.log(4) + 1) ** 2 / 4)  # head size 16
    latent = layer_spec(SYNTHETIC["latent"], 0)
    assert (latent.key_size, latent.value_size, latent.groups) == (8, LATENT["kv_lora_rank"], 1)
    assert (latent.heads, latent.rope_size, latent.scale) == (4, 8, 1 / math.sqrt(18))
    assert layer_spec(shrink("Mistral-7B-v0.1", latent_attention=LATENT, n_query_groups=4), 0).window is None
    one = layer_spec(SYNTHETIC["rope-one"], 0)
    assert (one.key_size, one.value_size, one.rope_size) == (5, 4, 1)  # litgpt's keys grow by one
