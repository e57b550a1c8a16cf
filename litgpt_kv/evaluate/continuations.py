"""Score continuations of contexts: a context is read and compressed, its continuations are read through the cache.

B rows · T tokens · n tokens of a block · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.rows import storages_of
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.evaluate.shadow import log_softmax
from litgpt_kv.generate import prefill
from litgpt_kv.llm.llm import LLM

BLOCK = 64  # the logits of a block are (B, BLOCK, V)


@dataclass
class Question:
    """A context and its continuations, as token ids.

    Attributes:
        context: At least one token. continuations: Each of at least one token. numbers: Which pairs they are.
    """

    context: tuple[int, ...]
    continuations: list[tuple[int, ...]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of its longest row: the last token of a continuation is never read."""
        return len(self.context) + max(map(len, self.continuations)) - 1


@torch.inference_mode()
def score(
    llm: LLM,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    args: KVCacheArgs,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda pairs: None,
) -> list[tuple[float, bool]]:
    """Score how probable continuations are after their contexts, with a cache.

    The whole context is read in one pass and compressed to the budget; then the continuation is read token by token, as
    if it were decoded. A result depends on its own context alone, and with a share as budget on its longest
    continuation, never on the batch. The continuations of one context (the answers to choose from) share its reading.

    Args:
        llm: The model and its tokenizer.
        pairs: Token ids of context and continuation, each at least one.
        args: The cache. A share of a budget is taken of the context with its longest continuation; contexts of one
            token are no contexts, and each such pair is for itself.
        batch_size: Rows at a time; all continuations of a context run together, even if they are more. With a share,
            only those run together whose budget is the same number of tokens.
        on_batch: Called with the number of pairs in each batch that is done.

    Returns:
        For each pair the sum of the log-probabilities of the continuation's tokens, in nats, and whether each of them
        is the most probable one.

    Raises:
        ValueError: If a context or continuation is empty, or a cache cannot be built.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for batch, own in batches(questions_of(pairs), args, batch_size):
        for question, scores in zip(batch, _score_batch(llm, batch, own)):
            for number, one in zip(question.numbers, scores):
                found[number] = one
        on_batch(sum(len(question.numbers) for question in batch))
    return found


def keeps_all(cache: KVCache) -> bool:
    """Return whether a cache keeps every token with all digits, so that a block of tokens gives what single ones do."""
    exact = all(storage.lossless for pair in storages_of(cache) for storage in pair)
    return exact and not any(plan.strategy.evicts for plan in cache.plans)


def questions_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Question]:
    """Put pairs with the same context together.

    Raises:
        ValueError: If a context or continuation is empty.
    """
    questions: dict[object, Question] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"Pair {number} has an empty {'continuation' if len(context) else 'context'}.")
        context = tuple(context)
        question = questions.setdefault(context if len(context) > 1 else number, Question(context))
        question.continuations.append(tuple(continuation))
        question.numbers.append(number)
    return list(questions.values())


def batches(
    questions: Sequence[Question], args: KVCacheArgs, batch_size: int
) -> list[tuple[list[Question], KVCacheArgs]]:
    """Put questions whose caches have the same budget together, longest first: about `batch_size` rows each."""
    out: list[tuple[list[Question], KVCacheArgs]] = []
    most = 0  # continuations of a question of the last batch
    resolved = [(args.resolved(question.tokens), question) for question in questions]
    for own, question in sorted(resolved, key=lambda pair: (repr(pair[0].budget), -pair[1].tokens)):
        most = max(most, len(question.continuations))
        if not out or out[-1][1] != own or most * (len(out[-1][0]) + 1) > batch_size:
            out.append(([], own))
            most = len(question.continuations)
        out[-1][0].append(question)
    return out


def _score_batch(llm: LLM, batch: list[Question], args: KVCacheArgs) -> list[list[tuple[float, bool]]]:
    """Score all continuations of some questions, with one row for each."""
    count = max(len(question.continuations) for question in batch)
    cache = llm.build_cache(args, len(batch), max(question.tokens for question in batch))
    logits, _ = prefill(llm.model, [question.context for question in batch], cache, "full")
    if count > 1:
        cache, logits = cache.repeat(count), logits.repeat_interleave(count, dim=0)
    rows = [[*question.continuations, *[()] * (count - len(question.continuations))] for question in batch]
    scores = score_rows(llm.model, cache, logits, [row for rows_of_one in rows for row in rows_of_one])
    return [scores[i * count : i * count + len(question.continuations)] for i, question in enumerate(batch)]


def score_rows(model: GPT, cache: KVCache, logits: Tensor, rows: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Let each row of a cache read its own tokens, and score them.

    Args:
        model: The model. cache: With one row for each of `rows`; rows that are done are retired.
        logits: (B, V) after what the cache holds. rows: Token ids, of any lengths.

    Returns:
        As `score`; (0.0, True) for a row without tokens.
    """
    lengths, longest = [len(row) for row in rows], max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=logits.device)
    inside = torch.arange(longest, device=logits.device) < torch.tensor(lengths, device=logits.device).unsqueeze(1)
    total = torch.zeros(len(rows), dtype=torch.float64, device=logits.device)
    greedy = torch.ones(len(rows), dtype=torch.bool, device=logits.device)
    block = BLOCK if keeps_all(cache) else 1
    read, retired, before = 0, set(), logits.unsqueeze(1)  # `before` (B, n, V) are the logits before the next n tokens
    while longest:
        n = before.size(1)
        own, valid = tokens[:, read : read + n], inside[:, read : read + n]
        odds = log_softmax(before).gather(-1, own.unsqueeze(-1)).squeeze(-1)
        total += odds.double().masked_fill(~valid, 0.0).sum(-1)
        greedy &= ((before.argmax(-1) == own) | ~valid).all(-1)
        read += n
        if done := {b for b, length in enumerate(lengths) if length <= read} - retired:
            if len(retired := retired | done) == len(rows):
                break
            cache.retire(sorted(done))
        n = min(block, *(length - read for length in lengths if length > read))
        before = model(tokens[:, read - 1 : read - 1 + n], cache)
    return list(zip(total.tolist(), greedy.tolist()))
