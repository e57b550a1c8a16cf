"""YaRN's rope tables as its paper and Hugging Face have them; litgpt's blend the other way round.

N table length · E rotated elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.model import build_rope_cache, yarn_get_mscale


def is_yarn(config: Config) -> bool:
    """Whether a config's rotary embedding is YaRN's."""
    adjust = config.rope_adjustments or {}
    return "beta_fast" in adjust and "beta_slow" in adjust


def yarn_theta(config: Config, device: torch.device | None = None) -> tuple[Tensor, float]:
    """What one position turns each pair, (ceil(E / 2),) float32 radians, and the amplitude of cos and sin.

    Fast pairs, which turn more than `beta_fast` times within the original context, keep their angle; slow ones, which
    turn less than `beta_slow` times, have it divided by `factor`; between the two it is blended linearly. litgpt's
    `build_rope_cache` does the opposite: it slows the fast pairs, by which a model tells neighbours apart, and leaves
    the slow ones, which then leave the range that they were trained in. It also cuts the ramp off at the last pair and
    takes 1 for the amplitude where neither `mscale` nor `mscale_all_dim` is given. No config that litgpt names uses
    YaRN.

    Source: Peng et al. 2023, YaRN, arXiv 2309.00071; `_compute_yarn_parameters` of Hugging Face's transformers.
    """
    adjust, n, base = config.rope_adjustments, config.rope_n_elem, config.rope_base
    factor, context = adjust["factor"], adjust["original_max_seq_len"]
    mscale, mscale_all_dim = adjust.get("mscale"), adjust.get("mscale_all_dim")
    amplitude = adjust.get("attention_factor")
    if amplitude is None and mscale and mscale_all_dim:
        amplitude = yarn_get_mscale(factor, mscale) / yarn_get_mscale(factor, mscale_all_dim)
    elif amplitude is None:
        amplitude = yarn_get_mscale(factor)

    def pair_that_turns(times: float) -> float:  # within the original context
        return n * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(adjust["beta_fast"]), pair_that_turns(adjust["beta_slow"])
    if adjust.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    theta = 1.0 / base ** (torch.arange(0, n, 2, device=device).float() / n)
    pairs = torch.arange(len(theta), dtype=torch.float32, device=device)
    slowed = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return theta / factor * slowed + theta * (1 - slowed), amplitude


def yarn_tables(config: Config, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos, sin (N, E) float32 of `length` positions, (N, E, 2) with a second, local base, which is never adjusted."""
    theta, amplitude = yarn_theta(config, device)
    n, condense, local = config.rope_n_elem, config.rope_condense_ratio, config.rope_local_base_freq
    pos = torch.arange(length, device=device).float() / condense
    angle = torch.outer(pos, theta).repeat(1, 2)
    angle = angle[:, :n] if n > 1 else angle  # litgpt's odd sizes: two columns for a single element
    tables = angle.cos() * amplitude, angle.sin() * amplitude
    if local is None:
        return tables
    others = build_rope_cache(length, n, device, base=local, condense_ratio=condense)
    return tuple(torch.stack(pair, dim=-1) for pair in zip(tables, others))  # type: ignore[return-value]
