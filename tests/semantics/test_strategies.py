"""Every strategy against its definition by loops, at every step: logits, kept tokens, scores, keys and values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litgpt_kv import GPT, KVCache, KVCacheArgs, registry
from litgpt_kv.cache.calibration import FORMAT
from tests.oracle.reference import Policy, compare, tiny
from tests.oracle.reference_scores import NAIVE

C = 10
PROMPTS = [1, C + 5, C]
POSITIONS = ("absolute", "cache")
OPTIONS = {  # small enough for the budget
    "h2o": [dict(normalize=True), dict(normalize=True, value_weighted=True)],
    "random": [dict(seed=7)],
    "tova": [{}],
    "knorm": [{}],
    "keydiff": [{}],
    "lagkv": [dict(lag=2)],
    "snapkv": [dict(window=3, kernel=3), dict(window=12, kernel=1)],
    "finch": [dict(window=3)],
    "rkv": [dict(window=3, importance=0.4, similar=0.3)],
    "expected_attention": [dict(window=6, future=3), dict(window=40, future=1, epsilon=0.01)],
    "triattention": [dict(farthest=5)],
    "duo": [{}],
    "criticalkv": [
        dict(base="h2o", first=0.0),
        dict(base="keydiff", first=0.25),
        dict(base="kvzip", base_options="chunk=5"),
    ],
    "kvzip": [dict(chunk=5), {}],
}
CASES = [(name, options) for name, every in OPTIONS.items() for options in every]
LATENT = dict(q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5)
YARN = dict(factor=8.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=16, mscale_all_dim=0.8)
NOT_LATENT = ("expected_attention", "triattention", "duo", "criticalkv")


def ids(value: object) -> str:
    return value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "default"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A calibration file for models of two layers, four heads and a head size of 6."""
    return write_calibration(tmp_path_factory.mktemp("calibration") / "centres.safetensors")


def write_calibration(path: Path, heads: int = 4, width: int = 6, **metadata: str) -> str:
    torch.manual_seed(3)
    tensors = {f"layers.{i}.mean": torch.randn(heads, width) for i in range(2)}
    tensors |= {f"layers.{i}.length": 2 + torch.rand(heads, 3) for i in range(2)}
    tensors |= {f"layers.{i}.gate": torch.rand(heads) for i in range(2)}
    save_file(tensors, path, {"format": FORMAT, "for": "triattention", **metadata})
    return str(path)


def policy_of(name: str, options: dict, calibration: str, positions: str = "absolute", **others) -> Policy:
    given = options | (dict(calibration=calibration) if name in ("triattention", "duo") else {})
    return Policy(
        name, C, **dict(sinks=1, recent=2, positions=positions, options=given, select=select_of(name)) | others
    )


def select_of(name: str) -> str:
    return registry.build("strategy", name).select


def check(model: GPT, policy: Policy, way: str = "full", new: int = 7, prompts: list[int] = PROMPTS) -> None:
    """No token comes twice in a row: two of the same would have scores that only rounding tells apart."""
    rows = [torch.randperm(61, generator=torch.Generator().manual_seed(n)).tolist()[: n + new] for n in prompts]
    compare(model, policy, rows, prompts, way)


def test_every_shipped_strategy_has_a_naive_form_and_is_tried() -> None:
    shipped = {n for n in registry.names("strategy") if registry.get("strategy", n).__module__.startswith("litgpt_kv.")}
    scored = {n for n in shipped if not registry.get("strategy", n).recency}
    assert scored == set(NAIVE) == set(OPTIONS)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=ids)
def test_equals_its_definition(gqa: GPT, calibration: str, name: str, options: dict, positions: str) -> None:
    policy = policy_of(name, options, calibration, positions)
    check(gqa, policy)
    check(gqa, replace(policy, interval=4), "streamed" if positions == "cache" else "admitted", prompts=PROMPTS[1:])


@pytest.mark.parametrize(("name", "options"), CASES, ids=ids)
def test_pools_and_one_choice_for_a_layer(calibration: str, name: str, options: dict) -> None:
    model = tiny(seed=8, n_query_groups=4)
    for select, pools in (("pool", 2), ("layer", 1)):
        positions = "cache" if select == "pool" else "absolute"
        check(model, policy_of(name, options, calibration, positions, select=select, pools=pools), prompts=[C + 5])


@pytest.mark.parametrize(
    ("name", "options", "length"),
    [("h2o", {}, 281), ("keydiff", {}, 156), ("snapkv", dict(window=4, kernel=3), 156)],
    ids=["h2o", "keydiff", "snapkv"],
)
def test_128_tokens_leave_at_once(name: str, options: dict, length: int) -> None:
    """As R-KV and TriAttention evict: 128 leave when token 150 enters, and again when token 278 does."""
    sizes = dict(n_layer=1, n_head=2, n_query_groups=1, n_embd=12, intermediate_size=8, block_size=288)
    model = tiny(seed=6, **sizes, padded_vocab_size=288, vocab_size=288)
    rows = [torch.randperm(288, generator=torch.Generator().manual_seed(2)).tolist()[:length]]
    compare(model, Policy(name, 150, 4, 8, interval=128, options=options), rows, [146], "full")


@pytest.mark.parametrize(("name", "options"), list(dict(CASES).items()), ids=ids)
def test_one_budget_for_all_layers(gqa: GPT, calibration: str, name: str, options: dict) -> None:
    policy = policy_of(name, options, calibration, select="model", interval=2)
    check(gqa, policy, prompts=[C + 4, C - 1], new=3)


