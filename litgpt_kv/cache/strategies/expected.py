"""Strategies that score a token by the attention that future queries will pay to it, as far as it can be foreseen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from litgpt_kv.attention.rope import rotate
from litgpt_kv.cache.spec import LayerSpec
from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.cache.strategies.common import check_number, softmax_where
from litgpt_kv.cache.strategies.queries import LONGEST
from litgpt_kv.config import shown
from litgpt_kv.registry import register


def met_in_future(tokens: Tokens, offsets: Tensor) -> Tensor:
    """Keys as unrotated queries would meet them `offsets` positions after the newest token, on average.

    Both rotations of a product, that of the query and that of the key, are applied to the key; the amplitude of YaRN,
    too, is there twice.

    Returns:
        (B, G, N, D).
    """
    size = tokens.layer.rope_size
    keys = rotate(tokens.unrotated_keys, tokens.angles(-tokens.distance), size)
    cos, sin = (x.mean(dim=0).view(1, 1, -1) for x in tokens.angles(-offsets))  # rotations add up, also on average
    return rotate(keys, (cos, sin), size)


@register("strategy", "expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(Strategy):
    """Keep the tokens that queries like the last ones would attend to, and whose values are large.

    Queries are taken as normally distributed before rotation; the expectation of their exponential score is a softmax
    of mean and variance, under the mean rotation of the next `future` positions; averaged over the query heads of a
    group and multiplied by the L2 norm of the value. As kvpress 0.5.5, with its exceptions for the first four tokens,
    but for three things: mean and variance are those of the last `window` queries, so that it goes on while decoding
    (kvpress: all of the prompt's); the model's own scale is used; and softcapping is applied to the expected score.

    Args:
        window: How many last queries mean and variance are taken from.
        future: Over how many next positions the rotation is averaged.
        epsilon: Added to the expected attention before it meets the value's norm. Where heads share their slots
            (`select: pool`) it matters much: kvpress' leaderboard has 0.01 there.
    """

    window: int = 128
    future: int = 512
    epsilon: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "queries", "rope"})
    latent: ClassVar[bool] = False
    paper: ClassVar[str] = (
        "Devoto et al. 2025, Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
        "Distribution, arXiv 2510.00636"
    )
    SINKS: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_number("window", self.window, 1, LONGEST, int)
        check_number("future", self.future, 1, 2**20, int)
        check_number("epsilon", self.epsilon, 0, 1e6)

    def protected(self, budget: int) -> tuple[int, int]:
        return min(self.SINKS, budget // 2), 0

    def score(self, tokens: Tokens) -> Tensor:
        layer, (queries, pos) = tokens.layer, tokens.unrotated_queries
        keys = met_in_future(tokens, torch.arange(1, self.future + 1, device=pos.device)).unsqueeze(
            2
        )  # (B, G, 1, N, D)
        counted = (pos >= self.SINKS).view(pos.size(0), 1, -1, 1)  # (B, 1, w, 1)
        count = counted.sum(dim=2, keepdim=True).clamp(min=1)
        mean = (queries * counted).sum(dim=2, keepdim=True) / count
        rest = ((queries - mean) * counted).unflatten(1, (keys.size(1), -1)) * layer.scale  # (B, G, R, w, D)
        variance = (rest @ keys.mT).square().sum(dim=3) / count  # (B, G, R, N)
        expected = (mean.unflatten(1, (keys.size(1), -1)) * layer.scale @ keys.mT).squeeze(3) + variance / 2
        if layer.softcap is not None:
            expected = torch.tanh(expected / layer.softcap) * layer.softcap
        attention = softmax_where(expected, (tokens.pos >= self.SINKS).unsqueeze(2)).mean(dim=2)
        return (attention + self.epsilon) * tokens.values.norm(dim=-1)


@register("strategy", "triattention")
@dataclass(frozen=True)
class TriAttention(Strategy):
    """Keep the tokens that the model's typical queries attend to at their distance, by the model's own calibration.

    Before rotation, queries of a head are close to a centre. For each rotated pair of elements the score has the
    product of the centre with the key, rotated by their distance and averaged over queries that come 1, 2, 4, ...
    `farthest` positions from now; and, where queries scatter, the rest of their mean length times the key's. The
    official WeianMao/triattention code joins the heads of a group by the largest (optionally standardised) score: here
    it is the mean. It protects prompts: `keep_prompt` does; and it works every 128 steps: `interval`. Elements that are
    not rotated, which it does not know, add their product with the centre. Not defined for latent attention.

    Args:
        calibration: The file that `litgpt_kv calibrate --for triattention` makes.
        farthest: The largest distance from now.
    """

    calibration: str | None = None
    farthest: int = 65536

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "rope", "calibration"})
    latent: ClassVar[bool] = False
    paper: ClassVar[str] = "TriAttention: trigonometric KV cache compression for long reasoning, arXiv 2604.04921"

    def __post_init__(self) -> None:
        check_number("farthest", self.farthest, 1, 2**30, int)
        if not (self.calibration is None or isinstance(self.calibration, str)):
            raise ValueError(f"calibration must be the path of a file, got {shown(self.calibration)}.")

    @staticmethod
    def calibration_shapes(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Of each query head: the mean of its unrotated queries, and the mean length of each rotated pair."""
        return {"mean": (layer.key_size,), "length": (layer.rope_size // 2,)}

    def score(self, tokens: Tokens) -> Tensor:
        keys, pairs = tokens.unrotated_keys, tokens.layer.rope_size // 2
        offsets = 2 ** torch.arange(self.farthest.bit_length(), device=keys.device)
        mean, length = (tokens.calibration[name].to(keys.dtype) for name in ("mean", "length"))
        amplitude = tokens.angles(offsets.new_zeros(1))[0][0, :pairs]
        centre = mean.unflatten(0, (keys.size(1), -1)).mean(dim=1)  # (G, D): the score is linear in it
        rest = (length - lengths(mean, pairs)).unflatten(0, (keys.size(1), -1)).mean(dim=1) * amplitude.square()
        met = (met_in_future(tokens, offsets) @ centre.unsqueeze(-1)).squeeze(-1)
        return met + (lengths(keys, pairs) @ rest.unsqueeze(-1)).squeeze(-1)


def lengths(x: Tensor, pairs: int) -> Tensor:
    """Lengths (..., E / 2) of the pairs of elements of x (..., D) that are rotated together."""
    return (x[..., :pairs].square() + x[..., pairs : 2 * pairs].square()).sqrt()
