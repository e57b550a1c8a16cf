"""Attention as pure functions: no cache, no module, no state. Floor 1.

B rows · T new tokens · S slots · H query heads · G key/value heads · R = H/G query heads a group · D head size ·
P sets of kept tokens (1, or one a key/value head).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.model import do_softcapping
from litgpt_kv.attention.rope import visible

MASS_BLOCK = 128  # queries a block: small blocks stay in the processor's cache (302 ms against 480 ms with 256)


class Masks:
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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    masks: Masks | None = None,
) -> Tensor:
    """Causal attention of a whole sequence to itself: training and prefill, the same numbers as litgpt's to the bit.

    Without a window no mask tensor is made, so that the fast causal kernel runs.

    Args:
        q: (B, H, T, D) rotated queries. k, v: (B, G, T, D) and (B, G, T, Dv).
        scale: Multiplies the scores. softcap: tanh-bounds them. window: sliding window in tokens, or None.
        masks: Of this pass, shared by its layers.

    Returns:
        (B, H, T, Dv).
    """
    per_group = q.size(1) // k.size(1)
    if per_group > 1:
        k, v = k.repeat_interleave(per_group, dim=1), v.repeat_interleave(per_group, dim=1)  # (B, H, T, D)
    mask = (masks or Masks()).of(q, softcap, window)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    scores = do_softcapping(q @ k.mT * scale, softcap) + mask
    return F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def queries_at(q: Tensor, pos: Tensor) -> Tensor:
    """One query a row: q (B, H, T, D) at pos (B,) is (B, H, 1, D)."""
    return q.gather(2, pos.view(-1, 1, 1, 1).expand(-1, q.size(1), 1, q.size(-1)))


def attend_last(
    q: Tensor, k: Tensor, v: Tensor, last: Tensor, *, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """What `attend` gives at one token a row: q (B, H, 1, D) at the positions last (B,), to (B, H, 1, Dv)."""
    mask = visible(last.view(-1, 1, 1), torch.arange(k.size(2), device=k.device), window)  # (B, 1, 1, T)
    return attend_mass(q, k, v, mask, scale=scale, softcap=softcap)[0]


def attend_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    far: tuple[Tensor, Tensor] | None = None,
    want_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a few new queries to cached slots, and how much attention each slot received.

    The R query heads of a group are folded along the query axis, so K and V are read once and never copied.

    Args:
        q: (B, H, T, D) queries. k, v: (B, G, S, D) and (B, G, S, Dv). Latent attention scores a token by its key and
            its value: q is then (B, H, T, D + Dv), what meets k first.
        mask: (B, P, T, S) boolean, True where a query may attend; None where all may.
        far: (q2, where): use the queries q2 (B, H, T, D) instead of q for those of the first n slots that are marked
            in `where` (B, P, n).
        want_mass: Return the mass as well.

    Returns:
        (B, H, T, Dv), and (B, G, S) the attention summed over the T queries and averaged over the query heads of a
        group, in float32 (float64 for a float64 model), or None.
    """
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    fold = (B, G, H // G * T)
    q = q.reshape(*fold, -1)  # (B, G, R*T, D)
    latent = q.size(-1) > k.size(-1)
    if mask is not None and T > 1:
        mask = mask.unsqueeze(2).expand(-1, -1, H // G, -1, -1).reshape(B, -1, H // G * T, S)
    # no kernel takes keys in two parts; joining them for one takes longer than the products below (CPU: up to twice)
    if softcap is None and far is None and not want_mass and not latent:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return y.view(B, H, T, -1), None
    exact = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # scores and masses stay float32
        keys, q = k.to(exact).mT, q.to(exact) * scale
        scores = q[..., : k.size(-1)] @ keys  # (B, G, R*T, S)
        if far is not None:
            n = far[1].size(-1)
            distant = (far[0].reshape(*fold, -1).to(exact) * scale) @ keys[..., :n]
            scores = torch.cat((torch.where(far[1].unsqueeze(2), distant, scores[..., :n]), scores[..., n:]), dim=-1)
        if latent:
            scores = scores + q[..., k.size(-1) :] @ v.to(exact).mT
        if softcap is not None:
            scores = do_softcapping(scores, softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(exact).min)  # finite where a row sees nothing at all
        probs = scores.softmax(dim=-1)
        y = (probs.to(v.dtype) @ v).view(B, H, T, -1)
    return y, probs.sum(dim=2) / (H // G) if want_mass else None


@torch.no_grad()
def mass(
    q: Tensor, k: Tensor, length: Tensor, last: int, *, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """How much attention each prompt token receives from the last real queries of its row, in blocks of queries.

    Never holds a T×T tensor: the largest is (B, H, MASS_BLOCK, T).

    Args:
        q, k: (B, H, T, D) and (B, G, T, D) of a right-padded prompt. length: (B,) real tokens of each row.
        last: How many last real queries of a row count; -1: all.

    Returns:
        (B, G, T), summed over queries, averaged over the query heads of a group; float32 (float64 for a float64 model).
    """
    B, H, T, D = q.shape
    G = k.size(1)
    exact = torch.promote_types(q.dtype, torch.float32)
    k, key_pos = k.to(exact), torch.arange(T, device=q.device).expand(B, T)
    query_pos = key_pos
    if 0 <= last < T:  # gather each row's own last queries; rows shorter than `last` leave places at -1
        query_pos = length.unsqueeze(1) - last + torch.arange(last, device=q.device)  # (B, last)
        index = query_pos.clamp(min=0).view(B, 1, -1, 1).expand(B, H, last, D)
        q = q.gather(2, index)
    counts = ((query_pos >= 0) & (query_pos < length.unsqueeze(1))).to(exact) / (H // G)
    total = torch.zeros(B, G, T, dtype=exact, device=q.device)
    q = q.to(exact).unflatten(1, (G, H // G)) * scale  # (B, G, R, Q, D)
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, query_pos.size(1), MASS_BLOCK):
            rows = slice(start, start + MASS_BLOCK)
            whole = query_pos is key_pos and window is None  # then only the last keys can be in a query's future
            n, past = (min(start + MASS_BLOCK, T), start) if whole else (T, 0)
            weight = counts[:, rows]  # (B, b)
            scores = q[:, :, :, rows].flatten(2, 3) @ k[:, :, :n].mT  # (B, G, R*b, n)
            if softcap is not None:
                scores = do_softcapping(scores, softcap)
            # a query outside the prompt counts nothing; letting it see every key keeps its softmax finite
            hidden = ~visible(query_pos[:, rows], key_pos[:, past:n], window) & (weight[..., None] > 0)
            scores.unflatten(2, (H // G, -1))[..., past:].masked_fill_(hidden[:, None, None], float("-inf"))
            total[:, :, :n] += (weight.repeat(1, H // G)[:, None, None] @ scores.softmax(dim=-1)).squeeze(2)
    return total
