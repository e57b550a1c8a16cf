"""Multi-head latent attention by its plain formula, for the naive reference: every head's keys and values written out.

m new tokens · n tokens so far · H heads · N unrotated and E rotated elements of a query · W of a value · R of a latent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.oracle.reference import Oracle


def latent_attention(oracle: Oracle, layer: int, x: Tensor, start: int) -> Tensor:
    """Attention of x (m, C). The oracle's keys of a layer are the shared rotary parts (n, 1, E), unrotated, and its
    values the latents (n, 1, R); all heads keep the same tokens, and a token's score is the mean over them."""
    config, attn, policy = oracle.config, oracle.model.transformer.h[layer].attn, oracle.policies[layer]
    m, H, N, W, R = len(x), config.n_head, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    q = attn.q_b_proj(attn.q_a_norm(attn.q_a_proj(x))).reshape(m, H, config.qk_head_dim)
    compressed = attn.kv_a_proj_with_mqa(x)
    oracle.keys[layer] = torch.cat((oracle.keys[layer], compressed[:, None, R:]))
    oracle.values[layer] = torch.cat((oracle.values[layer], attn.kv_a_norm(compressed[:, :R])[:, None]))
    up = attn.kv_b_proj(oracle.values[layer][:, 0]).reshape(-1, H, N + W)
    oracle.queries[layer] = torch.cat((oracle.queries[layer].reshape(-1, H, q.size(-1)), q))
    scale = attn.mscale**2 / math.sqrt(config.attention_scores_scalar or config.qk_head_dim)
    out = torch.zeros(m, H, W, dtype=torch.float64)
    gained: dict[int, float] = {}
    oracle.make_room(layer, start, m)
    for i, (seen, positions) in enumerate(oracle.visible(layer, 0, start, m)):
        newest = dict.fromkeys(seen, 0.0)
        shared = oracle.rotate(oracle.keys[layer][seen, 0], positions, layer)
        for h in range(H):
            keys = torch.cat((up[seen, h, :N], shared), dim=-1)
            query = torch.cat((q[i, h, :N], oracle.rotate(q[i, h, N:], positions[-1], layer)))
            score = keys @ query * scale
            if (cap := config.attention_logit_softcapping) is not None:
                score = torch.tanh(score / cap) * cap
            probs = torch.exp(score - score.max())
            probs = probs / probs.sum()
            out[i, h] = probs @ up[seen, h, N:]
            for p, prob in zip(seen, probs.tolist()):
                gained[p] = gained.get(p, 0.0) + prob / H
                newest[p] += prob / H
    oracle.note(layer, 0, gained if policy.prefill_scores or start else {}, newest)
    oracle.compress(layer, start, m)
    return attn.proj(out.reshape(m, H * W))
