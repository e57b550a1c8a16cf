"""The same logits and the same greedy tokens as Hugging Face's transformers, with weights through litgpt's converters.

Random weights; prompts shorter and longer than the sliding window, then three windows of decoding with our dense cache.

Both sides are lifted to float64, norms, rotary angles and softmax included, as both compute these in float32 whatever
the model's dtype; the angles themselves are compared first and then shared. So the tolerance is 1e-8, as elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.scripts import convert_hf_checkpoint as convert
from litgpt_kv import GPT, KVCache
from litgpt_kv.benchmark.peers.llama import common_settings
from litgpt_kv.cache.spec import layer_spec
from tests.oracle.reference import lift, theta, walk
from tests.oracle.shrink import WINDOW, fill, shrink

transformers = pytest.importorskip("transformers", minversion="4.51.3")

LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.8)
LATENT = dict(q_lora_rank=12, kv_lora_rank=20, qk_rope_head_dim=16, qk_nope_head_dim=10, v_head_dim=14)
EXPERTS = dict(mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, moe_intermediate_size=24)
EXPERTS |= dict(n_shared_expert=1, n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)
EXPERTS |= dict(first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True, rope_interleave=True)


def common(config: Config, **more: Any) -> dict[str, Any]:
    return common_settings(config) | {"attn_implementation": "eager", **more}


def layer_types(config: Config) -> list[str]:
    return ["sliding_attention" if sliding else "full_attention" for sliding in config.sliding_window_indices]


def llama(config: Config) -> nn.Module:
    scaling = {**config.rope_adjustments, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common(config, rope_scaling=scaling)))


def mistral(config: Config) -> nn.Module:
    options = common(config, sliding_window=config.sliding_window_size)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**options))


def qwen3(config: Config) -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common(config, use_sliding_window=False)))


def gemma2(config: Config) -> nn.Module:
    options = common(
        config,
        sliding_window=config.sliding_window_size,
        layer_types=layer_types(config),
        query_pre_attn_scalar=config.attention_scores_scalar,
        attn_logit_softcapping=config.attention_logit_softcapping,
        final_logit_softcapping=config.final_logit_softcapping,
        hidden_activation="gelu_pytorch_tanh",
    )
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**options))


def gemma3(config: Config) -> nn.Module:
    options = common(
        config,
        sliding_window=config.sliding_window_size,
        layer_types=layer_types(config),
        query_pre_attn_scalar=config.attention_scores_scalar,
        rope_local_base_freq=config.rope_local_base_freq,
        rope_scaling={"rope_type": "linear", **config.rope_adjustments},
        hidden_activation="gelu_pytorch_tanh",
    )
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**options))


def phi(config: Config) -> nn.Module:
    options = common(config, partial_rotary_factor=config.rotary_percentage, layer_norm_eps=config.norm_eps)
    return transformers.PhiForCausalLM(transformers.PhiConfig(**options))


def pythia(config: Config) -> nn.Module:
    options = common(config, rotary_pct=config.rotary_percentage, layer_norm_eps=config.norm_eps)
    options |= dict(rotary_emb_base=config.rope_base, use_parallel_residual=True, hidden_act="gelu")
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**options))


def olmo2(config: Config) -> nn.Module:
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**common(config)))


def deepseek(config: Config) -> nn.Module:
    scaling = {**config.rope_adjustments, "rope_type": "yarn"}
    scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
    options = common(
        config,
        **config.latent_attention,
        rope_scaling=scaling,
        rope_interleave=config.rope_interleave,
        first_k_dense_replace=config.first_k_dense_replace,
        moe_intermediate_size=config.moe_intermediate_size,
        n_routed_experts=config.n_expert,
        num_experts_per_tok=config.n_expert_per_token,
        n_shared_experts=config.n_shared_expert,
        n_group=config.n_expert_groups,
        topk_group=config.n_topk_groups,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    del options["head_dim"]  # its own is the rotated part
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**options))


def deepseek_weights(config: Config, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """litgpt has no converter for DeepSeek: names alone differ."""
    parts = [("model.embed_tokens.", "transformer.wte."), ("model.norm.", "transformer.ln_f."), ("model.layers.", "h.")]
    parts += [("self_attn.o_proj.", "attn.proj."), ("self_attn.", "attn."), ("_layernorm.weight", "_norm.weight")]
    parts += [("input_norm.", "norm_1."), ("post_attention_norm.", "norm_2."), ("gate_proj.", "fc_1.")]
    parts += [("up_proj.", "fc_2."), ("down_proj.", "proj."), ("h.", "transformer.h.")]
    renamed = {}
    for name, weight in state.items():
        for old, new in parts:
            name = name.replace(old, new, 1) if old != "h." or name.startswith("h.") else name
        renamed[name] = weight
    return renamed


# litgpt's name, changes to it, transformers' model, litgpt's converter
FAMILIES: dict[str, tuple[str, dict[str, Any], Callable, Callable | None]] = {
    "Llama 3": ("Llama-3.2-1B", dict(rope_adjustments={**LLAMA3, "original_max_seq_len": 16}), llama, None),
    "Mistral": ("Mistral-7B-v0.1", {}, mistral, None),
    "Qwen 3": ("Qwen3-0.6B", {}, qwen3, convert.copy_weights_qwen_3),
    "Gemma 2": ("Gemma-2-2b", dict(attention_logit_softcapping=1.5), gemma2, convert.copy_weights_gemma_2),
    "Gemma 3": ("Gemma-3-4b-it", {}, gemma3, convert.copy_weights_gemma_3),
    "Phi": ("phi-2", {}, phi, convert.copy_weights_phi),
    "Pythia": ("pythia-14m", {}, pythia, convert.copy_weights_gpt_neox),
    "OLMo 2": ("OLMo-2-1124-7B", {}, olmo2, convert.copy_weights_olmo2),
    "DeepSeek-V3": (
        "Llama-3.2-1B",
        dict(
            latent_attention=LATENT,
            n_query_groups=4,
            rope_adjustments={**YARN, "original_max_seq_len": 16},
            norm_eps=1e-6,
            block_size=64,
            **EXPERTS,
        ),
        deepseek,
        None,
    ),
}


def converted(family: str, config: Config, theirs: nn.Module) -> GPT:
    """Our model with the other's weights, by litgpt's converter."""
    converter, state, weights = FAMILIES[family][3], {}, dict(theirs.state_dict())
    if family == "DeepSeek-V3":
        state = deepseek_weights(config, weights)
    elif converter is convert.copy_weights_gpt_neox:
        converter(config, state, weights)
    elif converter is convert.copy_weights_gemma_2:
        converter({}, state, weights)
    elif converter is convert.copy_weights_gemma_3:
        converter({}, state, weights, config=config)
    else:
        (converter or convert.copy_weights_hf_llama)(config, {}, state, weights)
    model = GPT(config).eval().requires_grad_(False)
    model.load_state_dict(state, strict=True)
    return model


class ExactNorm(nn.Module):
    """transformers' RMSNorm in the dtype of its input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        self.weight = norm.weight + 1 if "Gemma" in type(norm).__name__ else norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class ExactAngles(nn.Module):
    """Tables (N, E) in the place of angles worked out in float32."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.cos, self.sin = cos, sin

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids], self.sin[position_ids]


def exact(theirs: nn.Module, ours: GPT) -> None:
    """Makes transformers' model float64 throughout, with our angles once they were found to be its own."""
    theirs.double()
    per_position, amplitude = (t.view(t.size(0), -1) for t in theta(ours))  # (E, bases)
    tables = [t.view(*t.shape[:2], -1) for t in (ours.cos, ours.sin)]  # (N, E, bases)
    for module in list(theirs.modules()):
        for name, child in module.named_children():
            kind = type(child).__name__
            if kind.endswith("RMSNorm"):
                setattr(module, name, ExactNorm(child))
            elif kind.endswith("RotaryEmbedding"):
                base = 1 if name.endswith("local") else 0
                half = child.inv_freq.size(0)
                torch.testing.assert_close(per_position[:half, base], child.inv_freq.double(), rtol=1e-6, atol=0)
                assert float(amplitude[0, base]) == pytest.approx(child.attention_scaling, rel=1e-6)
                setattr(module, name, ExactAngles(*(t[..., base] for t in tables)))
            elif hasattr(child, "embed_scale"):  # Gemma 3's is a float32 buffer
                child.embed_scale = torch.tensor(float(child.embedding_dim) ** 0.5, dtype=torch.float64)
            elif kind == "DeepseekV3TopkRouter":
                child.forward = functools.partial(routed, child)


