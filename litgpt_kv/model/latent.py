"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): a token is cached as one latent and one rotary key.

Keys and values of all heads are linear maps of the latent, so new tokens never write them out: the map of the keys is
applied to the query instead, and that of the values to what the attention returns. Decoding is then attention of all
heads to one group whose keys and values are the latents, plus a rotary part that the heads share.

B rows · T new tokens · N keys attended to · H query heads · K unrotated and E rotated elements of a query · R of a
latent · W of a head's value · C embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import litgpt.model as base
from litgpt.config import Config
from litgpt_kv.attention.eager import Masks, attend, attend_last, attend_mass, mass, queries_at
from litgpt_kv.attention.rope import Angles, halves, rotate
from litgpt_kv.cache.layer import Turn
from litgpt_kv.compat.input_pos import dense_cache
from litgpt_kv.config import layer_facts
from litgpt_kv.model.linear import Linear


class MultiheadLatentAttention(base.MultiheadLatentAttention):
    """litgpt's module: a whole sequence by its formula, to the bit; new tokens with the up-projections absorbed."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        self.facts = layer_facts(config, block_idx)

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        turn: Turn | None = None,
        last: Tensor | None = None,
        *litgpts: Any,
        masks: Masks | None = None,
        **named: Any,
    ) -> Tensor:
        """x (B, T, C) to (B, T, C), or to (B, 1, C) for the tokens `last` (B,) alone."""
        if isinstance(angles, Tensor):  # litgpt's arguments: cos, sin, mask, input_pos, input_pos_maxp1
            return super().forward(x, angles, turn, *(() if "mask" in named else (last, *litgpts)), **named)
        parts = self.parts(x)
        y = self.new(*parts, turn) if angles is None else self.whole(*parts, angles, turn, last, masks)  # (B, H, T, W)
        return self.proj(y.transpose(1, 2).flatten(2))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Projects x (B, T, C) to queries (B, H, T, K) and (B, H, T, E), latents (B, 1, T, R) and keys (B, 1, T, E).

        What has E elements is unrotated yet.
        """
        config = self.config
        rope = config.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.facts.heads, config.qk_head_dim)).transpose(1, 2)  # (B, H, T, K + E)
        q_pass, q_turn = q.split((config.qk_nope_head_dim, rope), dim=-1)
        latent, k_turn = self.kv_a_proj_with_mqa(x).unsqueeze(1).split((config.kv_lora_rank, rope), dim=-1)
        if config.rope_interleave:
            q_turn, k_turn = halves(q_turn, rope), halves(k_turn, rope)
        return q_pass, q_turn, self.kv_a_norm(latent), k_turn

    def whole(
        self,
        q_pass: Tensor,
        q_turn: Tensor,
        latent: Tensor,
        k_turn: Tensor,
        angles: Angles,
        turn: Turn | None,
        last: Tensor | None,
        masks: Masks | None,
    ) -> Tensor:
        """A whole sequence, or its tokens `last`, attends to itself; with a turn, it seeds the cache."""
        facts, config = self.facts, self.config
        math = {"scale": facts.scale, "softcap": facts.softcap, "window": facts.window}
        q_turned, k_turned = (rotate(x, angles, facts.rope_size) for x in (q_turn, k_turn))
        kv = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (facts.heads, -1)).transpose(1, 2)  # (B, H, T, K + W)
        k_pass, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        q = torch.cat((q_pass, q_turned), dim=-1)
        k = torch.cat((k_pass, k_turned.expand(-1, facts.heads, -1, -1)), dim=-1)
        if last is None:
            y = attend(q, k, v, **math, masks=masks)
        else:
            one = queries_at(q, last)
            y = attend_last(one, k, v, last, **math)
        if turn is not None:
            layer, step, received = turn.layer, turn.step, None
            if layer.observes:
                received = mass(q, k, step.length, layer.observes, **math).mean(1, keepdim=True)
            if step.kept is None:  # a strategy looks at queries: as they meet what is stored
                q = torch.cat((q_turned, self.absorb(q_pass)[0]), dim=-1)
            layer.seed(step, q, k_turn if layer.raw else k_turned, latent, received)
        return y

    def new(self, q_pass: Tensor, q_turn: Tensor, latent: Tensor, k_turn: Tensor, turn: Turn) -> Tensor:
        """New tokens enter the cache and attend to what it keeps."""
        facts, layer, step = self.facts, turn.layer, turn.step
        size = facts.rope_size
        q, k = rotate(q_turn, turn.angles, size), rotate(k_turn, turn.angles, size)
        far = None if turn.far is None else (rotate(q_turn, turn.far[0], size), turn.far[1])
        absorbed, constant, w_up, b_up = self.absorb(q_pass)
        q = torch.cat((q, absorbed), dim=-1)  # (B, H, T, E + R)
        keys, latents = layer.extend(step, k_turn if layer.raw else k, latent, q)  # (B, 1, N, E), (B, 1, N, R)
        if turn.ranked is not None:
            keys = rotate(keys, turn.keys, size)
        if constant is not None and facts.softcap is not None:  # alike for all keys: lost in a softmax, not in a tanh
            q, latents = torch.cat((q, constant), dim=-1), nn.functional.pad(latents, (0, 1), value=1.0)
        y, received = attend_mass(
            q,
            keys,
            latents,
            turn.mask,
            scale=facts.scale,
            softcap=facts.softcap,
            far=far,
            want_mass=layer.observes != 0,
        )
        if received is not None:
            layer.observe(step, received)
        y = torch.einsum("bhtr,hwr->bhtw", y[..., : facts.value_size], w_up)
        return y if b_up is None else y + b_up.unsqueeze(1)

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> base.KVCache:
        """litgpt's: this layer's part of `GPT.set_kv_cache`. `k` has the rotary parts, `v` the latents."""
        return dense_cache(self, batch_size, max_seq_length, device, dtype)

    def absorb(self, q_pass: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Brings queries (B, H, T, K) to where latents are: their products with a latent are those with its keys.

        Returns:
            (B, H, T, R), what the keys' bias adds to a query's scores (B, H, T, 1) or None, and the up-projection of
            the values, (H, W, R) and its bias (H, W) or None.
        """
        config, heads = self.config, self.facts.heads
        weight, bias = self.up_projection()
        widths = (config.qk_nope_head_dim, config.v_head_dim)
        w_key, w_value = weight.unflatten(0, (heads, -1)).split(widths, dim=1)  # (H, K, R), (H, W, R)
        absorbed, constant, b_value = torch.einsum("bhtk,hkr->bhtr", q_pass, w_key), None, None
        if bias is not None:
            b_key, b_value = bias.unflatten(0, (heads, -1)).split(widths, dim=1)
            constant = q_pass @ b_key.unsqueeze(-1)  # (B, H, T, 1)
        return absorbed, constant, w_value, b_value

    def up_projection(self) -> tuple[Tensor, Tensor | None]:
        """The weight (H * (K + W), R) and bias of `kv_b_proj`; of a quantized or adapted layer, what it amounts to."""
        layer = self.kv_b_proj
        if type(layer) in (nn.Linear, Linear):
            return layer.weight, layer.bias
        like = self.kv_a_norm.weight
        bias = layer(torch.zeros_like(like).unsqueeze(0))
        return (layer(torch.diag(torch.ones_like(like))) - bias).mT, bias.squeeze(0)
