"""litgpt's Config from a GGUF file's metadata: a named one where the sizes agree, else one of the file's numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from litgpt.config import Config, configs
from litgpt_kv.config import shown
from litgpt_kv.convert.gguf_file import GGUFFile
from litgpt_kv.llm.check_config import check_config, check_value

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}  # of all published models
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # these scale scores by n_embd / n_head, the others by the head size
INSTRUCT = re.compile(r"instruct|chat|-it$|-it-|reasoning|thinking", re.IGNORECASE)
SAME = [  # what a named config and the file must agree on
    "n_layer",
    "n_embd",
    "n_head",
    "n_query_groups",
    "head_size",
    "intermediate_size",
    "padded_vocab_size",
    "rope_base",
    "rotary_percentage",
    "rope_adjustments",
    "rope_local_base_freq",
    "norm_class_name",
    "norm_qk",
    "norm_qk_type",
    "norm_1",
    "norm_2",
    "parallel_residual",
    "post_attention_norm",
    "post_mlp_norm",
    "shared_attention_norm",
    "attn_bias",
    "bias",
    "lm_head_bias",
    "mlp_class_name",
    "n_expert",
    "scale_embeddings",
    "attention_logit_softcapping",
    "final_logit_softcapping",
    "latent_attention",
    "rope_condense_ratio",
]


def config_of(file: GGUFFile) -> Config:
    """litgpt's config of the model in a file.

    Raises:
        ValueError: If litgpt cannot express the architecture, or the metadata are missing, wrong or contradictory.
    """
    arch = architecture(file)
    values = {**_common(file, arch), **ARCHITECTURES[arch](file)}
    for name, value in values.items():
        check_value(name, value)
    values["name"] = _own_name(file, arch)
    try:
        config = Config(**values)
    except AssertionError as error:
        raise ValueError(f"its sizes contradict each other {error}".strip()) from error
    check_config(config)
    named = _named(file, arch, config)
    return config if named is None else Config(**{**values, "name": named["name"], "hf_config": named["hf_config"]})


def architecture(file: GGUFFile) -> str:
    """The architecture's name.

    Raises:
        ValueError: If it is none of those that are converted.
    """
    arch = file.need("general.architecture", str)
    if file.get("split.count", int, 1) > 1:
        parts = file.get("split.count", int)
        raise ValueError(f"it is one of {parts} parts: make one file of them with llama.cpp's gguf-split --merge")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"its architecture {shown(arch)} is not one that can be converted: {known}")
    if file.get(f"{arch}.expert_count", int, 0):
        raise ValueError(f"it is a mixture of {file.get(f'{arch}.expert_count', int)} experts; dense models only")
    return arch


def _common(file: GGUFFile, arch: str) -> dict[str, Any]:
    def size(key: str, default: int | None = None) -> int:
        value = file.get(f"{arch}.{key}", (int, list), default)
        if value is None:
            raise ValueError(f"its metadata lack {arch + '.' + key!r}")
        if isinstance(value, list):  # one value a layer
            if not value or any(v != value[0] for v in value) or not isinstance(value[0], int):
                raise ValueError(f"{arch}.{key} differs between layers, which litgpt's models cannot")
            value = value[0]
        if value < 1:
            raise ValueError(f"{arch}.{key} must be positive, got {value}")
        return value

    embd, heads = size("embedding_length"), size("attention.head_count")
    groups = size("attention.head_count_kv", heads)
    head = size("attention.key_length", max(1, embd // heads))
    if size("attention.value_length", head) != head:
        raise ValueError(f"keys have {head} numbers and values {size('attention.value_length')}; litgpt has one size")
    if heads % groups:
        raise ValueError(f"{heads} query heads do not divide into {groups} groups")
    rotated = size("rope.dimension_count", head)
    if rotated > head:
        raise ValueError(f"{arch}.rope.dimension_count {rotated} is more than the head size {head}")
    share = rotated / head
    embedding = file.tensors.get("token_embd.weight")
    tokens = file.texts("tokenizer.ggml.tokens")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("it has no tensor 'token_embd.weight' of two dimensions")
    if not tokens or len(tokens) > embedding.shape[0]:
        there = "no" if not tokens else f"{len(tokens):,}"
        raise ValueError(f"it has {there} tokens for {embedding.shape[0]:,} embeddings")
    eps = "layer_norm_epsilon" if arch == "phi2" else "layer_norm_rms_epsilon"
    return {
        "n_layer": size("block_count"),
        "n_embd": embd,
        "n_head": heads,
        "n_query_groups": groups,
        "head_size": head,
        "intermediate_size": size("feed_forward_length"),
        "block_size": size("context_length"),
        "vocab_size": len(tokens),
        "padded_vocab_size": embedding.shape[0],
        "norm_eps": float(f"{file.get(f'{arch}.attention.{eps}', float, 1e-5):.6g}"),  # 1e-5 is no float32
        "rope_base": _whole(file, f"{arch}.rope.freq_base", 10_000),
        "rotary_percentage": share if int(share * head) == rotated else share + 1e-9,
        "rope_adjustments": _rope_adjustments(file, arch, rotated),
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "attn_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def _whole(file: GGUFFile, key: str, default: int) -> int:
    value = file.get(key, float, float(default))
    if value != int(value):
        raise ValueError(f"{key} is {value}; litgpt takes whole numbers")
    return int(value)


def _rope_adjustments(file: GGUFFile, arch: str, rotated: int) -> dict[str, Any] | None:
    """Linear scaling, Llama 3's, or none.

    Raises:
        ValueError: For YaRN, long rope and what is like none of them.
    """
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind not in ("none", "linear") or any(name.startswith("rope_factors_") for name in file.tensors):
        kind = "longrope" if kind in ("none", "linear") else kind
        raise ValueError(f"its positions are scaled by {shown(kind)}, which is not converted")
    freqs = file.tensors.get("rope_freqs.weight")
    factor = file.get(f"{arch}.rope.scaling.factor", float, file.get(f"{arch}.rope.scale_linear", float, 1.0))
    if freqs is None:
        if kind == "none" and f"{arch}.rope.scaling.type" in file.metadata:
            factor = 1.0
        return {"factor": factor} if factor not in (0.0, 1.0) else None
    if freqs.shape != (rotated // 2,):
        raise ValueError(f"rope_freqs.weight has the shape {freqs.shape}, not ({rotated // 2},)")
    found = np.concatenate([rows for _, rows in file.blocks(freqs)]).reshape(-1).astype(np.float64)
    if np.allclose(found, 1.0):
        return None
    adjust = {"factor": round(float(found.max()), 4), **LLAMA3}
    base = _whole(file, f"{arch}.rope.freq_base", 10_000)
    turns = LLAMA3["original_max_seq_len"] / (2 * np.pi) / base ** (np.arange(0, rotated, 2) / rotated)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / adjust["factor"] + smooth), rtol=1e-3):
        raise ValueError("rope_freqs.weight is not Llama 3's scaling of positions, and no other is converted")
    return adjust


# -- one function an architecture: what differs from Llama -------------------------------------------------------------


def _llama(file: GGUFFile) -> dict[str, Any]:
    return {}


def _qwen2(file: GGUFFile) -> dict[str, Any]:
    return {"attn_bias": True}


def _qwen3(file: GGUFFile) -> dict[str, Any]:
    return {"norm_qk": True}


def _gemma(file: GGUFFile) -> dict[str, Any]:
    return {"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True}


def _later_gemma(file: GGUFFile, arch: str, local_layers: Callable[[int], bool]) -> dict[str, Any]:
    """What Gemma 2 and 3 share: sliding windows, post norms, the scale of scores."""
    common = _common(file, arch)
    layers = common["n_layer"]
    check_value("n_layer", layers)  # before a list of so many is made
    wide = layers == GEMMA_27B_LAYERS[arch]
    return {
        **_gemma(file),
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "sliding_window_size": file.need(f"{arch}.attention.sliding_window", int),
        "sliding_window_indices": [int(local_layers(layer)) for layer in range(layers)],
        "attention_scores_scalar": common["n_embd"] // common["n_head"] if wide else common["head_size"],
    }


def _gemma2(file: GGUFFile) -> dict[str, Any]:
    return {
        **_later_gemma(file, "gemma2", lambda layer: layer % 2 == 0),
        "attention_logit_softcapping": file.get("gemma2.attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": file.get("gemma2.final_logit_softcapping", float, 30.0),
    }


def _gemma3(file: GGUFFile) -> dict[str, Any]:
    values = _later_gemma(file, "gemma3", lambda layer: (layer + 1) % 6 != 0)
    return {
        **values,
        "norm_qk": True,
        "rope_local_base_freq": file.get("gemma3.rope.freq_base_swa", float, 10_000.0),
        "rope_indices": values["sliding_window_indices"],
        "rope_base": _whole(file, "gemma3.rope.freq_base", 1_000_000),
        "final_logit_softcapping": file.get("gemma3.final_logit_softcapping", float),
    }


def _phi2(file: GGUFFile) -> dict[str, Any]:
    return {
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "GptNeoxMLP",
        "gelu_approximate": "tanh",
        "parallel_residual": True,
        "shared_attention_norm": True,
        "bias": True,
        "attn_bias": False,  # `bias` is for all
        "lm_head_bias": True,
    }


def _phi3(file: GGUFFile) -> dict[str, Any]:
    window = file.get("phi3.attention.sliding_window", int, 0)
    return {"sliding_window_size": window} if window else {}


ARCHITECTURES: dict[str, Callable[[GGUFFile], dict[str, Any]]] = {
    "llama": _llama,  # Llama, SmolLM, Mistral, TinyLlama, Yi and others
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi2": _phi2,  # Phi 1, 1.5 and 2
    "phi3": _phi3,  # Phi 3 and 4
}


# -- names -------------------------------------------------------------------------------------------------------------


def _fits_name(arch: str, name: str) -> bool:
    """Whether a name gives the norms of this architecture: litgpt chooses them by the name."""
    return ("gemma" in name.lower()) == arch.startswith("gemma") and "olmo" not in name.lower()


def _own_name(file: GGUFFile, arch: str) -> str:
    given = re.sub(r"[^A-Za-z0-9._-]+", "-", file.get("general.name", str, "") or "").strip("-.")[:60]
    given = re.sub("gemma|olmo", "model", given, flags=re.IGNORECASE)
    return f"{'Gemma' if arch.startswith('gemma') else arch}-{given or 'model'}"


def _named(file: GGUFFile, arch: str, config: Config) -> dict[str, Any] | None:
    """The entry of litgpt's list that has these sizes; the most similar name among several."""
    wanted = [file.get(f"general.{key}", str, "") or "" for key in ("name", "basename", "finetune")]
    chat = "tokenizer.chat_template" in file.metadata

    def likeness(entry: dict[str, Any]) -> tuple[bool, float, int]:
        name = entry["name"]
        ratio = difflib.SequenceMatcher(None, name.lower(), " ".join(wanted[:1]).lower()).ratio()
        return bool(INSTRUCT.search(name)) == chat, ratio, -len(name)

    found = [
        entry
        for entry in configs
        if entry.get("n_layer", Config.n_layer) == config.n_layer
        and _fits_name(arch, entry["name"])
        and all(getattr(known, name) == getattr(config, name) for known in [Config(**entry)] for name in SAME)
    ]
    return max(found, key=likeness, default=None)
