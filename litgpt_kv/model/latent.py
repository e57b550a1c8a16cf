"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): a token is cached as one latent and one rotary key.

Keys and values of all heads are linear maps of the latent, so new tokens never write them out: the map of the keys is
applied to the query instead, and that of the values to what the attention returns. Decoding is then attention of all
heads to one group whose keys and values are the latents, plus a rotary part that the heads share.

B rows · T tokens · H query heads · K unrotated and E rotated elements of a query · R of a latent · W of a head's
value · C embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import litgpt.model as base
from litgpt.config import Config
from litgpt_kv.attention.rope import deinterleave
from litgpt_kv.cache.spec import layer_spec
from litgpt_kv.cache.views import LayerView
from litgpt_kv.model.linear import Linear


class MultiheadLatentAttention(base.MultiheadLatentAttention):
    """litgpt's module: a whole sequence by its formula, to the bit; new tokens with the up-projections absorbed."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        self.spec = layer_spec(config, block_idx)

    def forward(self, x: Tensor, view: LayerView) -> Tensor:
        """x (B, T, C) to (B, T, C), or to (B, 1, C) for the `last` tokens of the view alone."""
        q, k, latent = self.project(x)
        return self.proj(view.attend(q, k, latent, UpProjection(self)).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) to unrotated queries (B, H, T, E + K), keys (B, 1, T, E) and latents (B, 1, T, R).

        The rotary part of a query stands first.
        """
        config = self.config
        rope = config.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.spec.heads, config.qk_head_dim)).transpose(1, 2)  # (B, H, T, K + E)
        q_pass, q_rope = q.split((config.qk_nope_head_dim, rope), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).unsqueeze(1).split((config.kv_lora_rank, rope), dim=-1)
        if config.rope_interleave:
            q_rope, k_rope = deinterleave(q_rope, rope), deinterleave(k_rope, rope)
        return torch.cat((q_rope, q_pass), dim=-1), k_rope, self.kv_a_norm(latent)

    def up_projection(self) -> tuple[Tensor, Tensor | None]:
        """The weight (H * (K + W), R) and bias of `kv_b_proj`; of a quantized or adapted layer, what it amounts to."""
        layer = self.kv_b_proj
        if type(layer) in (nn.Linear, Linear):
            return layer.weight, layer.bias
        like = self.kv_a_norm.weight
        bias = layer(torch.zeros_like(like).unsqueeze(0))
        return (layer(torch.diag(torch.ones_like(like))) - bias).mT, bias.squeeze(0)


class UpProjection:
    """What latents become: the `LatentProjection` of one layer in one pass."""

    def __init__(self, attn: MultiheadLatentAttention) -> None:
        self.attn, self.spec = attn, attn.spec
        self.widths = (attn.config.qk_nope_head_dim, attn.config.v_head_dim)
        self._split: tuple | None = None

    @property
    def bias(self) -> bool:
        """A bias of the keys adds the same to all scores of a query: lost in a softmax, but not in a tanh before it."""
        return self._weights()[2] is not None and self.spec.softcap is not None

    def expand(self, q: Tensor, k: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, H, T, K + E) and values (B, H, T, W) of every head, in litgpt's order of elements.

        Args:
            q: (B, H, T, E + K) rotated. k: (B, 1, T, E) rotated. latent: (B, 1, T, R).
        """
        rope, heads = q.size(-1) - self.widths[0], self.spec.heads  # a single rotated element has become two
        kv = self.attn.kv_b_proj(latent.squeeze(1)).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, T, K + W)
        k_pass, v = kv.split(self.widths, dim=-1)
        q = torch.cat((q[..., rope:], q[..., :rope]), dim=-1)
        return q, torch.cat((k_pass, k.expand(-1, heads, -1, -1)), dim=-1), v

    def absorb(self, q: Tensor) -> Tensor:
        """Bring queries (B, H, T, E + K) to where latents are: (B, H, T, E + R), and one element for a `bias`."""
        rope = q.size(-1) - self.widths[0]  # a single rotated element may have become two
        q_rope, q_pass = q[..., :rope], q[..., rope:]
        w_key, _, b_key, _ = self._weights()
        parts = [q_rope, torch.einsum("bhtk,hkr->bhtr", q_pass, w_key)]
        if self.bias:
            parts.append(q_pass @ b_key.unsqueeze(-1))
        return torch.cat(parts, dim=-1)

    def output(self, y: Tensor) -> Tensor:
        """From what attention made of latents, (B, H, T, R), to values (B, H, T, W)."""
        _, w_value, _, b_value = self._weights()
        y = torch.einsum("bhtr,hwr->bhtw", y, w_value)
        return y if b_value is None else y + b_value.unsqueeze(1)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Up-projections of keys (H, K, R) and values (H, W, R), and their biases (H, K) and (H, W) or None."""
        if self._split is None:
            weight, bias = self.attn.up_projection()
            w_key, w_value = weight.unflatten(0, (self.spec.heads, -1)).split(self.widths, dim=1)
            b_key = b_value = None
            if bias is not None:
                b_key, b_value = bias.unflatten(0, (self.spec.heads, -1)).split(self.widths, dim=1)
            self._split = w_key, w_value, b_key, b_value
        return self._split
