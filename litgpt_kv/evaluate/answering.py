"""Ask a model questions about long texts, with a cache that compressed the text before or after it saw the question."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.evaluate.tasks import Example
from litgpt_kv.generate import Stats, generate, prefill
from litgpt_kv.llm.beginning import encode_later
from litgpt_kv.llm.llm import LLM

GREEDY = SamplingArgs(temperature=0)


@dataclass
class Answered:
    """What a model answered.

    Attributes:
        texts: One an example. scores: The share of what each answer must have.
        prefill_seconds: Reading contexts. seconds: All.
        bytes: Of the largest cache. kept: Tokens that a row of it keeps, at most.
    """

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    seconds: float = 0.0
    bytes: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Encoded:
    """An example as token ids: all up to the question, and the question with the first words of the answer."""

    context: Tensor
    question: Tensor

    @property
    def tokens(self) -> int:
        return len(self.context) + len(self.question)


def encode(llm: LLM, example: Example) -> Encoded:
    """Put an example into the model's prompt style and cut it before the question."""
    text = llm.prompt_style.apply(f"{example.context}\n\n{example.question}")
    at = text.rindex(example.question)
    ids = llm.encode_text(text[:at].rstrip("\n"))
    rest = encode_later(llm.tokenizer, "\n\n" + text[at:] + example.lead)
    return Encoded(ids, torch.tensor(rest, device=llm.fabric.device))


def answer(llm: LLM, examples: Sequence[Example], args: KVCacheArgs, seen: bool, batch_size: int) -> Answered:
    """Answer examples greedily, `batch_size` at a time.

    Args:
        args: What the cache keeps; a share is taken of the longest row: its text, question and answer.
        seen: Whether the question stands in the prompt when it is compressed; else the text is compressed first, and
            the question is read token by token.
    """
    out, began = Answered(), time.perf_counter()
    encoded = [encode(llm, example) for example in examples]
    longest = max(e.tokens + x.new_tokens for e, x in zip(encoded, examples))
    args = args.resolved(longest)
    for start in range(0, len(examples), batch_size):
        part, given = examples[start : start + batch_size], encoded[start : start + batch_size]
        cache = KVCache.build(llm.model, args, len(part), longest)
        stats, before = Stats(), time.perf_counter()
        prompts = [torch.cat((e.context, e.question)) if seen else e.context for e in given]
        if not seen:
            prefill(llm.model, prompts, cache, "full")
            out.prefill_seconds += time.perf_counter() - before
            prompts = [e.question for e in given]
        new = [example.new_tokens for example in part]
        rows = generate(llm.model, prompts, cache, max_new_tokens=new, sampling=GREEDY, prefill="full", stats=stats)
        out.prefill_seconds += stats.prefill_seconds if seen else 0.0
        out.texts += [llm.decode(row) for row in rows]
        out.bytes = max(out.bytes, cache.allocated()["total"] // len(part))
        out.kept = max(out.kept, *cache.tokens()["kept"])
    out.scores = [example.score(text) for example, text in zip(examples, out.texts)]
    out.seconds = time.perf_counter() - began
    return out
