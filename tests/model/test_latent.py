"""Multi-head latent attention with a cache: a token's latent and rotary key give what the keys of all heads would.

litgpt's own forward is the oracle without a cache; the naive reference writes every head's keys and values out
(reference_latent.py). The contract and the tests of semantics run again here: their models are this file's fixtures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import litgpt.model as base
from litgpt.config import Config
from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs, Strategy, Tokens, registry
from litgpt_kv.attention.eager import slot_attention
from litgpt_kv.attention.yarn import is_yarn
from litgpt_kv.generate import generate
from tests.contract.test_contract import (  # noqa: F401
    COMBOS,
    PLAIN,
    ROOM,
    WAYS,
    C,
    Combo,
    R,
    S,
    close,
    every,
    loss,
    references,
    test_a_retired_row_may_hold_more_than_the_others,
    test_a_row_is_admitted_without_changing_the_others,
    test_equals_the_naive_reference,
    test_first_difference_is_at_the_step_the_budget_says,
    test_on_a_tie_the_earlier_token_stays,
    test_permuted_rows_give_permuted_results,
    test_prefill_equals_shorter_prefill_and_decode,
    test_reset_then_rerun_is_identical,
    test_retired_rows_stay_and_change_nobody,
    test_row_of_a_ragged_batch_equals_the_prompt_alone,
    test_slots_hold_what_they_say,
)
from tests.model.test_compile import agree, compiled
from tests.oracle.reference import Policy, arguments, compare, logits_of, oracle, tiny, tokens_of
from tests.oracle.shrink import GROUPED_MOE, YARN
from tests.oracle.strategies import FEW, plain
from tests.semantics.test_semantics import (  # noqa: F401
    test_10_one_slot_more_equals_the_official_order_with_one_less,
    test_11_split_of_a_prompt_within_the_budget_changes_nothing,
    test_12_prompt_beyond_the_budget,
    test_16_prompt_queries_count_and_new_tokens_start_from_nothing,
)
from tests.semantics.test_semantics_limits import (  # noqa: F401
    test_23_a_trainable_model_leaves_no_autograd_graph,
    test_24_two_caches_on_one_model_and_training_beside_them,
    test_25_a_block_with_a_past_is_causal_inside,
)

LATENT = dict(q_lora_rank=10, kv_lora_rank=7, qk_rope_head_dim=6, qk_nope_head_dim=5, v_head_dim=3)
OPTIONS = dict(n_query_groups=4, latent_attention=LATENT)
VARIANTS = {
    "plain": {},
    "yarn": dict(rope_adjustments={**YARN, "mscale": 0.5}),  # an amplitude of the tables besides that of the scores
    "interleaved": dict(rope_interleave=True),
    "biased": dict(bias=True, attn_bias=True),
    "softcap": dict(attention_logit_softcapping=1.5, attention_scores_scalar=5),
    "biased-softcap": dict(bias=True, attention_logit_softcapping=1.5),
    "dual": dict(rope_local_base_freq=50.0, rope_indices=[0, 1]),
    "sliding": dict(sliding_window_size=4, sliding_window_indices=[1, 0]),  # which litgpt's latent attention ignores
    "parallel": dict(parallel_residual=True, shared_attention_norm=True),
    "odd": dict(latent_attention={**LATENT, "qk_rope_head_dim": 5}),
    "one": dict(latent_attention={**LATENT, "qk_rope_head_dim": 1}),
    "no-rope": dict(latent_attention={**LATENT, "qk_rope_head_dim": 0}),
    "deepseek": dict(n_layer=3, rope_adjustments=YARN, rope_interleave=True, **GROUPED_MOE),
}
IRREGULAR = ("odd", "one")  # sizes that are no rotation: re-rotating them is refused
DEEPSEEK_V3 = dict(name="DeepSeek-V3", n_layer=61, n_head=128, n_embd=7168, intermediate_size=18432, bias=False)
DEEPSEEK_V3 |= dict(norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False, vocab_size=129280)
DEEPSEEK_V3["latent_attention"] = dict(
    q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128
)


def latent(cls: type = GPT, seed: int = 0, **options) -> base.GPT:
    model = tiny(seed=seed, cls=cls, **{**OPTIONS, **options})
    for name, weight in sorted(model.named_parameters()):
        if name.endswith("bias"):
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    if is_yarn(model.config) and cls is not GPT:  # litgpt's is the wrong way round; all else is compared
        ours = tiny(seed=seed, **{**OPTIONS, **options})
        model.cos, model.sin = ours.cos, ours.sin
    return model


@pytest.fixture(scope="session")
def gqa() -> GPT:
    """What the tests of semantics run on."""
    return latent()


@pytest.fixture(scope="module")
def model() -> GPT:
    """What the contract's tests run on: token 60 has an embedding of NaN."""
    model = latent(seed=5)
    model.transformer.wte.weight[60] = math.nan
    return model


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_training_is_litgpts_to_the_bit(name: str, exact: bool) -> None:
    ours, theirs = (latent(cls, exact=exact, **VARIANTS[name]) for cls in (GPT, base.GPT))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    idx = torch.tensor([tokens_of(0, 26), tokens_of(1, 26)])
    expected = theirs(idx)
    assert expected.std(-1).min() > 1e-2
    if exact and "softcap" in name:  # there `lift` gives litgpt a formula of its own
        close(ours(idx), expected, 1e-12)
    else:
        assert torch.equal(ours(idx), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_and_every_strategy_with_room_for_all_equal_litgpt(name: str) -> None:
    ours, tokens = latent(**VARIANTS[name]), tokens_of(2, 24)
    theirs = latent(base.GPT, **VARIANTS[name])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    full = theirs(torch.tensor([tokens]))[0]
    close(torch.stack([m.logits for m in oracle(ours, Policy(), tokens, [24])]), full)
    for combo in COMBOS if name == "plain" else PLAIN:
        tol = max(1e-8, 30 * loss(combo.storage))
        if combo.positions == "cache" and name in IRREGULAR:
            with pytest.raises(ValueError, match="even number of rotated elements"):
                combo.build(ours)
            continue
        for prompt in (1, 9):
            found = logits_of(ours, combo.build(ours, budget=24), [tokens], [prompt], "full")[0]
            assert sorted(found) == list(range(prompt - 1, 24))
            for i, logits in found.items():
                close(logits, full[i], tol)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "plain"])  # the contract's tests see to that
