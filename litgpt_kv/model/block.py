"""litgpt's transformer block with our attention.

B rows · T tokens · C embedding size.
"""

from __future__ import annotations

from torch import Tensor, nn

import litgpt.model as base
from litgpt.config import Config
from litgpt_kv.cache.views import LayerView
from litgpt_kv.model.attention import CausalSelfAttention
from litgpt_kv.model.latent import MultiheadLatentAttention


class Block(base.Block):
    """Attention and MLP around the residual stream. Modules are made in litgpt's order, so a seed gives its weights."""

    attention: type[CausalSelfAttention] = CausalSelfAttention
    latent_attention: type[MultiheadLatentAttention] = MultiheadLatentAttention

    def __init__(self, config: Config, block_idx: int) -> None:
        nn.Module.__init__(self)
        if not config.parallel_residual and config.shared_attention_norm:
            raise NotImplementedError("A shared attention norm goes with a parallel residual only, as in litgpt.")

        def norm() -> nn.Module:
            return config.norm_class(config.n_embd, eps=config.norm_eps)

        attention = self.latent_attention if config.latent_attention else self.attention
        self.norm_1 = norm() if config.norm_1 else nn.Identity()
        self.attn = attention(config, block_idx)
        self.post_attention_norm = norm() if config.post_attention_norm else nn.Identity()
        self.norm_2 = nn.Identity() if not config.norm_2 else None if config.shared_attention_norm else norm()
        self.mlp = config.mlp_class(config)
        if config.first_k_dense_replace is not None and block_idx < config.first_k_dense_replace:
            self.mlp = base.LLaMAMLP(config)
        self.post_mlp_norm = norm() if config.post_mlp_norm else nn.Identity()
        self.config = config

    def forward(self, x: Tensor, view: LayerView) -> Tensor:
        """x (B, T, C) to (B, T, C), or to (B, 1, C) for the `last` tokens of the view alone."""
        normed = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(normed, view))
        if view.last is not None:
            x, normed = (tokens_at(z, view.last) for z in (x, normed))
        if self.config.parallel_residual:
            if not self.config.shared_attention_norm:
                normed = self.norm_2(x)
            x = attended + x
        else:
            x = attended + x
            normed = self.norm_2(x)
        return self.post_mlp_norm(self.mlp(normed)) + x


def tokens_at(x: Tensor, pos: Tensor) -> Tensor:
    """One token a row: x (B, T, C) at pos (B,) is (B, 1, C)."""
    return x.gather(1, pos.view(-1, 1, 1).expand(-1, 1, x.size(-1)))
