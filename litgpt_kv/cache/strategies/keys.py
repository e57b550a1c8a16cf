"""Strategies that look at keys and values alone, never at attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.cache.strategies.common import check_number, spread, text_order
from litgpt_kv.registry import register


@register("strategy", "knorm")
@dataclass(frozen=True)
class Knorm(Strategy):
    """Keep the tokens with the smallest keys, which in trained models attract attention.

    The official alessiodevoto/l2compress code leaves the first two layers whole (`strategy: [dense, dense, knorm, ...]`
    does that here). Norms are float32 here, rounded to 16 bits: in the first layer all occurrences of a token have the
    same norm, and must not be ordered by the last bit of their rotations. For latent attention the norm is that of the
    cached latent and rotary key side by side, which is what all heads' queries meet.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    paper: ClassVar[str] = (
        "Devoto et al. 2024, A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430"
    )

    def score(self, tokens: Tokens) -> Tensor:
        mantissa, exponent = torch.frexp(tokens.keys.norm(dim=-1))
        return -torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)


@register("strategy", "keydiff")
@dataclass(frozen=True)
class KeyDiff(Strategy):
    """Keep the tokens whose keys point away from the mean direction of all keys.

    The score is minus the cosine with the mean of the normalised keys, as in kvpress 0.5.5. The paper reads a prompt in
    blocks and evicts after each (`prefill: min-length` here); a full prefill scores the whole prompt once. For latent
    attention a key is the cached latent and rotary key side by side.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    paper: ClassVar[str] = (
        "Park et al. 2025, KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
        "Resource-Constrained Environments, arXiv 2504.15364"
    )

    def score(self, tokens: Tokens) -> Tensor:
        keys = normalize(tokens.keys, dim=-1)
        anchor = normalize(keys.sum(dim=-2, keepdim=True), dim=-1)
        return -(keys * anchor).sum(dim=-1)


@register("strategy", "lagkv")
@dataclass(frozen=True)
class LagKV(Strategy):
    """Keep, of each chunk of tokens, those whose keys and values stand out against the next chunk's.

    After the first four tokens the kept ones are cut into chunks in the order of the text. Each channel is scaled by
    the range of the next chunk; a token's deviation over its channels, softmaxed over the chunk, is averaged between
    keys and values, and its rank in the chunk is the score, from 0 up to 1. The first four and the last two, incomplete
    chunks score 1; with fewer than two chunks the most recent tokens stay. This is kvpress 0.5.5; the official
    AI-Lab-China-Merchants-Bank/LagKV code compresses chunk by chunk while it reads. While decoding, the chunks are
    those of the tokens kept so far. A budget below 4 + 2 * `lag` leaves nothing to compare.

    Args:
        lag: Tokens of a chunk, at least 2.
    """

    lag: int = 128

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    paper: ClassVar[str] = (
        "Liang et al. 2025, LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important, "
        "arXiv 2504.04704"
    )
    SINKS: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_number("lag", self.lag, 2, 2**20, int)

    def protected(self, budget: int) -> tuple[int, int]:
        return min(self.SINKS, budget // 2), 0

    def score(self, tokens: Tokens) -> Tensor:
        keys, values, lag = tokens.keys, tokens.values, self.lag
        order, back = (spread(x, keys) for x in text_order(tokens.pos))
        place = torch.arange(order.size(-1), device=order.device) - self.SINKS
        count = tokens.live.sum(dim=-1, keepdim=True) - self.SINKS  # (B, P, 1)
        chunks = max(0, order.size(-1) - self.SINKS) // lag
        compared = (place >= 0) & (place // lag + 1 < count // lag)  # the next chunk is complete
        score = torch.where(count < 2 * lag, place.to(keys.dtype) / count.clamp(min=1), 1.0)
        if chunks > 1:
            rank = sum(self._outstanding(x, order, chunks) for x in (keys, values)).argsort(dim=-1).argsort(dim=-1)
            rank = torch.nn.functional.pad(
                rank.flatten(2) / lag, (self.SINKS, order.size(-1) - self.SINKS - chunks * lag)
            )
            score = torch.where(compared, rank.to(keys.dtype), score)
        return score.expand(order.shape).gather(-1, back)

    def _outstanding(self, x: Tensor, order: Tensor, chunks: int) -> Tensor:
        """How far tokens deviate against the next chunk's range, (B, G, chunks, lag); of the last chunk, 0."""
        x = x.gather(2, order.unsqueeze(-1).expand(x.shape))[:, :, self.SINKS : self.SINKS + chunks * self.lag]
        x = x.unflatten(2, (chunks, self.lag))
        low, high = x[:, :, 1:].amin(dim=3, keepdim=True), x[:, :, 1:].amax(dim=3, keepdim=True)
        spans = (high - low).masked_fill(high == low, 1.0)
        found = ((x[:, :, :-1] - low) / spans).std(dim=-1).softmax(dim=-1)
        return torch.nn.functional.pad(found, (0, 0, 0, 1))
