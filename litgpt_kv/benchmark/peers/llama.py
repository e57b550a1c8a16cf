"""Models of Llama's architecture, as other libraries know them: transformers' config and names of weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from litgpt.config import Config
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
from litgpt_kv.benchmark.peers.base import Unable

# of litgpt's config: what every model of Llama's architecture has
FIXED: dict[str, Any] = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0}
FIXED |= {"parallel_residual": False, "shared_attention_norm": False, "norm_1": True, "norm_2": True}
FIXED |= dict.fromkeys(("bias", "attn_bias", "lm_head_bias", "norm_qk", "scale_embeddings", "rope_interleave"), False)
FIXED |= dict.fromkeys(("post_attention_norm", "post_mlp_norm"), False)
FIXED |= dict.fromkeys(("attention_logit_softcapping", "final_logit_softcapping", "attention_scores_scalar"), None)
FIXED |= dict.fromkeys(("sliding_window_size", "latent_attention", "rope_adjustments", "rope_local_base_freq"), None)
FIXED |= {"rope_condense_ratio": 1}


def check_llama(config: Config) -> None:
    """Raise Unable if a model is not of Llama's architecture, in its plain form."""
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise Unable(f"only models of Llama's plain architecture are passed on; here {name} is not {value}")


def settings(config: Config) -> dict[str, Any]:
    """Return the arguments of transformers' `LlamaConfig` for a model of litgpt."""
    check_llama(config)
    return common_settings(config) | {"rope_theta": float(config.rope_base), "tie_word_embeddings": False}


def common_settings(config: Config) -> dict[str, Any]:
    """Return what most of transformers' configs call alike."""
    return dict(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_query_groups,
        head_dim=config.head_size,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_base,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def renamed(config: Config, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with transformers' names. They share the memory of litgpt's `state`."""
    found: dict[str, Tensor] = {}
    copy_weights_llama(config, found, state)
    return found
