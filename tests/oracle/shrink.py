"""Small configs with the features of big ones: every flag stays, only sizes shrink."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import litgpt.model as base
from litgpt.config import Config, name_to_config
from litgpt_kv.attention.yarn import is_yarn

HEAD_SIZE = 16
WINDOW = 5


def shrink(name: str, **changes: Any) -> Config:
    """The named litgpt config with few layers, heads and widths.

    Kept are the ratio of heads to groups (all, some, one), whether the heads' width is the embedding's, and one layer
    of each kind (sliding or global, each rope base). `changes` are fields of `Config`, applied last.
    """
    big, own = Config.from_name(name), name_to_config[name]
    groups = {big.n_head: 4, 1: 1}.get(big.n_query_groups, 2)
    square = big.n_head * big.head_size == big.n_embd
    small: dict[str, Any] = dict(block_size=48, n_head=4, n_query_groups=groups, head_size=HEAD_SIZE)
    small |= dict(n_embd=4 * HEAD_SIZE if square else 40, intermediate_size=56, vocab_size=90, padded_vocab_size=96)
    layers = [0, 1]
    if big.sliding_window_size is not None:
        kinds = list(zip(big.sliding_window_indices, big.rope_indices or big.sliding_window_indices))
        layers = [0, next((i for i, kind in enumerate(kinds) if kind != kinds[0]), 1)]
        small |= dict(sliding_window_size=WINDOW, sliding_window_indices=[kinds[i][0] for i in layers])
        if big.rope_indices is not None:
            small["rope_indices"] = [kinds[i][1] for i in layers]
    if own.get("n_expert"):
        small |= dict(n_expert=4, n_expert_per_token=2)
        if big.moe_intermediate_size is not None:
            small["moe_intermediate_size"] = 24
    if "original_max_seq_len" in (big.rope_adjustments or {}):
        small["rope_adjustments"] = {**big.rope_adjustments, "original_max_seq_len": 16}
    return Config.from_name(name, **{**small, "n_layer": len(layers), **changes})


LLAMA = "Llama-3.2-1B"
LATENT = dict(q_lora_rank=12, kv_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=14)
YARN = dict(factor=4.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=16, mscale=1.0, mscale_all_dim=0.8)
DEEPSEEK = dict(latent_attention=LATENT, n_query_groups=4, rope_adjustments=YARN, rope_interleave=True)
GROUPED_MOE = dict(mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, moe_intermediate_size=24)
GROUPED_MOE |= dict(n_shared_expert=1, n_expert_groups=2, n_topk_groups=1, n_topk_scores_per_group=2)
GROUPED_MOE |= dict(first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True)

SYNTHETIC: dict[str, Config] = {
    "latent": shrink(LLAMA, latent_attention=LATENT, n_query_groups=4, rope_adjustments=None),
    "latent-yarn": shrink(LLAMA, **DEEPSEEK),
    "latent-softcap": shrink(LLAMA, latent_attention=LATENT, n_query_groups=4, attention_logit_softcapping=2.0),
    "latent-experts": shrink(LLAMA, **DEEPSEEK, **GROUPED_MOE),
    "yarn": shrink(LLAMA, rope_adjustments=YARN),
    "interleaved": shrink(LLAMA, rope_interleave=True),
    "interleaved-partial": shrink(LLAMA, rope_interleave=True, rotary_percentage=0.5),
    "rope-odd": shrink(LLAMA, head_size=10, rotary_percentage=0.5),
    "rope-one": shrink(LLAMA, head_size=4, rotary_percentage=0.25),
    "rope-none": shrink(LLAMA, rotary_percentage=0.0, rope_adjustments=None),
    "rope-linear": shrink(LLAMA, rope_adjustments={"factor": 8.0}),
    "rope-condensed": shrink(LLAMA, rope_condense_ratio=4),
    "grouped-moe": shrink(LLAMA, **GROUPED_MOE),
    "softcap-window": shrink("Gemma-2-2b", attention_logit_softcapping=1.5, final_logit_softcapping=2.0),
    "softcap-global": shrink(LLAMA, attention_logit_softcapping=1.5),
    "one-token-window": shrink("Mistral-7B-v0.1", sliding_window_size=1),
    "head-bias": shrink("pythia-14m", lm_head_bias=True),
}
"""Features that no named config has, or has in a shape that hides them."""


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and buffers of weight: no norm is the identity, no bias zero, and attention is uneven."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            centre = 1.0 if weight.dim() == 1 and name.endswith("weight") else 0.0
            weight.copy_(centre + torch.randn(weight.shape, generator=generator) * (0.3 if weight.dim() == 1 else 0.2))
    return model


def twins(config: Config, dtype: torch.dtype = torch.float32) -> tuple[base.GPT, base.GPT]:
    """Ours and litgpt's model with the same random weights, in eval mode, and for YaRN the same rope tables."""
    from litgpt_kv import GPT

    theirs = fill(base.GPT(config)).to(dtype).eval()
    ours = GPT(config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if is_yarn(config):  # litgpt's is the wrong way round (tests/test_litgpt_faults.py); all else is compared
        theirs.cos, theirs.sin = ours.cos.clone(), ours.sin.clone()
    return ours, theirs
