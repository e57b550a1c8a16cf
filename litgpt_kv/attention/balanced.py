"""Products of queries with the keys and values of a few heads, on all CPU threads.

torch gives a thread whole heads: of 3 key/value heads on two threads one thread gets two, and the other waits.
Heads that are left over are cut into pieces of their slots, one a thread. On two threads of an AMD EPYC, 16,384 slots
of 3 heads of 64 elements take 1.19 ms and torch's fused operator 1.64; with 4,096 slots it is 0.31 and 0.40 ms.

B rows · G key/value heads · M queries of a head · S slots · D width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litgpt_kv.attention.cpu import thread_count

LEAST_SLOTS = 2048  # of a piece; with fewer, the additional calls take what is gained
MOST_QUERIES = 64  # with more, copies of the scores take what is gained
LEAST_WAITING = 0.15  # share of the time that threads wait when each gets whole heads


def heads_left_over(x: Tensor, queries: int) -> int:
    """Return how many heads of x (B, G, S, D) to cut into pieces, one a thread, for `queries` queries a head.

    0 where threads are busy without that.
    """
    threads = thread_count()
    if threads == 1 or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return 0
    B, G, S, _ = x.shape
    left = B * G % threads
    waiting = (threads - left) / (B * G - left + threads)
    fits = S >= LEAST_SLOTS * threads and queries <= MOST_QUERIES
    return left if left and fits and waiting >= LEAST_WAITING else 0


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """q (B, G, M, D) times k (B, G, S, D): (B, G, M, S)."""
    left, (B, G, S, _) = heads_left_over(k, q.size(2)), k.shape
    if not left:
        return q @ k.mT
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    whole, pieces = B * G - left, thread_count()
    even = S // pieces * pieces
    scores = [torch.bmm(q[:whole], k[:whole].mT)]  # (whole, M, S)
    for queries, keys in zip(q[whole:], k[whole:]):
        cut = keys[:even].unflatten(0, (pieces, -1))  # (pieces, S / pieces, D)
        found = torch.bmm(queries.expand(pieces, -1, -1), cut.mT).transpose(0, 1).flatten(1)  # (M, even)
        scores.append(torch.cat((found, queries @ keys[even:].mT), dim=1).unsqueeze(0))
    return torch.cat(scores).unflatten(0, (B, G))


def weighted_sums(p: Tensor, v: Tensor) -> Tensor:
    """p (B, G, M, S) times v (B, G, S, D): (B, G, M, D)."""
    left, (B, G, S, _) = heads_left_over(v, p.size(2)), v.shape
    if not left:
        return p @ v
    p, v = p.flatten(0, 1), v.flatten(0, 1)
    whole, pieces = B * G - left, thread_count()
    even = S // pieces * pieces
    sums = [torch.bmm(p[:whole], v[:whole])]  # (whole, M, D)
    for weights, values in zip(p[whole:], v[whole:]):
        cut = weights[:, :even].unflatten(1, (pieces, -1)).transpose(0, 1)  # (pieces, M, S / pieces)
        found = torch.bmm(cut, values[:even].unflatten(0, (pieces, -1))).sum(0)  # (M, D)
        sums.append((found + weights[:, even:] @ values[even:]).unsqueeze(0))
    return torch.cat(sums).unflatten(0, (B, G))
