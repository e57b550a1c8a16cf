"""Attention as pure functions: no cache, no module, no state.

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
from litgpt_kv.attention.masks import visible

MASS_BLOCK = 128  # queries a block: small blocks stay in the processor's cache (302 ms against 480 ms with 256)


class CausalMasks:
    """The masks of one pass over whole sequences, each made once and shared by all layers that ask for the same."""

    def __init__(self) -> None:
        self._made: dict[tuple, Tensor] = {}

    def of(self, q: Tensor, softcap: float | None, window: int | None) -> Tensor | None:
        """What is added to the scores (T, T) of q (B, H, T, D): 0 or, where hidden, a least value; None: plain causal.

        A window at least as long as the sequence hides nothing more than causality does.
        """
        T = q.size(2)
        if softcap is None and (window is None or T <= window):
            return None
        key = (T, window, q.dtype, q.device)
        if key not in self._made:
            pos = torch.arange(T, device=q.device)
            fill = torch.finfo(q.dtype).min if window is None else float("-inf")
            zeros = torch.zeros(T, T, dtype=q.dtype, device=q.device)
            self._made[key] = zeros.masked_fill_(~visible(pos, pos, window), fill)
        return self._made[key]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    masks: CausalMasks | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Causal attention of a whole sequence to itself: training and prefill, the same numbers as litgpt's to the bit.

    Without a window no mask tensor is made, so that the fast causal kernel runs.

    Args:
        q: (B, H, T, D) rotated queries. k, v: (B, G, T, D) and (B, G, T, Dv).
        scale: Multiplies the scores. softcap: tanh-bounds them. window: sliding window in tokens, or None.
        masks: Of this pass, shared by its layers.
        last: (B,) positions of the only query of each row, q then being (B, H, 1, D); None: all of them.

    Returns:
        (B, H, T, Dv), or (B, H, 1, Dv) with `last`.
    """
    if last is not None:
        mask = visible(last.view(-1, 1, 1), torch.arange(k.size(2), device=k.device), window)  # (B, 1, 1, T)
        return slot_attention(q, k, v, mask, scale=scale, softcap=softcap)[0]
    per_group = q.size(1) // k.size(1)
    if per_group > 1:
        k, v = k.repeat_interleave(per_group, dim=1), v.repeat_interleave(per_group, dim=1)  # (B, H, T, D)
    mask = (masks or CausalMasks()).of(q, softcap, window)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    scores = do_softcapping(q @ k.mT * scale, softcap) + mask
    return F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def queries_at(q: Tensor, pos: Tensor) -> Tensor:
    """One query a row: q (B, H, T, D) at pos (B,) is (B, H, 1, D)."""
    return q.gather(2, pos.view(-1, 1, 1, 1).expand(-1, q.size(1), 1, q.size(-1)))


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
    if softcap is None and sink_queries is None and not want and not latent:
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
        return x @ self.data[:, :, :extent].to(x.dtype).mT

    def sums(self, p: Tensor, extent: int) -> Tensor:
        return p.to(self.data.dtype) @ self.data[:, :, :extent]


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


@torch.no_grad()
def received_attention(
    q: Tensor,
    k: Tensor,
    length: Tensor,
    last: int = -1,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    start: int = 0,
) -> Tensor:
    """Sum the attention that each prompt token receives from the queries of its row, in blocks of queries.

    Never holds a T×T tensor: the largest is (B, H, MASS_BLOCK, N).

    Args:
        q, k: (B, H, T, D) queries and (B, G, N, D) keys of right-padded prompts; N is T but for a piece of a prompt.
        length: (B,) real tokens of each row.
        last: How many last real queries of a row count; -1: all.
        start: Position of the first query: a piece of a prompt attends to `start` tokens before it.

    Returns:
        (B, G, N), summed over queries, averaged over the query heads of a group; float32 (float64 for a float64 model).
    """
    B, H, T, D = q.shape
    G, N = k.shape[1:3]
    exact = torch.promote_types(q.dtype, torch.float32)
    k, key_pos = k.to(exact), torch.arange(N, device=q.device).expand(B, N)
    in_order = not 0 <= last < T
    query_pos = key_pos[:, start : start + T]
    if not in_order:  # gather each row's own last queries; rows shorter than `last` leave entries below 0
        query_pos = length.unsqueeze(1) - last + torch.arange(last, device=q.device)  # (B, last)
        index = (query_pos - start).clamp(0, T - 1).view(B, 1, -1, 1).expand(B, H, last, D)
        q = q.gather(2, index)
    counts = ((query_pos >= start) & (query_pos < length.unsqueeze(1)) & (query_pos < start + T)).to(exact) / (H // G)
    total = torch.zeros(B, G, N, dtype=exact, device=q.device)
    q = q.to(exact).unflatten(1, (G, H // G)) * scale  # (B, G, R, Q, D)
    with torch.autocast(q.device.type, enabled=False):
        for first in range(0, query_pos.size(1), MASS_BLOCK):
            rows = slice(first, first + MASS_BLOCK)
            whole = in_order and window is None  # then only the last keys can be in a query's future
            n, past = (min(start + first + MASS_BLOCK, N), start + first) if whole else (N, 0)
            weight = counts[:, rows]  # (B, b)
            scores = q[:, :, :, rows].flatten(2, 3) @ k[:, :, :n].mT  # (B, G, R*b, n)
            if softcap is not None:
                scores = do_softcapping(scores, softcap)
            # a query outside the prompt counts nothing; letting it see every key keeps its softmax finite
            hidden = ~visible(query_pos[:, rows], key_pos[:, past:n], window) & (weight[..., None] > 0)
            scores.unflatten(2, (H // G, -1))[..., past:].masked_fill_(hidden[:, None, None], float("-inf"))
            total[:, :, :n] += (weight.repeat(1, H // G)[:, None, None] @ scores.softmax(dim=-1)).squeeze(2)
    return total