def test_evicting_equals_the_naive_reference(name: str) -> None:
    model, rows = latent(seed=3, **VARIANTS[name]), [tokens_of(n, n + 8) for n in (2, C, 2 * C)]
    for policy in (Policy("sink", C, S), Policy("h2o", C, S, R)):
        for positions in ("absolute",) if name in IRREGULAR else ("absolute", "cache"):
            way = WAYS[(positions == "cache") ^ (policy.name == "h2o")]
            compare(model, replace(policy, positions=positions), rows, [2, C, 2 * C], way)


def test_layers_with_strategies_of_their_own() -> None:
    policies = [Policy("sink", 6, 1), Policy("h2o", 9, 0, 2), Policy()]
    compare(latent(seed=4, n_layer=3), policies, [tokens_of(n, n + 14) for n in (3, 12)], [3, 12], "full")


@pytest.mark.parametrize("prompt", [1, 30])
def test_a_stream_past_the_context_equals_the_reference(prompt: int) -> None:
    model, tokens = latent(block_size=32, rope_interleave=True), tokens_of(9, 90)
    compare(model, Policy("sink", C, 2, positions="cache"), [tokens], [prompt], "streamed")
    assert model.max_seq_length == 32


# -- what is stored ----------------------------------------------------------------------------------------------------


