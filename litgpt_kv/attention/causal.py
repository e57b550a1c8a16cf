"""Causal attention of whole sequences, and how much of it each token receives: no tensor of all queries × all keys.

B rows · T queries · N keys (T, and those of a prompt's earlier pieces) · H query heads · G key/value heads ·
R = H/G query heads a group · D head size · b queries of a block · n keys that a block sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.model import do_softcapping
from litgpt_kv.attention.cpu import products
from litgpt_kv.attention.eager import slot_attention
from litgpt_kv.attention.masks import visible

BLOCK = 128  # queries of a block
KEYS = 1024  # keys of a tile of scores, which stays in the processor's cache
MOST_SCORES = 2**24  # of a block; where prompts are so long that there would be more, blocks have fewer queries
LOG2_E = 1 / math.log(2)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    start: int = 0,
    last: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of a whole sequence to itself, in training and in a prefill, or of a piece to all before it.

    Without a window and softcap, torch's fast causal kernel runs; else blocks of queries attend to the keys that they
    see. A sequence of at most `BLOCK` tokens gives litgpt's numbers to the bit.

    Args:
        q: (B, H, T, D) rotated queries. k, v: (B, G, N, D) and (B, G, N, Dv).
        scale: Multiplies the scores. softcap: tanh-bounds them. window: sliding window in tokens, or None.
        start: Position of the first query: that many keys stand before it, N = start + T.
        last: (B,) positions of the only query of each row, q then being (B, H, 1, D); None: all of them.
        with_lse: Also return the log-sum-exp of the scores of each query, where the kernel gives it.

    Returns:
        (B, H, T, Dv), or (B, H, 1, Dv) with `last`; and (B, H, T) float32 (float64 for float64), or None.
    """
    N = k.size(2)
    if last is not None:
        mask = visible(last.view(-1, 1, 1), torch.arange(N, device=k.device), window)  # (B, 1, 1, N)
        return slot_attention(q, k, v, mask, scale=scale, softcap=softcap)[0], None
    if softcap is not None or (window is not None and N > window):
        return _attend_in_blocks(q, k, v, scale, softcap, window, start, with_lse)
    if start or with_lse:
        if _has_flash(q, k, v):
            return _flash_attention(q, k, v, scale, start)
        if start:
            return _attend_in_blocks(q, k, v, scale, softcap, window, start, False)
    width, gqa = v.size(-1), _has_flash(q, k, v) and not _learns(q)
    if N > BLOCK:  # of a short sequence, the kernel for keys and values of two widths makes little
        q, k, v = _same_width(q, k, v)
    k, v = (k, v) if gqa else (_for_all_heads(x, q.size(1)) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=True, scale=scale, enable_gqa=gqa)
    return y[..., :width], None


