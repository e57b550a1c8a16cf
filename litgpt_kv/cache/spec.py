"""What the attention of one layer is, read off litgpt's `Config` once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a list of strategies needs no litgpt, which takes seconds to import
    from litgpt.config import Config


@dataclass(frozen=True)
class LayerSpec:
    """The static facts of one attention layer that its cache, its strategy and its attention share.

    With `latent`, multi-head latent attention, a token's cached key is the rotary part that all heads share, and its
    value is the latent that their keys and values are made of: queries meet both, and there is one group.

    Attributes:
        index: Number of the layer, from 0.
        heads: Query heads, H. groups: Key/value heads, G.
        key_size, value_size: Widths of a cached key and value.
        rope_size: How many leading elements of a key are rotated.
        scale: Multiplies the scores. softcap: Bounds them by tanh, or None.
        window: Sliding window in tokens, or None.
        latent: Whether this is multi-head latent attention.
    """

    index: int
    heads: int
    groups: int
    key_size: int
    value_size: int
    rope_size: int
    scale: float
    softcap: float | None
    window: int | None
    latent: bool = False


def layer_spec(config: Config, index: int) -> LayerSpec:
    """Read the `LayerSpec` of layer `index` (from 0) off litgpt's `Config`."""
    from litgpt.model import yarn_get_mscale

    adjust = config.rope_adjustments or {}
    factor, mscale_all_dim = adjust.get("factor"), adjust.get("mscale_all_dim")
    mscale = yarn_get_mscale(factor, mscale_all_dim) if factor and mscale_all_dim else 1.0
    latent = bool(config.latent_attention)
    width = config.qk_head_dim if latent else config.head_size
    sliding = config.sliding_window_size is not None and config.sliding_window_indices is not None
    sliding = sliding and not latent  # litgpt's latent attention knows no window
    return LayerSpec(
        index=index,
        heads=config.n_head,
        groups=1 if latent else config.n_query_groups,
        # litgpt's rope table keeps two columns for a single rotated element, and its keys grow by one
        key_size=(config.qk_rope_head_dim if latent else width) + (config.rope_n_elem == 1),
        value_size=config.kv_lora_rank if latent else width,
        rope_size=config.rope_n_elem,
        scale=1.0 / math.sqrt(config.attention_scores_scalar or width) * mscale * mscale,  # in litgpt's order
        softcap=config.attention_logit_softcapping,
        window=config.sliding_window_size if sliding and config.sliding_window_indices[index] else None,
        latent=latent,
    )