@every
def test_bytes_are_a_latent_and_a_rotary_key_a_token_and_as_announced(combo: Combo) -> None:
    model = latent(block_size=ROOM)
    cache = combo.build(model, rows=3)
    assert cache.allocated() == KVCache.nbytes(model.config, cache.args, 3, ROOM, dtype=torch.float64)
    facts, slots = cache.layers[0].spec, cache.layers[0].keys.read(ROOM).size(2)
    assert (facts.groups, facts.key_size + facts.value_size) == (1, 7 + 6)
    if combo.storage == "plain":
        assert cache.allocated()["keys"] + cache.allocated()["values"] == 2 * 3 * slots * (7 + 6) * 8
    logits_of(model, cache, [tokens_of(b, ROOM) for b in range(3)], [C] * 3, "full")
    assert cache.allocated() == KVCache.nbytes(model.config, cache.args, 3, ROOM, dtype=torch.float64)


def test_deepseek_v3_takes_70_kilobytes_a_token_where_litgpt_takes_5_megabytes() -> None:
    """At its shapes, 61 layers in bfloat16: 70,272 bytes against 4,997,120, 71 times as many."""
    config = Config(**DEEPSEEK_V3)
    size = KVCache.nbytes(config, KVCacheArgs(), 1, 1000, dtype=torch.bfloat16)
    assert (size["keys"] + size["values"]) / 1000 == 61 * (512 + 64) * 2 == 70_272
    with torch.device("meta"):
        attn = base.MultiheadLatentAttention(config, 0)
    expanded = attn.build_kv_cache(1, 1000, device=torch.device("meta"), dtype=torch.bfloat16)
    assert 61 * (expanded.k.nbytes + expanded.v.nbytes) / 1000 == 4_997_120


def test_a_cache_is_saved_repeated_and_goes_on(model: GPT, tmp_path) -> None:
    cache = KVCache.build(model, arguments(Policy("h2o", C, S, R)), batch_size=2)
    model(torch.tensor([tokens_of(1, 12), tokens_of(2, 12)]) % 60, cache, torch.tensor([12, 5]))
    cache.save(tmp_path / "cache.safetensors")
    again, twice = KVCache.load(tmp_path / "cache.safetensors", model), cache.repeat(2)
    for token in tokens_of(3, 2 * C, 60):
        one, two, three = (model(torch.full((c.batch_size, 1), token), c) for c in (cache, again, twice))
        assert torch.equal(one, two)
        close(three, one.repeat_interleave(2, 0), 1e-12)


# -- the up-projections, absorbed --------------------------------------------------------------------------------------


