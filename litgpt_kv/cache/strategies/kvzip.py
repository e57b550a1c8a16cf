"""Strategies that read a prompt twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.cache.strategies.common import check_number
from litgpt_kv.registry import register

STEP = 2.0**-23  # the distance of float32 numbers just above 1


@register("strategy", "kvzip")
@dataclass(frozen=True)
class KVzip(Strategy):
    """Keep the tokens of a prompt that are needed to read it again: for many questions about one text.

    The prompt is read, then read once more after itself; a token is worth the largest attention that any query of the
    second reading paid it, over the query heads of a group. It knows no question. Differences from the official code
    (snu-mllab/KVzip): the text follows itself directly, without words that ask to repeat it; a part of the second
    reading is scored against the whole prompt, not against its own part of it; and it goes on while decoding, where the
    official code keeps all later tokens beyond the budget: here they are worth more than any of the prompt, the newest
    most, as are all tokens of a prompt that fits the budget. The official budget is one threshold for all layers and
    heads: that is `select` "model" (with "pool" each layer has its own, with "head", the default, each head), and
    `floor` 0, as it has no safeguard (by default 20% of the budget are sure to each head). It never evicts the system
    prompt: here `sinks` can say how long that is. A prompt that is compressed takes about three times as long to read.

    Args:
        chunk: How many tokens are read again at once; the prompt and they must fit the model's context.
    """

    chunk: int = 2048

    statistics: ClassVar[tuple[str, ...]] = ("reread",)
    rereads: ClassVar[bool] = True
    paper: ClassVar[str] = (
        "Kim et al. 2025, KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416"
    )

    def __post_init__(self) -> None:
        check_number("chunk", self.chunk, 1, 2**20, int)

    def protected(self, budget: int) -> tuple[int, int]:
        return min(4, budget // 2), 0

    def enter(self, tokens: Tokens) -> dict[str, Tensor]:
        later = 1.0 + tokens.pos.clamp(min=0).to(tokens["reread"].dtype) * STEP
        return {"reread": torch.where(tokens["reread"] > 0, tokens["reread"], later)}

    def score(self, tokens: Tokens) -> Tensor:
        return tokens["reread"]
