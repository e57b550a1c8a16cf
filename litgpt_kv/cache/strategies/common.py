"""What several strategies do: attention of the last queries, work in the order of the text, checks of options.

B rows · P sets of kept tokens · N tokens · w last queries · H query heads · G key/value heads · R = H / G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from litgpt_kv.attention.masks import visible
from litgpt_kv.cache.strategies.base import Tokens
from litgpt_kv.config import shown


def query_scores(tokens: Tokens) -> Tensor:
    """Products of the last queries with all keys, scaled and softcapped as the model does: (B, G, R, w, N)."""
    keys, (queries, _), layer = tokens.keys, tokens.queries, tokens.layer
    queries = queries.unflatten(1, (keys.size(1), -1)) * layer.scale  # (B, G, R, w, D)
    width = keys.size(-1)
    scores = queries[..., :width] @ keys.unsqueeze(2).mT
    if queries.size(-1) > width:  # latent attention with a bias: see `LatentProjection.bias`
        scores = scores + queries[..., width:]
    return scores if layer.softcap is None else torch.tanh(scores / layer.softcap) * layer.softcap


def seen_by_queries(tokens: Tokens) -> Tensor:
    """Which tokens each of the last queries sees, (B, P, w, N) bool; a query that does not exist sees none."""
    return visible(tokens.queries[1].unsqueeze(1), tokens.pos, tokens.sliding_window)


def softmax_where(scores: Tensor, where: Tensor) -> Tensor:
    """Softmax over the last dimension among the elements marked in `where`; 0 for the others, and where none is."""
    probs = scores.masked_fill(~where, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return probs.masked_fill(~where, 0.0)


def query_attention(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Attention that the last queries pay to the tokens, averaged over the heads of a group, and what they see.

    Returns:
        (B, G, w, N), rows of queries that do not exist are 0; and (B, P, w, N) bool.
    """
    seen = seen_by_queries(tokens)
    return softmax_where(query_scores(tokens), seen.unsqueeze(2)).mean(dim=2), seen


def per_query(total: Tensor, tokens: Tokens) -> Tensor:
    """A sum (B, G, N) over the last queries, divided by how many there are in each row."""
    return total / (tokens.queries[1] >= 0).sum(dim=-1).clamp(min=1).view(-1, 1, 1)


def before_window(tokens: Tokens, window: int) -> Tensor:
    """Which tokens are older than the last `window` ones, (B, P, N) bool."""
    return tokens.live & (tokens.pos <= tokens.now.view(-1, 1, 1) - window)


def text_order(pos: Tensor) -> tuple[Tensor, Tensor]:
    """Indices that sort tokens by position, empty ones last, and those that undo it: (B, P, N) each."""
    order = pos.masked_fill(pos < 0, torch.iinfo(pos.dtype).max).argsort(dim=-1, stable=True)
    return order, order.argsort(dim=-1)


def spread(pos: Tensor, like: Tensor) -> Tensor:
    """Indices (B, P, N) for the sets of `like` (B, G, N)."""
    return pos.expand(-1, like.size(1), -1)


def check_number(name: str, value: Any, least: float, most: float, kind: type = float) -> None:
    """Refuse an option that is no number (for `int`, no whole number) from `least` to `most`.

    Raises:
        ValueError: With the name, the value and the limits.
    """
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {what} from {least:,} to {most:,}, got {shown(value)}.")
