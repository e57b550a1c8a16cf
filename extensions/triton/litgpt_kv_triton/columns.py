"""The attention that a prompt's tokens received, in Triton: sums of columns of the attention matrix, never held.

The first kernel finds the log-sum-exp of each query's scores; the second one takes a block of keys each and adds up
exp(score - log-sum-exp) over the queries that see it.

B rows · H query heads · G key/value heads · R = H/G · Q queries · N keys · D head size.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # queries or keys of a step


@triton.jit
def _scores(
    q, k, pos, n, N, D, k_n, window, scale, softcap,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores (queries, keys) of queries q (queries, BLOCK_D) at `pos` with the keys `n` of k; -inf where hidden."""
    d = tl.arange(0, BLOCK_D)[None, :]
    keys = tl.load(k + n[:, None] * k_n + d, mask=(n[:, None] < N) & (d < D), other=0.0).to(q.dtype)
    found = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    if HAS_CAP:
        found = (2.0 / (1.0 + tl.exp(-2.0 * found / softcap)) - 1.0) * softcap  # tanh
    seen = (n[None, :] < N) & (n[None, :] <= pos[:, None])
    if HAS_WINDOW:
        seen = seen & (n[None, :] > pos[:, None] - window)
    return tl.where(seen, found, float("-inf"))


@triton.jit
def _queries_lse(
    q, k, positions, lse, H, R, Q, N, D, q_b, q_h, q_t, k_b, k_g, k_n, window, scale, softcap,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of the scores of a block of queries of one head: grid (B * H, blocks of queries)."""
    pair = tl.program_id(0).to(tl.int64)
    b, h = pair // H, pair % H
    t = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)[None, :]
    pos = tl.load(positions + b * Q + t, mask=t < Q, other=-1)  # -1: counts nothing
    counts = pos[:, None] >= 0  # what pads hold must not matter
    x = tl.load(q + b * q_b + h * q_h + t[:, None] * q_t + d, mask=counts & (d < D), other=0.0)
    k += b * k_b + (h // R) * k_g
    most = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    weight = tl.full((BLOCK_Q,), 0.0, tl.float32)
    first = 0
    if HAS_WINDOW:  # the first key that any of these queries sees, where a block begins
        low = tl.min(tl.where(pos < 0, N, pos), 0) - window + 1
        first = tl.maximum(low, 0) // BLOCK_N * BLOCK_N
    for start in range(first, tl.minimum(tl.max(pos, 0) + 1, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        found = _scores(x, k, pos, n, N, D, k_n, window, scale, softcap, HAS_WINDOW, HAS_CAP, BLOCK_D)
        new_most = tl.maximum(most, tl.max(found, 1))
        safe = tl.where(new_most == float("-inf"), 0.0, new_most)  # nothing seen yet
        weight = weight * tl.exp(most - safe) + tl.sum(tl.exp(found - safe[:, None]), 1)
        most = new_most
    tl.store(lse + pair * Q + t, most + tl.log(tl.where(weight > 0, weight, 1.0)), mask=t < Q)


@triton.jit
def _columns(
    q, k, positions, lse, total, G, R, Q, N, D, q_b, q_h, q_t, k_b, k_g, k_n, l_b, l_h, l_t, window, scale, softcap,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives from all queries that count: grid (B * G, blocks of keys)."""
    pair = tl.program_id(0).to(tl.int64)
    b, g = pair // G, pair % G
    k += b * k_b + g * k_g
    begin = tl.program_id(1) * BLOCK_N
    n = begin + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    received = tl.full((BLOCK_N,), 0.0, tl.float32)
    for start in range(0, Q, BLOCK_Q):
        t = start + tl.arange(0, BLOCK_Q)
        pos = tl.load(positions + b * Q + t, mask=t < Q, other=-1)
        counts = pos >= 0
        near = tl.max(pos, 0) >= begin
        if HAS_WINDOW:
            near = near & (tl.min(tl.where(counts, pos, N), 0) - window < begin + BLOCK_N)
        if near:  # some of these queries see some of these keys
            for r in range(0, R):
                h = g * R + r
                at = q + b * q_b + h * q_h + t[:, None] * q_t + d
                x = tl.load(at, mask=counts[:, None] & (d < D), other=0.0)
                found = _scores(x, k, pos, n, N, D, k_n, window, scale, softcap, HAS_WINDOW, HAS_CAP, BLOCK_D)
                own = tl.load(lse + b * l_b + h * l_h + t * l_t, mask=counts, other=0.0)
                received += tl.sum(tl.exp(found - own[:, None]), 0)
    tl.store(total + pair * N + n, received / R, mask=n < N)


@torch.library.custom_op("litgpt_kv_triton::received_attention", mutates_args=())
def column_sums(
    q: Tensor, k: Tensor, positions: Tensor, lse: Tensor | None, scale: float, softcap: float, window: int
) -> Tensor:
    """Sum the attention that each key receives from the queries.

    Args:
        q: (B, H, Q, D). k: (B, G, N, D), whose positions are 0 to N - 1.
        positions: (B, Q) int32 of the queries, -1 for those that do not count.
        lse: (B, H, Q) float32 log-sum-exp of the scores of each query; None: it is worked out.
        softcap: Bounds the scores by tanh; 0: not. window: Last positions that a query sees; 0: all.

    Returns:
        (B, G, N) float32, averaged over the query heads of a group.
    """
    (B, H, Q, D), (G, N) = q.shape, k.shape[1:3]
    q, k, positions = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, positions.contiguous()))
    total = torch.empty(B, G, N, dtype=torch.float32, device=q.device)
    sizes = dict(BLOCK_Q=BLOCK, BLOCK_N=BLOCK, BLOCK_D=max(16, triton.next_power_of_2(D)))
    flags = dict(HAS_WINDOW=window > 0, HAS_CAP=softcap > 0)
    strides = *q.stride()[:3], *k.stride()[:3]
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if lse is None:
            lse = torch.empty(B, H, Q, dtype=torch.float32, device=q.device)
            _queries_lse[B * H, triton.cdiv(Q, BLOCK)](
                q, k, positions, lse, H, H // G, Q, N, D, *strides, window, scale, softcap, **flags, **sizes
            )
        _columns[B * G, triton.cdiv(N, BLOCK)](
            q, k, positions, lse, total, G, H // G, Q, N, D, *strides, *lse.stride(), window, scale, softcap,
            **flags, **sizes,
        )  # fmt: skip
    return total


@column_sums.register_fake
def _(q: Tensor, k: Tensor, *_: object) -> Tensor:
    return q.new_empty(k.shape[:3], dtype=torch.float32)


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
    """Do what `litgpt_kv.attention.causal.received_attention` does, in float32."""
    (B, H, T, D), length = q.shape, length.unsqueeze(1)
    pos = torch.arange(start, start + T, device=q.device).expand(B, T)
    if 0 <= last < T:
        pos = length - last + torch.arange(last, device=q.device)  # (B, last)
        index = (pos - start).clamp(0, T - 1).unsqueeze(1).expand(B, H, last)
        q = q.gather(2, index.unsqueeze(-1).expand(B, H, last, D))
        lse = None if lse is None else lse.gather(2, index)
    pos = torch.where((pos >= start) & (pos < length) & (pos < start + T), pos, -1).to(torch.int32)
    return column_sums(q, k, pos, lse, scale, softcap or 0.0, window or 0)
