"""Caches that read the same text side by side, beside a full cache that holds every token.

T tokens · V vocabulary · L layers · G key/value heads · N tokens of the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.strategies.base import Strategy
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.evaluate.recording import record
from litgpt_kv.registry import register

REFERENCE = "_dense_observed"


@register("strategy", REFERENCE)
@dataclass(frozen=True)
class DenseObserved(Strategy):
    """Keep every token and note the attention that each received from the newest one: what others are measured by.

    In a layer with a sliding window tokens outside of it receive none, so that no cache can lose them.
    """

    evicts: ClassVar[bool] = False
    outside_window: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("last",)


class Shadow:
    """Several caches, and a full one as far as the model's context goes, after the same tokens.

    Args:
        model: The model. prompt: (n,) the first tokens, read in one pass, once for all caches, and then compressed.
        candidates: Caches by name; a share is taken of `total`.
        total: The most tokens that will be read.

    Attributes:
        caches: By name, each with one row.
        full: The full cache; None where `total` is more than the model's context.
        logits: Of each cache by name, (1, V) after the last token that it has read.
        full_logits: The same of the full cache; None without one.
    """

    def __init__(self, model: GPT, prompt: Tensor, candidates: Mapping[str, KVCacheArgs], total: int) -> None:
        self.model = model
        self.caches = {name: KVCache.build(model, a.resolved(total), 1, total) for name, a in candidates.items()}
        within = total <= model.max_seq_length
        self.full = KVCache.build(model, KVCacheArgs(REFERENCE), 1, total) if within else None
        recording = record(model, [prompt])
        for cache in [*self.caches.values(), self.full]:
            if cache is not None:
                recording.seed(cache)
        self.logits = dict.fromkeys(self.caches, recording.logits)
        self.full_logits = None if self.full is None else recording.logits

    def read(self, name: str, tokens: Tensor) -> Tensor:
        """Let one cache read tokens (T,) one by one, as in decoding: the logits (T, V) before each of them."""
        before = []
        for token in tokens:
            before.append(self.logits[name])
            self.logits[name] = self.model(token.view(1, 1), self.caches[name])[:, 0]
        return torch.cat(before)

    def read_full(self, tokens: Tensor) -> Tensor | None:
        """Let the full cache read tokens (T,) as one block: the logits (T, V) before each; None without it."""
        if self.full is None or self.full_logits is None:
            return None
        after = self.model(tokens.unsqueeze(0), self.full)[0]  # (T, V)
        before = torch.cat((self.full_logits, after[:-1]))
        self.full_logits = after[-1:]
        return before


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of logits (..., V), in float32 at least."""
    return logits.log_softmax(dim=-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def kl_divergence(expected: Tensor, logprobs: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats, (T,), of distributions from expected ones, as log-probabilities (T, V)."""
    return (expected.exp() * (expected - logprobs)).sum(dim=-1)


def lost_by_layer(full: KVCache, cache: KVCache) -> Tensor:
    """The share of the newest token's attention in a full cache that went to tokens that another cache has not, (L,).

    Both caches hold one row and have seen the same tokens; a layer's share is the mean over its key/value heads. In a
    layer with a sliding window it is a share of the attention inside the window.
    """
    tokens = full.seen[0]
    attention = full.by_token(0, tokens, "last")  # (L, G, N)
    inside = attention * cache.by_token(0, tokens).to(attention.device)
    return (1 - inside.sum(-1) / attention.sum(-1)).clamp(min=0).mean(-1)