def routed(router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek's router without its casts to float32."""
    scores = (x.view(-1, x.size(-1)) @ router.weight.T).sigmoid()
    index = router.get_topk_indices(scores)
    weight = scores.gather(1, index)
    return index, weight / (weight.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor


@pytest.fixture
def softmax_stays_double(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.functional.softmax

    def softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        return plain(x, dim=dim, dtype=torch.float64 if x.dtype == torch.float64 else dtype, **others)

    monkeypatch.setattr(nn.functional, "softmax", softmax)


def pair(family: str) -> tuple[GPT, nn.Module]:
    name, changes, build, _ = FAMILIES[family]
    config = shrink(name, **changes)
    theirs = fill(build(config)).eval().requires_grad_(False)
    ours = lift(converted(family, config, theirs))
    exact(theirs, ours)
    return ours, theirs


def full(model: nn.Module, tokens: list[int]) -> Tensor:
    out = model(torch.tensor([tokens]))
    return (out if isinstance(out, Tensor) else out.logits)[0]


@pytest.mark.usefixtures("softmax_stays_double")
@pytest.mark.parametrize("family", FAMILIES)
def test_training_forward(family: str) -> None:
    ours, theirs = pair(family)
    tokens = torch.randint(96, (4 * WINDOW + 2,)).tolist()
    expected = full(theirs, tokens)
    assert expected.std(-1).min() > 1e-2
    torch.testing.assert_close(full(ours, tokens), expected, rtol=0, atol=1e-8)


@pytest.mark.usefixtures("softmax_stays_double")
@pytest.mark.parametrize("way", ["streamed", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_through_prefill_and_three_windows(family: str, way: str) -> None:
    ours, theirs = pair(family)
    prompts = [2, 2 * WINDOW + 2]
    rows = [torch.randint(96, (n,)).tolist() for n in prompts]
    made = [[*row] for row in rows]
    for row in made:  # as transformers continues them
        for _ in range(3 * WINDOW):
            row.append(int(full(theirs, row)[-1].argmax()))
    cache = KVCache.build(ours, "dense", batch_size=2, max_tokens=max(map(len, made)))
    expected, checked = [full(theirs, row) for row in made], 0
    for at, logits in walk(ours, cache, made, prompts, way):
        for b, i in enumerate(at):
            if i is None:
                continue
            torch.testing.assert_close(logits[b], expected[b][i], rtol=0, atol=1e-8)
            if prompts[b] <= i + 1 < len(made[b]):
                assert int(logits[b].argmax()) == made[b][i + 1]
                checked += 1
    assert checked == 2 * 3 * WINDOW


def test_the_families_have_their_features() -> None:
    facts = {family: layer_spec(shrink(name, **changes), 0) for family, (name, changes, *_) in FAMILIES.items()}
    assert facts["Gemma 2"].window == facts["Gemma 3"].window == facts["Mistral"].window == WINDOW
    assert facts["Gemma 2"].softcap and facts["Phi"].rope_size < facts["Phi"].key_size
