"""litgpt's attention module with one forward: project, let the layer's view attend, project back.

B rows · T tokens · H query heads · G key/value heads · D head size · C embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor

import litgpt.model as base
from litgpt.config import Config
from litgpt_kv.attention.rope import deinterleave
from litgpt_kv.cache.spec import layer_spec
from litgpt_kv.cache.views import LayerView


class CausalSelfAttention(base.CausalSelfAttention):
    """Attention of one layer. Parameters and their names are litgpt's."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        self.spec = layer_spec(config, block_idx)

    def forward(self, x: Tensor, view: LayerView) -> Tensor:
        """x (B, T, C) to (B, T, C), or to (B, 1, C) for the `last` tokens of the view alone."""
        q, k, v = self.project(x)
        return self.proj(view.attend(q, k, v).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) to unrotated queries (B, H, T, D) and keys (B, G, T, D), and values (B, G, T, D)."""
        config, size = self.config, self.config.head_size
        H, G = config.n_head, config.n_query_groups
        qkv = self.qkv(x)
        if config.norm_qk and config.norm_qk_type == "olmo2":  # over the whole projection
            q, k, v = qkv.split((H * size, G * size, G * size), dim=-1)
            qkv = torch.cat((self.norm_q(q), self.norm_k(k), v), dim=-1)
        q, k, v = qkv.unflatten(-1, (H + 2 * G, size)).transpose(1, 2).split((H, G, G), dim=1)
        if config.norm_qk and config.norm_qk_type == "default":  # a head at a time
            q, k = self.norm_q(q), self.norm_k(k)
        if config.rope_interleave:
            q, k = deinterleave(q, config.rope_n_elem), deinterleave(k, config.rope_n_elem)
        return q, k, v