def queries_at(q: Tensor, pos: Tensor) -> Tensor:
    """One query a row: q (B, H, T, D) at pos (B,) is (B, H, 1, D)."""
    return q.gather(2, pos.view(-1, 1, 1, 1).expand(-1, q.size(1), 1, q.size(-1)))


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
    lse: Tensor | None = None,
) -> Tensor:
    """Sum the attention that each prompt token receives from the queries of its row, in blocks of queries.

    Args:
        q, k: (B, H, T, D) queries and (B, G, N, D) keys of right-padded prompts; N is T but for a piece of a prompt.
        length: (B,) real tokens of each row.
        last: How many last real queries of a row count; -1: all.
        start: Position of the first query: a piece of a prompt attends to `start` tokens before it.
        lse: (B, H, T) log-sum-exp of the scores of each query, from `causal_attention`, which halves the work where all
            queries count; None: it is not known.

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
        if in_order and lse is not None:
            return _add_columns(total, q, k, counts, softcap, window, start, lse.to(exact).unflatten(1, (G, H // G)))
        for first, stop in _blocks(query_pos.size(1), B * H * N):
            rows = slice(first, stop)
            low = _first_key(start + first, window) if in_order else 0
            n, past = (start + stop, start + first) if in_order else (N, 0)
            past = low if window is not None else past  # without a window, only the block's own keys can be hidden
            weight = counts[:, rows]  # (B, b)
            scores = q[:, :, :, rows].flatten(2, 3) @ k[:, :, low:n].mT  # (B, G, R*b, n)
            if softcap is not None:
                scores = do_softcapping(scores, softcap)
            # a query outside the prompt counts nothing; letting it see every key keeps its softmax finite
            hidden = ~visible(query_pos[:, rows], key_pos[:, past:n], window) & (weight[..., None] > 0)
            scores.unflatten(2, (H // G, -1))[..., past - low :].masked_fill_(hidden[:, None, None], float("-inf"))
            total[:, :, low:n] += (weight.repeat(1, H // G)[:, None, None] @ scores.softmax(dim=-1)).squeeze(2)
    return total


def _add_columns(
    total: Tensor,
    q: Tensor,
    k: Tensor,
    counts: Tensor,
    softcap: float | None,
    window: int | None,
    start: int,
    lse: Tensor,
) -> Tensor:
    """Add up exp(score - lse) over all queries, a tile of queries × keys at a time; into `total` (B, G, N).

    Args:
        q: (B, G, R, T, D) scaled queries. k: (B, G, N, D). counts: (B, T) what each query counts. lse: (B, G, R, T).
    """
    B, G, R, T, _ = q.shape
    real = (counts > 0)[:, None, None]  # what pads hold must not matter, not even if it is infinite
    lse = torch.where(real, lse, 0.0).unsqueeze(-1)
    q = torch.where(real.unsqueeze(-1), q, 0.0)
    if softcap is None:  # one product gives (score - lse) * log2(e): processors raise 2 to a power faster than e
        q, k = torch.cat((q * LOG2_E, lse * -LOG2_E), dim=-1), F.pad(k, (0, 1), value=1.0)
    pos = torch.arange(k.size(2), device=k.device)
    for first, stop in _blocks(T, B * G * R * KEYS):
        queries = q[:, :, :, first:stop].flatten(2, 3)  # (B, G, R*b, D)
        weight = counts[:, first:stop].repeat(1, R)[:, None, None]  # (B, 1, 1, R*b)
        own = pos[start + first : start + stop]
        for left in range(_first_key(start + first, window), start + stop, KEYS):
            right = min(left + KEYS, start + stop)
            part = products(queries, k[:, :, left:right])  # (B, G, R*b, n)
            if softcap is not None:
                part = (do_softcapping(part, softcap) - lse[:, :, :, first:stop].flatten(2, 3)) * LOG2_E
            part = part.exp2_()
            past = left if window is not None else max(left, start + first)  # no key before it is hidden
            if past < right:
                hidden = ~visible(own, pos[past:right], window)  # (b, n)
                part.unflatten(2, (R, -1))[..., past - left :].masked_fill_(hidden, 0.0)
            total[:, :, left:right] += (weight @ part).squeeze(2)
    return total


def _attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    start: int,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Do the work of `causal_attention` where scores are bounded or a window hides keys, in blocks of queries."""
    B, H, T, _ = q.shape
    pos, width, flash = torch.arange(k.size(2), device=q.device), v.size(-1), _has_flash(q, k, v)
    if softcap is None:
        q, k, v = _same_width(q, k, v)
    outputs, sums = [], []
    for first, stop in _blocks(T, B * H * k.size(2)):
        low = _first_key(start + first, window)
        seen = visible(pos[start + first : start + stop], pos[low : start + stop], window)
        mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf"))  # (b, n)
        queries, keys, values = q[:, :, first:stop], k[:, :, low : start + stop], v[:, :, low : start + stop]
        if softcap is None and flash and with_lse:
            y, lse = _flash(queries, keys, values, attn_mask=mask, scale=scale)
        else:
            if not flash or softcap is not None or _learns(q):
                keys, values = (_for_all_heads(x, H) for x in (keys, values))
            y, lse = _masked_attention(queries, keys, values, mask, scale, softcap, with_lse)
        outputs.append(y)
        sums.append(lse)
    one = len(outputs) == 1
    found = (sums[0] if one else torch.cat(sums, dim=2)) if sums[0] is not None else None
    return (outputs[0] if one else torch.cat(outputs, dim=2))[..., :width], found


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of a block, q (B, H, b, D), with a mask (b, n) that is added to the scores."""
    if softcap is None:
        gqa = k.size(1) != q.size(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa), None
    scores = do_softcapping(q @ k.mT * scale, softcap) + mask  # (B, H, b, n)
    exact = torch.promote_types(q.dtype, torch.float32)
    y = F.softmax(scores, dim=-1, dtype=exact).to(q.dtype) @ v
    return y, scores.detach().to(exact).logsumexp(dim=-1) if with_lse else None


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, start: int) -> tuple[Tensor, Tensor]:
    """Causal attention and its log-sum-exp, with torch's kernel for processors.

    What stands before the queries is seen by all of them: it is attended to without a mask, and the two results are
    joined by their log-sum-exp.
    """
    width = v.size(-1)
    q, k, v = _same_width(q, k, v)
    y, lse = _flash(q, k[:, :, start:], v[:, :, start:], is_causal=True, scale=scale)
    if start:
        past, past_lse = _flash(q, k[:, :, :start], v[:, :, :start], scale=scale)
        both = torch.logaddexp(lse, past_lse)  # (B, H, T)
        parts = (x * (own - both).exp().unsqueeze(-1) for x, own in ((y, lse), (past, past_lse)))
        y, lse = sum(parts).to(q.dtype), both  # type: ignore[attr-defined]
    return y[..., :width], lse


def _flash(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    # the same kernel that F.scaled_dot_product_attention chooses, which keeps the log-sum-exp to itself
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)


def _has_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's kernel for processors takes these tensors; it reads keys and values of groups in place."""
    known = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    return known and q.device.type == "cpu" and q.is_floating_point() and q.dtype == k.dtype == v.dtype


def _learns(q: Tensor) -> bool:
    """Whether gradients are wanted: litgpt's, to the bit, come from keys and values that are repeated for each head."""
    return torch.is_grad_enabled() and q.requires_grad


def _same_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Widen what is narrower by zeros: kernels want keys and values of one width, latent attention has two."""
    more = v.size(-1) - k.size(-1)
    if more > 0:
        q, k = F.pad(q, (0, more)), F.pad(k, (0, more))
    elif more < 0:
        v = F.pad(v, (0, -more))
    return q, k, v


def _for_all_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, G, n, D) repeated for each query head, (B, H, n, D)."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def _blocks(T: int, scores: int) -> Iterator[tuple[int, int]]:
    """The first query of each block and the one after its last; `scores` of one query say how large a block may be."""
    size = max(1, min(BLOCK, MOST_SCORES // scores))
    return ((first, min(first + size, T)) for first in range(0, T, size))


def _first_key(pos: int, window: int | None) -> int:
    """The first key that a query at `pos` sees."""
    return 0 if window is None else max(0, pos - window + 1)
