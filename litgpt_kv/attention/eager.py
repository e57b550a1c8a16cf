"""Attention to cached slots as pure functions: no cache, no module, no state.

B rows · T new tokens · S slots · H query heads · G key/value heads · R = H/G query heads a group · D head size ·
P sets of kept tokens (1, or one a key/value head).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.model import do_softcapping
from litgpt_kv.attention.balanced import heads_left_over, scores_of, weighted_sums


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sink_queries: tuple[Tensor, Tensor] | None = None,
    want: Sequence[str] = (),
    per_group: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attend from a few new queries to cached slots, and say how much attention each slot received.

    The R query heads of a group are folded along the query axis, so K and V are read once and never copied.

    Args:
        q: (B, H, T, D) queries. k, v: (B, G, S, D) and (B, G, S, Dv). Latent attention scores a token by its key and
            its value: q is then (B, H, T, D + Dv), what meets k first.
        mask: Boolean, True where a query may attend: (B, P, T, S), or (B, G, R*T, S) where query heads of a group see
            different slots. None where every query sees every slot.
        scale: Multiplies the scores. softcap: Bounds them by tanh.
        sink_queries: (q2, where): use the queries q2 (B, H, T, D) instead of q for those of the first n slots that are
            marked in `where` (B, P, n).
        want: What to return besides: "mass" (attention received from all T queries), "last" (from the last of them).
        per_group: Query heads that share a slot; None: R = H / G.

    Returns:
        (B, H, T, Dv), and what was wanted by name, (B, G, S), averaged over the query heads that share a slot, in
        float32 (float64 for a float64 model).
    """
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    R = H // G
    q = q.reshape(B, G, R * T, -1)
    latent = q.size(-1) > k.size(-1)
    if mask is not None and mask.size(-2) == T and T > 1 and R > 1:
        mask = mask.unsqueeze(2).expand(-1, -1, R, -1, -1).reshape(B, -1, R * T, S)
    # no kernel takes keys in two parts; joining them for one takes longer than the products below (CPU: up to twice)
    plain = softcap is None and sink_queries is None and not want and not latent
    if plain and not (T == 1 and heads_left_over(k, R)):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return y.view(B, H, T, -1), {}
    y, received = product_attention(
        q,
        Rows(k),
        Rows(v),
        mask,
        extent=S,
        key_size=k.size(-1),
        scale=scale,
        softcap=softcap,
        sink_queries=sink_queries,
        want=want,
        per_group=per_group or R,
        tokens=T,
    )
    return y.view(B, H, T, -1), received


class Factors(Protocol):
    """Keys or values as attention uses them: by their products alone."""

    def products(self, x: Tensor, extent: int) -> Tensor:
        """x (B, G, M, D) with each of the first `extent` slots, (B, G, M, extent), float32 at least."""

    def sums(self, p: Tensor, extent: int) -> Tensor:
        """The first `extent` slots, weighted by p (B, G, M, extent): (B, G, M, D)."""


class Rows:
    """`Factors` that are a tensor (B, G, S, D)."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def products(self, x: Tensor, extent: int) -> Tensor:
        return scores_of(x, self.data[:, :, :extent].to(x.dtype))

    def sums(self, p: Tensor, extent: int) -> Tensor:
        return weighted_sums(p.to(self.data.dtype), self.data[:, :, :extent])


def product_attention(
    q: Tensor,
    keys: Factors,
    values: Factors,
    mask: Tensor | None,
    *,
    extent: int,
    key_size: int,
    scale: float,
    softcap: float | None,
    sink_queries: tuple[Tensor, Tensor] | None,
    want: Sequence[str],
    per_group: int,
    tokens: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attend by products alone: `slot_attention` written out.

    Args:
        q: (B, G, M, D) queries of the groups' heads and tokens, M = R*T; wider than `key_size` for latent attention.
        mask: (B, P, M, S) as in `slot_attention`, or None.
        extent: Slots, S. tokens: T. The rest: see `slot_attention`.

    Returns:
        (B, G, M, Dv), and what was wanted by name, (B, G, S).
    """
    exact, fill = torch.promote_types(q.dtype, torch.float32), q.size()[:3]
    with torch.autocast(q.device.type, enabled=False):  # scores and masses stay float32
        q = q.to(exact) * scale
        scores = keys.products(q[..., :key_size], extent)  # (B, G, M, S)
        if sink_queries is not None:
            q2, where = sink_queries
            n = where.size(-1)
            near = keys.products(q2.reshape(*fill, -1).to(exact) * scale, n)
            scores = torch.cat((torch.where(where.unsqueeze(2), near, scores[..., :n]), scores[..., n:]), dim=-1)
        if q.size(-1) > key_size:
            scores = scores + values.products(q[..., key_size:], extent)
        if softcap is not None:
            scores = do_softcapping(scores, softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(exact).min)  # finite where a row sees nothing at all
        probs = scores.softmax(dim=-1)
        y = values.sums(probs, extent)
    received = {"mass": probs.sum(dim=2) / per_group} if "mass" in want or ("last" in want and tokens == 1) else {}
    if "last" in want:
        last = received["mass"] if tokens == 1 else probs[:, :, tokens - 1 :: tokens].sum(dim=2) / per_group
        received["last"] = last
    return y, {name: received[name] for name in want}
