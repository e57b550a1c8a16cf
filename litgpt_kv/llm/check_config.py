"""Check the types and sizes in a model's config before the model is built."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from litgpt.config import Config
from litgpt_kv.config import shown
from litgpt_kv.llm.safe_load import one_line, read_yaml

HINTS = get_type_hints(Config)
MOST = 2**31 - 1  # the limit of all other numbers
# Some times as large as the largest published models: a damaged digit is found before it costs memory or time.
LIMITS = {
    "n_layer": 2_000,
    "block_size": 2**27,
    "n_embd": 2**20,
    "n_head": 2**14,
    "n_query_groups": 2**14,
    "head_size": 2**16,
    "vocab_size": 2**24,
    "padded_vocab_size": 2**24,
    "padding_multiple": 2**20,
    "intermediate_size": 2**24,
    "moe_intermediate_size": 2**24,
    "n_expert": 2**14,
    "n_expert_per_token": 2**14,
    "n_shared_expert": 2**14,
}
MOST_EXPERTS = 2**16  # in all layers together
POSITIVE = {*LIMITS, "sliding_window_size", "rope_base", "rope_condense_ratio", "norm_eps", "attention_scores_scalar"}
POSITIVE -= {"n_expert", "n_expert_per_token", "n_shared_expert"}
POSITIVE |= {"attention_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq"}


def read_config(path: Path) -> Config:
    """Read the config in a `model_config.yaml`.

    Raises:
        ValueError: If the file is not YAML, or a value is unknown, of the wrong type or out of range.
    """
    data = read_yaml(path)
    try:
        if not isinstance(data, dict):
            raise ValueError("it is not a mapping of settings")
        if unknown := sorted(data.keys() - HINTS.keys()):
            raise ValueError(f"litgpt's Config has no {unknown[0]!r}")
        for name, value in data.items():
            check_value(name, value)
        config = Config(**data)
        check_config(config)
    except AssertionError as error:
        raise ValueError(f"{path} cannot be used: its sizes contradict each other. {error}".strip()) from error
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {one_line(error)}.") from error
    return config


def check_value(name: str, value: Any) -> None:
    """Check the type of one value against litgpt's annotation, and its range.

    Raises:
        ValueError: With the name, the value and the limit.
    """
    if not _fits(value, HINTS[name]):
        hint = str(HINTS[name]).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
        raise ValueError(f"{name} must be {hint}, got {shown(value)}")
    for number in _numbers(value):
        if not abs(number) <= (most := LIMITS.get(name, MOST)):  # written so that NaN is refused, too
            raise ValueError(f"{name} is over the limit of {most:,}: {shown(number)}")
        if number < 0 or (number == 0 and name in POSITIVE):
            raise ValueError(f"{name} must be {'positive' if name in POSITIVE else '0 or more'}, got {number}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _numbers(value: Any) -> list[int | float]:
    """Return the numbers in a value, those of lists and mappings included."""
    if isinstance(value, bool):
        return []
    if isinstance(value, (int, float)):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [number for item in value for number in _numbers(item)] if isinstance(value, list) else []


def check_config(config: Config) -> None:
    """Check that values agree with each other, where litgpt does not do so before it builds a model.

    Raises:
        ValueError: With the values and the error.
    """
    experts = config.n_layer * config.n_expert
    if experts > MOST_EXPERTS:
        raise ValueError(f"n_layer x n_expert is {experts:,}, over the limit of {MOST_EXPERTS:,} experts")
    if config.n_expert_per_token > config.n_expert:
        raise ValueError(f"n_expert_per_token {config.n_expert_per_token} is more than n_expert {config.n_expert}")
    if not 0 <= config.rotary_percentage <= 1:
        raise ValueError(f"rotary_percentage must be 0 to 1, got {config.rotary_percentage}")
    if config.mlp_class_name == "LLaMAMoE" and not config.n_expert:
        raise ValueError("mlp_class_name 'LLaMAMoE' needs n_expert")
    for name in ("sliding_window_indices", "rope_indices"):
        indices = getattr(config, name)
        if indices is not None and len(indices) < config.n_layer:
            raise ValueError(f"{name} has {len(indices)} values for {config.n_layer} layers")
        if indices is not None and not all(index in (0, 1) for index in indices):
            raise ValueError(f"{name} must be 0 or 1 a layer, got {shown(indices)}")
