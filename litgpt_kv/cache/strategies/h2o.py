"""Strategies that score a token by the attention it received from all queries, or from the newest one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from litgpt_kv.arguments import check_flag
from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.registry import register


@register("strategy", "h2o")
@dataclass(frozen=True)
class H2O(Strategy):
    """Keep the tokens that received most attention so far, and the most recent half of the budget.

    Attention is summed over all queries, the prompt's included, per row and key/value head (averaged over the query
    heads of a group; the official FMInference/H2O code knows no groups and sums over the batch). The official code
    attends and then evicts; evicting first, as here, equals it with budget and recent smaller by one.

    Args:
        normalize: Divide by the number of queries that could see the token, so that early tokens have no advantage
            (kvpress 0.5.5, ObservedAttentionPress; cold-compress). A token outside a sliding window is seen no more,
            but goes on ageing.
        value_weighted: Multiply by the L1 norm of the token's value (Guo et al. 2024, Value-Aware Token Pruning, arXiv
            2406.12335, whose first tokens are exempt: here `sinks` says so). Not defined for latent attention.
    """

    normalize: bool = False
    value_weighted: bool = False

    paper: ClassVar[str] = (
        "Zhang et al. 2023, H2O: Heavy-Hitter Oracle for Efficient Generative Inference, arXiv 2306.14048"
    )

    def __post_init__(self) -> None:
        check_flag("normalize", self.normalize)
        check_flag("value_weighted", self.value_weighted)

    @property
    def statistics(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("mass", "value") if self.value_weighted else ("mass",)

    @property
    def latent(self) -> bool:  # type: ignore[override]
        return not self.value_weighted

    @property
    def reads_on_entry(self) -> bool:
        return self.value_weighted

    def protected(self, budget: int) -> tuple[int, int]:
        return 0, budget // 2

    def enter(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"value": tokens.values.abs().sum(dim=-1)} if self.value_weighted else {}

    def score(self, tokens: Tokens) -> Tensor:
        score = tokens["mass"]
        if self.normalize:
            score = score / (tokens.now.view(-1, 1, 1) - tokens.pos + 1)
        return score * tokens["value"] if self.value_weighted else score


@register("strategy", "tova")
@dataclass(frozen=True)
class Tova(Strategy):
    """Keep the tokens that the newest query attends to, the same ones for all heads of a layer.

    The mean is over all query heads of the layer. As in the paper nothing but the newest token is protected; the
    official schwartz-lab-NLP/TOVA code does not force it either, kvpress 0.5.5 does. With `select: head` each
    key/value head chooses for itself, which is not the paper's.
    """

    statistics: ClassVar[tuple[str, ...]] = ("last",)
    select: ClassVar[str] = "layer"
    paper: ClassVar[str] = "Oren et al. 2024, Transformers are Multi-State RNNs, arXiv 2401.06104"

    def protected(self, budget: int) -> tuple[int, int]:
        return 0, 1

    def score(self, tokens: Tokens) -> Tensor:
        return tokens["last"]
