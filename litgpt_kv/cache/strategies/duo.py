"""Heads that retrieve keep everything, others the first and the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from litgpt_kv.cache.spec import LayerSpec
from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.config import shown
from litgpt_kv.registry import register

HEADS = 2.0**20  # more than any model has: the ranks of heads are whole numbers below it


@register("strategy", "duo")
@dataclass(frozen=True)
class Duo(Strategy):
    """Keep everything for the heads that retrieve, and the first and last tokens for the others.

    Heads have ranks, from calibration: how much their output suffers when they see only the first and the last tokens.
    Of the heads that share slots, those of the whole model with `select: model` as in the paper, of a layer without,
    the ones with the highest ranks keep their whole prompt, as many as there is room for, and the others their sinks
    and recent tokens. In the head between them, and while decoding, the oldest tokens leave first. Differences from the
    official code (mit-han-lab/duo-attention): ranks are measured forwards, not trained (see
    `litgpt_kv.calibrate.heads`); the budget says how many heads are whole; a whole head evicts, too, when there is no
    room. Each head also has its `floor`; 0 is the paper's. Not defined for latent attention.

    Args:
        calibration: The file that `litgpt_kv calibrate --for duo` makes.
    """

    calibration: str | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    select: ClassVar[str] = "pool"
    latent: ClassVar[bool] = False
    paper: ClassVar[str] = (
        "Xiao et al. 2024, DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, "
        "arXiv 2410.10819"
    )

    def __post_init__(self) -> None:
        if not (self.calibration is None or isinstance(self.calibration, str)):
            raise ValueError(f"calibration must be the path of a file, got {shown(self.calibration)}.")

    @staticmethod
    def calibration_shapes(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Of each query head its rank among all heads of the model, 0 to 1."""
        return {"gate": ()}

    def protected(self, budget: int) -> tuple[int, int]:
        return min(16, budget // 8), min(256, budget // 4)

    def score(self, tokens: Tokens) -> Tensor:
        gate = tokens.calibration["gate"].double().unflatten(0, (tokens.layer.groups, -1)).mean(dim=1)  # (G,)
        rank = (gate * HEADS).round().view(1, -1, 1)
        return rank + (tokens.pos + 1).double() / 2**31  # float64: 20 bits of rank and 31 of position