def test_new_tokens_never_write_keys_and_values_out(model: GPT) -> None:
    cache = KVCache.build(model)
    model(torch.tensor([[1, 2, 3]]), cache, torch.tensor([3]))
    hooks = [b.attn.kv_b_proj.register_forward_hook(lambda *_: pytest.fail("expanded")) for b in model.transformer.h]
    assert model(torch.tensor([[4]]), cache).isfinite().all() and model(torch.tensor([[5, 6]]), cache).isfinite().all()
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("want_mass", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_queries_wider_than_keys_meet_the_values_too(masked: bool, want_mass: bool) -> None:
    q, k, v = torch.randn(2, 4, 3, 9), torch.randn(2, 1, 8, 2), torch.randn(2, 1, 8, 7)
    mask = torch.rand(2, 1, 3, 8) < 0.7 if masked else None
    found = slot_attention(q, k, v, mask, scale=0.4, want=("mass",) if want_mass else ())
    expected = slot_attention(q, torch.cat((k, v), dim=-1), v, mask, scale=0.4, want=("mass",) if want_mass else ())
    torch.testing.assert_close(found, expected)


class Adapted(nn.Module):
    """A linear layer with something beside it, as adapters and quantized layers are."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = (
            nn.Linear(*sizes, bias=False) for sizes in ((inner.in_features, 2), (2, inner.out_features))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["plain", "biased-softcap"])
@torch.no_grad()
def test_an_adapted_up_projection_is_absorbed_with_what_it_adds(name: str) -> None:
    model, tokens = latent(**VARIANTS[name]), tokens_of(5, 20)
    before = model(torch.tensor([tokens]))[0]
    for block in model.transformer.h:
        block.attn.kv_b_proj = Adapted(block.attn.kv_b_proj).double()
    full = model(torch.tensor([tokens]))[0]
    assert (full - before).abs().max() > 1e-2
    for i, logits in logits_of(model, KVCache.build(model), [tokens], [7], "full")[0].items():
        close(logits, full[i])


@dataclass(frozen=True)
class Watching(Strategy):
    """Compares the attention it is told of with what the queries and keys that it sees give."""

    statistics: ClassVar[tuple[str, ...]] = ("mass", "last")
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    window: ClassVar[int] = 32
    checked: ClassVar[list[int]] = []

    def enter(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        if tokens.pos.size(-1) > 1:  # a prompt: its queries are all there
            self.compare(tokens)
        return {}

    def update(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        self.compare(tokens)
        self.checked.append(int(tokens.live.sum()))
        return {}

    @staticmethod
    def compare(tokens: Tokens) -> None:
        queries, pos = tokens.queries
        scores = queries @ tokens.keys.mT * tokens.layer.scale  # (B, H, w, N)
        hidden = (tokens.pos[:, :, None] > pos[:, None, :, None]) | (tokens.pos < 0)[:, :, None]
        probs = scores.masked_fill(hidden, -math.inf).softmax(-1).mean(1)  # (B, w, N)
        close(probs[:, -1], tokens["last"][:, 0])
        close(probs[:, pos[0] >= 0].sum(1), tokens["mass"][:, 0])


@torch.no_grad()
def test_strategies_see_queries_and_keys_whose_products_are_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._KINDS["strategy"], "watching", Watching)
    model, tokens = latent(n_layer=1), tokens_of(6, 16)
    cache = KVCache.build(model, "watching", max_tokens=20)
    logits_of(model, cache, [tokens], [7], "full")
    assert Watching.checked == list(range(8, 17))


# -- compiled, in low precision, and through generation ----------------------------------------------------------------


@pytest.mark.parametrize("combo", [c for c in PLAIN if c.strategy in FEW and plain(c.strategy).latent], ids="-".join)
def test_fifty_ragged_steps_are_one_graph(combo: Combo) -> None:
    torch._dynamo.reset()
    model = latent(seed=5, n_layer=1, rope_interleave=combo.positions == "cache", bias=combo.positions == "cache")
    step, counting = compiled(model)
    agree(model, combo.strategy, combo.positions, step, 1e-8)
    assert counting.graphs == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_is_as_near_to_float64_as_without_a_cache(dtype: torch.dtype) -> None:
    sizes = dict(q_lora_rank=48, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)
    options = dict(n_embd=64, intermediate_size=128, block_size=256, latent_attention=sizes)
    model = latent(exact=False, **options).to(dtype)
    exact, tokens = latent(**options), torch.tensor([tokens_of(7, 250)])
    exact.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    expected = exact(tokens)[0]
    found = torch.stack(list(logits_of(model, KVCache.build(model), tokens.tolist(), [1], "full")[0].values()))
    errors = [(logits.double() - expected).square().mean().sqrt() for logits in (found, model(tokens)[0])]
    assert errors[1] > 1e-4 and errors[0] < 1.5 * errors[1]


@torch.no_grad()
def test_greedy_generation_continues_as_litgpts_forward_does() -> None:
    ours = latent(**VARIANTS["deepseek"])
    theirs = latent(base.GPT, **VARIANTS["deepseek"])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    prompts, expected = [tokens_of(1, 4), tokens_of(2, 9)], []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(12):
            text.append(int(theirs(torch.tensor([text]))[0, -1].argmax()))
        expected.append(text[len(prompt) :])
    rows = generate(ours, [torch.tensor(p) for p in prompts], max_new_tokens=12, sampling=SamplingArgs(temperature=0))
    assert [row.tolist() for row in rows] == expected
