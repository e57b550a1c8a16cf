"""Strategies that score a token by the attention that the last few queries pay to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, normalize

from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.cache.strategies.common import (
    before_window,
    check_number,
    per_query,
    query_attention,
    query_scores,
    seen_by_queries,
    softmax_where,
    spread,
    text_order,
)
from litgpt_kv.registry import register

LONGEST = 4096  # of a window of queries


@register("strategy", "snapkv")
@dataclass(frozen=True)
class SnapKV(Strategy):
    """Keep the tokens that the last queries attend to, with their neighbours, and the last tokens themselves.

    Attention of the last `window` queries, averaged over them and over the query heads of a group, then over `kernel`
    neighbours in the order of the text among the tokens before the window; missing neighbours count as 0. That is
    kvpress 0.5.5; the official FasterDecoding/SnapKV code sums, keeps a set for each query head, and has a maximum in
    place of the second mean in its runs. While decoding, the last queries are kept in a ring, each at its own position,
    and neighbours are those among the kept tokens; the official code compresses prompts only. In a budget of less than
    two windows, tokens of the window that are not protected are scored like others.

    Args:
        window: How many last queries score, and last tokens stay (at most half of the budget does).
        kernel: Neighbours that share their scores, an odd number; 1 for none.
    """

    window: int = 64
    kernel: int = 5

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    paper: ClassVar[str] = (
        "Li et al. 2024, SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"
    )

    def __post_init__(self) -> None:
        check_number("window", self.window, 1, LONGEST, int)
        check_kernel(self.kernel)

    def protected(self, budget: int) -> tuple[int, int]:
        return 0, min(self.window, budget // 2)

    def score(self, tokens: Tokens) -> Tensor:
        score, old = per_query(query_attention(tokens)[0].sum(dim=2), tokens), before_window(tokens, self.window)
        order, back = (spread(x, score) for x in text_order(tokens.pos))
        before, every = (
            avg_pool1d(x.gather(-1, order), self.kernel, 1, self.kernel // 2).gather(-1, back)
            for x in (score.masked_fill(~old, 0.0), score)
        )
        return torch.where(old, before, every)


@register("strategy", "finch")
@dataclass(frozen=True)
class Finch(Strategy):
    """Keep the tokens that the question at the end of the prompt attends to, at positions inside the cache.

    Each of the last `window` queries' attention is multiplied by how many other tokens it sees, so that late ones do
    not count less; then averaged over queries and heads of a group. As kvpress 0.5.5, which finds the question by a
    delimiter: here it is the last `window` tokens of the prompt. Keys keep no rotation and are turned to their places
    among the kept tokens. While decoding, the last queries stand for the question; the official code (and kvpress)
    compresses prompts only.

    Args:
        window: Tokens of the question (at most half of the budget stays for it).
    """

    window: int = 64

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    positions: ClassVar[str] = "cache"
    paper: ClassVar[str] = (
        "Corallo and Papotti 2024, FINCH: Prompt-guided Key-Value Cache Compression, arXiv 2408.00167"
    )

    def __post_init__(self) -> None:
        check_number("window", self.window, 1, LONGEST, int)

    def protected(self, budget: int) -> tuple[int, int]:
        return 0, min(self.window, budget // 2)

    def score(self, tokens: Tokens) -> Tensor:
        attention, seen = query_attention(tokens)
        others = (seen.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        return per_query((attention * others).sum(dim=2), tokens)


@register("strategy", "rkv")
@dataclass(frozen=True)
class RKV(Strategy):
    """Keep the tokens that the last queries attend to and that no later token repeats: made for long reasoning.

    Importance: of the last `window` queries the largest score of a group's heads, softmaxed over the tokens before the
    window, averaged over the queries, the largest of 7 neighbours. Redundancy: a token's mean cosine with the other
    keys, where each token spares the newest of those it resembles (cosine over `similar`), softmaxed. The score is
    `importance` times the one minus the rest times the other. As the official Zefan-Cai/R-KV code, but for three
    things: it compares the keys of the first row of a batch only; a token that resembles none takes the cosine with the
    first token away; and the paper's share of importance is 0.1. Meant to run with `interval: 128` and `keep_prompt`.

    Args:
        window: How many last queries score, and last tokens stay (at most half of the budget does).
        importance: The share of importance, 0 to 1.
        similar: The cosine from which keys count as alike.
    """

    window: int = 8
    importance: float = 0.07
    similar: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    paper: ClassVar[str] = (
        "Cai et al. 2025, R-KV: Redundancy-aware KV Cache Compression for Reasoning Models, arXiv 2505.24133"
    )
    KERNEL: ClassVar[int] = 7

    def __post_init__(self) -> None:
        check_number("window", self.window, 1, LONGEST, int)
        check_number("importance", self.importance, 0, 1)
        check_number("similar", self.similar, 0, 1)

    def protected(self, budget: int) -> tuple[int, int]:
        return 0, min(self.window, budget // 2)

    def score(self, tokens: Tokens) -> Tensor:
        old = before_window(tokens, self.window)
        seen = seen_by_queries(tokens) & old.unsqueeze(-2)
        attention = per_query(softmax_where(tokens.largest_of_group(query_scores(tokens)), seen).sum(dim=2), tokens)
        order, back = (spread(x, attention) for x in text_order(tokens.pos))
        attention = max_pool1d(attention.gather(-1, order), self.KERNEL, 1, self.KERNEL // 2).gather(-1, back)
        redundancy = softmax_where(self._alike(tokens), tokens.live)
        return (self.importance * attention - (1 - self.importance) * redundancy).masked_fill(~old, 0.0)

    def _alike(self, tokens: Tokens) -> Tensor:
        """Each token's mean cosine with all keys, (B, G, N), a block of rows at a time."""
        keys, pos, total = normalize(tokens.keys, dim=-1), tokens.pos, 0.0
        for block, at in zip(keys.split(128, dim=2), pos.split(128, dim=2)):
            cosine = (block @ keys.mT).masked_fill(at.unsqueeze(-1) == pos.unsqueeze(-2), 0.0)  # (B, G, n, N)
            alike = torch.where(cosine > self.similar, pos.unsqueeze(-2), -1)
            newest = (alike == alike.amax(dim=-1, keepdim=True)) & (alike >= 0)
            total = total + cosine.masked_fill(newest, 0.0).sum(dim=2)
        return total / tokens.live.sum(dim=-1, keepdim=True).clamp(min=1)


def check_kernel(kernel: int) -> None:
    """Refuse a number of neighbours that has no middle."""
    check_number("kernel", kernel, 1, 255, int)
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}.")
