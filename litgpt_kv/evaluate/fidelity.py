"""What a cache changes while a text is read: its perplexity, and the difference from a full cache, token by token.

T tokens of a block · V vocabulary · N tokens of the text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.plan import check_prompt_kept, limit_of, resolve
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.evaluate.shadow import REFERENCE, Shadow, kl_divergence, log_softmax, lost_by_layer
from litgpt_kv.llm.llm import LLM

__all__ = ["BLOCK", "REFERENCE", "Fidelity", "check", "lost_attention", "measure"]

BLOCK = 64  # tokens between two looks at the attention that was lost


@dataclass
class Fidelity:
    """What was measured, of each token that was read after the prompt.

    Attributes:
        nll: Negative log-likelihood of the token, in nats.
        kl: Kullback-Leibler divergence of the distribution before it from the full cache's, in nats; empty where the
            text is longer than a full cache can be.
        agrees: Whether the most probable token is the full cache's.
        lost: At the end of each block, the share of the full cache's attention that went to tokens that are not kept,
            the mean over layers and heads.
        seconds: Decoding took. bytes: Of the cache.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.nll) / len(self.nll))


def check(llm: LLM, args: KVCacheArgs, tokens: int, start: int) -> None:
    """Raise ValueError if a cache for a text of so many tokens, `start` of them its prompt, cannot be built."""
    context, config = llm.model.max_seq_length, llm.model.config
    plans = resolve(config, args.resolved(tokens), tokens, context)
    check_prompt_kept(plans, start)
    limit, why = limit_of(plans, context)
    if limit is not None and tokens > limit:
        raise ValueError(f"A text of {tokens:,} tokens is over the limit of {limit:,}: {why}.")


@torch.inference_mode()
def measure(
    llm: LLM,
    ids: Tensor,
    start: int,
    candidates: dict[str, KVCacheArgs],
    on_block: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Fidelity]:
    """Read a text token by token with several caches and, as far as it goes, with a full one beside them.

    Args:
        ids: (N,) the text. start: How many tokens are the prompt, read in one pass and then compressed.
        candidates: Caches by name; a share is taken of the whole text.
        on_block: Called with the number of tokens read, after each block.

    Raises:
        ValueError: If the text is too short, or a cache cannot be built.
    """
    if len(ids) < start + 2:
        raise ValueError(f"The text has {len(ids)} tokens: it needs at least {start + 2}, {start} of them the prompt.")
    total, found = len(ids), {name: Fidelity() for name in candidates}
    shadow = Shadow(llm.model, ids[:start], candidates, total)
    for first in range(start, total - 1, BLOCK):
        block = ids[first : min(first + BLOCK, total - 1)]
        expected = shadow.read_full(block)
        expected = None if expected is None else log_softmax(expected)
        for name, cache in shadow.caches.items():
            began = time.perf_counter()
            before = shadow.read(name, block)
            found[name].seconds += time.perf_counter() - began
            _note(found[name], log_softmax(before), block, expected)
            if shadow.full is not None:
                found[name].lost.append(lost_attention(shadow.full, cache))
        on_block(first + len(block))
    for name, cache in shadow.caches.items():
        found[name].bytes = cache.allocated()["total"]
    return found


def _note(fidelity: Fidelity, logprobs: Tensor, tokens: Tensor, expected: Tensor | None) -> None:
    """Add what the log-probabilities (T, V) before each of some tokens (T,) say, beside those of a full cache."""
    fidelity.nll += (-logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)).tolist()
    if expected is not None:
        fidelity.kl += kl_divergence(expected, logprobs).tolist()
        fidelity.agrees += (expected.argmax(dim=-1) == logprobs.argmax(dim=-1)).tolist()


def lost_attention(full: KVCache, cache: KVCache) -> float:
    """The share of the newest token's attention in a full cache that went to tokens that another cache has not.

    Both hold one row and have seen the same tokens; the mean over layers and key/value heads.
    """
    return float(lost_by_layer(full, cache).mean())
