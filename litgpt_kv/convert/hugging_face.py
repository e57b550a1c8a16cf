"""litgpt's config from a Hugging Face folder's config.json: a named one of the same sizes, else one of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litgpt.config import Config, name_to_config
from litgpt_kv.config import shown
from litgpt_kv.llm.check_config import check_config, check_value

SIZES = {  # config.json's names and litgpt's
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_query_groups",
    "head_dim": "head_size",
    "intermediate_size": "intermediate_size",
}
PREFIXES = {"qwen2": "Qwen2.5", "qwen3": "Qwen3", "llama": "", "mistral": ""}  # by which litgpt picks its converter
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_sizes(data: Mapping[str, Any], named: Mapping[str, Any], where: str, name: str) -> None:
    """Check that a named config has the sizes of a config.json.

    Args:
        data: The content of config.json.
        named: The config.
        where: The path of config.json, for the message.
        name: The name of the config.

    Raises:
        ValueError: With the first size that differs, and the names of configs of the right sizes.
    """
    config = Config(**named)
    for key, own in {**SIZES, "vocab_size": "padded_vocab_size"}.items():
        value, expected = data.get(key), getattr(config, own)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if value > expected if key == "vocab_size" else value != expected:
            others = same_sizes(data)
            hint = f" Configs of these sizes: {', '.join(others[:5])}." if others else ""
            raise ValueError(
                f"{where} has {key} {value}, the config {name!r} has {expected}: another --model-name.{hint}"
            )


def same_sizes(data: Mapping[str, Any]) -> list[str]:
    """Return the names of litgpt's configs whose sizes, vocabulary and rope base are those of a config.json."""
    found = []
    for name, named in name_to_config.items():
        config = Config(**named)
        given = {own: data[key] for key, own in SIZES.items() if data.get(key) is not None}
        base = data.get("rope_theta", data.get("rotary_emb_base"))
        same = len(given) > 2 and all(getattr(config, own) == value for own, value in given.items())
        vocabulary = data.get("vocab_size")
        same = same and isinstance(vocabulary, int) and vocabulary in (config.vocab_size, config.padded_vocab_size)
        if same and (base is None or config.rope_base == base):
            found.append(name)
    return found


def config_of(data: Mapping[str, Any], folder: str) -> tuple[str, dict[str, Any] | None]:
    """Return the name of litgpt's config for a config.json, and its values if litgpt does not have it.

    Args:
        data: The content of config.json.
        folder: The name of the folder, which a config of its own gets.

    Raises:
        ValueError: If litgpt cannot express the model, or values are missing, wrong or contradictory.
    """
    if names := same_sizes(data):
        close = [name for name in names if name.lower() in folder.lower() or folder.lower() in name.lower()]
        return (close or names)[0], None
    kind = data.get("model_type")
    if kind not in PREFIXES:
        known = ", ".join(PREFIXES)
        raise ValueError(
            f"{folder!r} is not a supported config name, and no config has the sizes of config.json, whose model_type "
            f"is {shown(kind)}: of {known} a config can be made; others need --model-name."
        )
    if data.get("num_experts") or data.get("num_local_experts"):
        raise ValueError("config.json has a mixture of experts, of which no config can be made: give --model-name.")
    values = _values(data, kind)
    for key, value in values.items():
        check_value(key, value)
    prefix = PREFIXES[kind]
    name = folder if folder.lower().startswith(prefix.lower()) else f"{prefix}-{folder}"
    values |= {"name": name, "hf_config": {}}
    try:
        check_config(Config(**values))
    except AssertionError as error:
        raise ValueError(f"config.json cannot be used: its sizes contradict each other. {error}".strip()) from error
    return name, values


def _values(data: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the fields of litgpt's Config from the numbers of a config.json of Llama's family."""
    missing = [
        key for key in SIZES if key not in ("head_dim", "num_key_value_heads") and not isinstance(data.get(key), int)
    ]
    if missing or not isinstance(data.get("vocab_size"), int):
        raise ValueError(f"config.json has no number {(missing or ['vocab_size'])[0]!r}.")
    if data.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json has hidden_act {shown(data['hidden_act'])}; litgpt's LLaMAMLP has silu.")
    if data.get("mlp_bias"):
        raise ValueError("config.json has mlp_bias, which litgpt's models of Llama's family have not.")
    heads = data["num_attention_heads"]
    if heads < 1:
        raise ValueError(f"config.json has num_attention_heads {heads}.")
    parameters = data.get("rope_parameters") or {}
    base = data.get("rope_theta", parameters.get("rope_theta", 10_000))
    values = {own: data[key] for key, own in SIZES.items() if data.get(key) is not None}
    values |= {"n_query_groups": data.get("num_key_value_heads") or heads}
    values |= {"head_size": data.get("head_dim") or data["hidden_size"] // heads}
    values |= {"vocab_size": data["vocab_size"], "padded_vocab_size": data["vocab_size"]}
    values |= {"block_size": data.get("max_position_embeddings", 2048), "rope_base": int(base)}
    values |= {"norm_eps": data.get("rms_norm_eps", 1e-6), "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP"}
    values |= {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False}
    values |= {"attn_bias": kind == "qwen2" or bool(data.get("attention_bias")), "norm_qk": kind == "qwen3"}
    values |= {"rope_adjustments": _rope(data.get("rope_scaling") or parameters)}
    if data.get("sliding_window") and data.get("use_sliding_window", kind == "mistral"):
        values |= {"sliding_window_size": data["sliding_window"]}
    return values


def _rope(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return {"factor": scaling["factor"]}
    if kind == "llama3" and all(key in scaling for key in LLAMA3_ROPE):
        values = {key: scaling[key] for key in LLAMA3_ROPE[:3]}
        return values | {"original_max_seq_len": scaling[LLAMA3_ROPE[3]]}
    raise ValueError(f"config.json scales positions by {shown(kind)}, of which no config can be made.")
