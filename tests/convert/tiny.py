"""GGUF files of small random models, written with gguf's own writer and names, from transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, TokenType
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from tests.oracle.shrink import fill

SIZES = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=1, attn_implementation="eager")
GROUPED = dict(num_key_value_heads=2, head_dim=8)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LOCAL = ["sliding_attention"] * 5 + ["full_attention"]  # Gemma 3's order of layers
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=8192)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # transformers' class, gguf's architecture, own settings
    "llama": ("Llama", "LLAMA", {**GROUPED, "rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "smollm": ("Llama", "LLAMA", {**GROUPED, "rope_theta": 100000.0, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", "LLAMA", {**GROUPED, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2": ("Qwen2", "QWEN2", {"num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "QWEN3", {**GROUPED, "head_dim": 16, "rope_theta": 1e6}),
    "gemma": ("Gemma", "GEMMA", {**GROUPED, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", "GEMMA2", {**GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3",
        "GEMMA3",
        {**GROUPED, "num_hidden_layers": 6, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": LOCAL},
    ),
    "phi2": ("Phi", "PHI2", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", "PHI3", {"num_key_value_heads": 2, "sliding_window": 6, "pad_token_id": 0}),
}


def make_model(kind: str) -> nn.Module:
    """transformers' model with random weights."""
    transformers = pytest.importorskip("transformers", minversion="4.51.3")
    name, _, own = MODELS[kind]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**{**SIZES, **own})
    model = fill(getattr(transformers, f"{name}ForCausalLM")(config)).eval()
    return model


def make_tokenizer(pre: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """A byte-level tokenizer of 320 tokens with ChatML's among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([Path(__file__).read_text(), "1984 2024 1234 12 34 user user assistant"], trainer)
    return tokenizer


def add_tokens(writer: GGUFWriter, tokenizer: Tokenizer, pre: str, template: str | None, add_bos: bool | None) -> None:
    """The tokenizer's part of the metadata."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if id in special else TokenType.NORMAL for id in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    if template is not None:
        writer.add_chat_template(template)


def add_sizes(writer: GGUFWriter, kind: str, config: Any) -> None:
    """The model's part of the metadata, as llama.cpp's converter writes it."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if kind == "phi2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(int(config.partial_rotary_factor * config.hidden_size) // 4)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if (getattr(config, "rope_scaling", None) or {}).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the two halves of each rotated pair side by side."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    kind: str,
    model: nn.Module,
    *,
    quant: Kind = Kind.F32,
    tokenizer: Tokenizer | None = None,
    pre: str = "gpt-2",
    template: str | None = None,
    add_bos: bool | None = None,
) -> None:
    """Write a model; matrices are quantised, and `model` gets what they then are."""
    arch = MODEL_ARCH[MODELS[kind][1]]
    config = model.config
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(f"Tiny {kind}")
    add_sizes(writer, kind, config)
    add_tokens(writer, tokenizer or make_tokenizer(), pre, template, add_bos)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        weight = parameter.float().numpy()
        if name.endswith("norm.weight") and kind.startswith("gemma"):
            weight = weight + 1
        if arch == MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            weight = permuted(weight, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if weight.ndim == 1 or quant == Kind.F32:
            writer.add_tensor(to, np.ascontiguousarray(weight, np.float32))
            continue
        stored = quantize(weight, quant)
        writer.add_tensor(to, stored, raw_dtype=quant)
        back = dequantize(stored, quant)
        if arch == MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            order = permuted(np.arange(len(back)), heads)
            unordered = np.empty_like(back)
            unordered[order] = back
            back = unordered
        parameter.data.copy_(torch.from_numpy(back))
    if (getattr(config, "rope_scaling", None) or {}).get("rope_type") == "llama3":
        plain = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