@pytest.mark.parametrize(("name", "options"), CASES, ids=ids)
def test_the_models_own_scale_caps_windows_and_rotations(calibration: str, name: str, options: dict) -> None:
    """Gemma's attention: a layer with a sliding window, a cap, a scale of its own; then YaRN, and keys part rotated."""
    gemma = tiny(
        seed=4, sliding_window_size=13, sliding_window_indices=[1, 0], attention_logit_softcapping=2.0,
        attention_scores_scalar=9,
    )  # fmt: skip
    yarn = tiny(seed=3, rope_adjustments=YARN)
    for model, positions in ((gemma, "absolute"), (gemma, "cache"), (yarn, "cache")):
        check(model, policy_of(name, options, calibration, positions), prompts=[2 * C], new=5)


@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] not in NOT_LATENT], ids=ids)
def test_latent_attention(name: str, options: dict) -> None:
    options = {k: v for k, v in options.items() if k != "value_weighted"}
    model = tiny(seed=2, n_query_groups=4, latent_attention=LATENT, rope_interleave=True)
    for positions in POSITIONS:
        check(model, policy_of(name, options, "", positions), prompts=[C + 3], new=5)


@pytest.mark.parametrize("name", NOT_LATENT)
def test_what_is_not_defined_for_latent_attention_is_refused_by_name(calibration: str, name: str) -> None:
    model = tiny(n_query_groups=4, latent_attention=LATENT)
    with pytest.raises(ValueError, match=f"{name} is not defined for multi-head latent attention"):
        KVCache.build(model, KVCacheArgs(name, C))
    with pytest.raises(ValueError, match="h2o is not defined for multi-head latent attention"):
        KVCache.build(model, KVCacheArgs("h2o", C, options=dict(value_weighted=True)))


def test_a_strategy_that_needs_rotations_refuses_what_is_none(calibration: str) -> None:
    model = tiny(rotary_percentage=0.5)
    for args in (
        KVCacheArgs("expected_attention", C),
        KVCacheArgs("triattention", C, options=dict(calibration=calibration)),
        KVCacheArgs("criticalkv", C, options=dict(base="expected_attention")),
    ):
        with pytest.raises(ValueError, match=f"{args.strategy} needs an even number of rotated elements, not 3"):
            KVCache.build(model, args)


def test_a_strategy_without_its_calibration_says_what_makes_it(gqa: GPT) -> None:
    with pytest.raises(ValueError, match="`litgpt_kv calibrate CHECKPOINT --text FILE --for triattention"):
        KVCache.build(gqa, KVCacheArgs("triattention", C))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapkv", dict(window=0), "window must be a whole number from 1 to 4,096, got 0"),
        ("snapkv", dict(kernel=4), "kernel must be odd, got 4"),
        ("rkv", dict(importance=1.5), "importance must be a number from 0 to 1, got 1.5"),
        ("rkv", dict(similar=float("nan")), "similar must be a number"),
        ("finch", dict(window=2.0), "window must be a whole number from 1 to 4,096, got 2.0"),
        ("lagkv", dict(lag=1), "lag must be a whole number from 2"),
        ("random", dict(seed=-1), "seed must be a whole number from 0"),
        ("h2o", dict(normalize=1), "normalize must be true or false, got 1"),
        ("expected_attention", dict(future=0), "future must be a whole number from 1"),
        ("triattention", dict(calibration=3), "calibration must be the path of a file, got 3"),
        ("criticalkv", dict(base="sink"), "base must be one of expected_attention, .*, got 'sink'"),
        ("criticalkv", dict(base="criticalkv"), "base must be one of .*, got 'criticalkv'"),
        ("criticalkv", dict(base="triattention"), "base must be one of .*, got 'triattention'"),
        ("criticalkv", dict(base=3), "base must be one of .*, got 3"),
        ("criticalkv", dict(base_options="window"), "base_options must be like .*, got 'window'"),
        ("criticalkv", dict(base_options="window=0"), "window must be a whole number from 1 to 4,096, got 0"),
        ("criticalkv", dict(base_options="chunk=3"), "chunk"),
        ("criticalkv", dict(first=1.5), "first must be a number from 0 to 1, got 1.5"),
    ],
)
def test_options_are_refused_by_name(gqa: GPT, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache.build(gqa, KVCacheArgs(name, C, options=options))


def test_random_numbers_are_uniform_and_differ_by_seed_layer_head_and_position() -> None:
    model, n = tiny(seed=1, n_query_groups=4, block_size=2000), 2000
    tokens = torch.randint(61, (1, n), generator=torch.Generator().manual_seed(1))
    draws = []
    for seed in (0, 1):
        cache = KVCache.build(model, KVCacheArgs("random", n, options=dict(seed=seed)))
        model(tokens, cache, torch.tensor([n]))
        draws.append(cache.slots[0].statistics["draw"])
    every = torch.stack(draws).flatten(0, -2)  # (2 seeds * 2 layers * 4 heads, n)
    assert (every.mean(-1) - 0.5).abs().max() < 0.03 and (every.var(-1) - 1 / 12).abs().max() < 0.01
    between = torch.corrcoef(torch.cat((every, every.roll(1, -1)))).fill_diagonal_(0)
    assert between.abs().max() < 0.1


def test_of_two_rows_a_strategys_window_may_be_longer_than_either(gqa: GPT) -> None:
    """Fewer queries than the window, fewer tokens than a chunk: nothing is counted that is not there."""
    for name in ("snapkv", "finch", "rkv", "expected_attention"):
        check(gqa, policy_of(name, dict(window=30) | (dict(future=2) if name == "expected_attention" else {}), ""))
