"""What a cache changes while a text is read: its perplexity, and the difference from a full cache, token by token.

R texts side by side · N tokens of each · T tokens of a block · V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt_kv import registry
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.plan import check_prompt_kept, limit_of, resolve
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.evaluate.recording import record
from litgpt_kv.evaluate.shadow import REFERENCE, kl_divergence, log_softmax, lost_by_layer
from litgpt_kv.llm.llm import LLM

BLOCK = 64  # tokens that are read together, of all texts; tokens of a text between two looks at lost attention


@dataclass
class Fidelity:
    """What was measured, of each token that was read after the prompts.

    Attributes:
        nll: Negative log-likelihood of the token, in nats.
        kl: Kullback-Leibler divergence of the distribution before it from the full cache's, in nats; empty where the
            text is longer than a full cache can be.
        agrees: Whether the most probable token is the full cache's.
        lost: At the end of each block, the share of the full cache's attention that went to tokens that are not kept,
            the mean over layers and heads.
        seconds: How long reading took.
        bytes: The size of a row of the cache.
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
    *,
    dtype: torch.dtype | None = None,
    blocks: bool = False,
    compare: bool = True,
) -> dict[str, Fidelity]:
    """Read texts token by token with several caches and, as far as it goes, with a full one beside them.

    Args:
        ids: (N,) a text, or (R, N) several that are read side by side.
        start: How many tokens of each are its prompt, read in one pass and then compressed.
        candidates: Caches by name; a share is taken of the whole text.
        on_block: Called with the number of tokens of a text that were read, after each block.
        dtype: The dtype of stored keys and values; None: the model's. The full cache has the model's in any case.
        blocks: Read blocks of tokens instead of single ones where that gives the same: faster, but then the seconds are
            not those of decoding.
        compare: Whether there is to be a full cache. There is none for a text longer than the model's context.

    Raises:
        ValueError: If the texts are too short, or a cache cannot be built.
    """
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    model, (count, total) = llm.model, ids.shape
    if total < start + 2:
        raise ValueError(f"The text has {total} tokens: it needs at least {start + 2}, {start} of them the prompt.")
    recording = record(model, list(ids[:, :start]))
    found = {name: Fidelity() for name in candidates}
    caches = {name: KVCache.build(model, a.resolved(total), count, total, dtype) for name, a in candidates.items()}
    with_full = compare and total <= model.max_seq_length
    full = KVCache.build(model, KVCacheArgs(REFERENCE), count, total) if with_full else None
    for cache in [*caches.values(), full]:
        if cache is not None:
            recording.seed(cache)
    logits = dict.fromkeys(caches, recording.logits.unsqueeze(1))  # (R, 1, V)
    last, size, looked = recording.logits.unsqueeze(1), max(1, BLOCK // count), start
    del recording
    for first in range(start, total - 1, size):
        block = ids[:, first : min(first + size, total - 1)]  # (R, T)
        after, expected = first + block.size(1), None
        if full is not None:
            read = model(block, full)  # (R, T, V)
            expected = log_softmax(torch.cat((last, read[:, :-1]), dim=1))  # before each token
            last = read[:, -1:]
        look = after - looked >= BLOCK or after == total - 1
        looked = after if look else looked
        for name, cache in caches.items():
            began = time.perf_counter()
            read = torch.cat((logits[name], _read(model, block, cache, blocks)), dim=1)
            found[name].seconds += time.perf_counter() - began
            logits[name] = read[:, -1:]
            _note(found[name], log_softmax(read[:, :-1]), block, expected)
            if full is not None and look:
                found[name].lost += [lost_attention(full, cache, row) for row in range(count)]
        on_block(after)
    for name, cache in caches.items():
        found[name].bytes = cache.allocated()["total"] // count
    return found


def _read(model: GPT, block: Tensor, cache: KVCache, blocks: bool) -> Tensor:
    """Logits (R, T, V) after each token of a block (R, T)."""
    lossless = all(registry.get("storage", plan.storage).lossless for plan in cache.plans)
    if blocks and lossless and cache.exact_blocks and block.size(1) <= cache.longest_block:
        return model(block, cache)
    return torch.cat([model(token, cache) for token in block.split(1, dim=1)], dim=1)


def _note(fidelity: Fidelity, logprobs: Tensor, tokens: Tensor, expected: Tensor | None) -> None:
    """Add what the log-probabilities (R, T, V) before each of some tokens (R, T) say, beside those of a full cache."""
    fidelity.nll += (-logprobs.gather(2, tokens.unsqueeze(2))).flatten().tolist()
    if expected is not None:
        fidelity.kl += kl_divergence(expected, logprobs).flatten().tolist()
        fidelity.agrees += (expected.argmax(dim=-1) == logprobs.argmax(dim=-1)).flatten().tolist()


def lost_attention(full: KVCache, cache: KVCache, row: int = 0) -> float:
    """The share of the newest token's attention in a full cache that went to tokens that another cache has not.

    Both have seen the same tokens in this row; the mean over layers and key/value heads.
    """
    return float(lost_by_layer(full.row(row), cache.row(row)).mean())
