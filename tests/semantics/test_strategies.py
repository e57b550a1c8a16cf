"""Every strategy against its definition by loops, at every step: logits, kept tokens, scores, keys and values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litgpt_kv import GPT, registry
from litgpt_kv.cache.constants import FORMAT
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
    "criticalkv": [dict(base="h2o"), dict(base="keydiff")],
}
CASES = [(name, options) for name, every in OPTIONS.items() for options in every]
LATENT = dict(q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5)
YARN = dict(factor=8.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=16, mscale_all_dim=0.8)
NOT_LATENT = ("expected_attention", "triattention", "criticalkv")


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
    save_file(tensors, path, {"format": FORMAT, "for": "triattention", **metadata})
    return str(path)


def policy_of(name: str, options: dict, calibration: str, positions: str = "absolute", **others) -> Policy:
    given = options | (dict(calibration=calibration) if name == "triattention" else {})
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
    shipped = {n for n in registry.names("strategy") if registry.get("strategy", n).__module__.startswith("litgpt_kv")}
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
