"""Ask a model questions about long texts, with a cache that compressed the text before or after it saw the question.

A batch of texts is read once, with its questions, for all caches: see `recording`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.evaluate.recording import Recording, record
from litgpt_kv.evaluate.tasks import Example
from litgpt_kv.generate import generate
from litgpt_kv.llm.beginning import encode_later
from litgpt_kv.llm.llm import LLM

GREEDY = SamplingArgs(temperature=0)
MOST_RECORDED = 2_500_000_000  # bytes


@dataclass
class Answered:
    """What a model answered.

    Attributes:
        texts: One an example. scores: The share of what each answer must have.
        seconds: For compressing the texts and answering; the texts had been read before.
        bytes: Of a row of the cache. kept: Tokens that a row of it keeps, at most.
    """

    texts: list[str]
    scores: list[float]
    seconds: float
    bytes: int
    kept: int


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


class Questions:
    """Examples of one kind as token ids.

    Attributes:
        longest: Tokens of the longest row, answer included: a share is taken of it, whatever the batch.
        rows: How many examples can be read at once.
    """

    def __init__(self, llm: LLM, examples: Sequence[Example], batch_size: int) -> None:
        self.llm, self.examples = llm, examples
        self.encoded = [encode(llm, example) for example in examples]
        self.longest = max(e.tokens + x.new_tokens for e, x in zip(self.encoded, examples))
        specs = [block.attn.spec for block in llm.model.transformer.h]
        width = sum((s.heads + s.groups) * s.key_size + s.groups * s.value_size for s in specs)
        row = width * self.longest * llm.model.transformer.wte.weight.element_size()
        self.rows = max(1, min(batch_size, MOST_RECORDED // row))

    def read(self, start: int, stop: int) -> Reading:
        """Read some of the texts with their questions."""
        encoded = self.encoded[start:stop]
        recording = record(self.llm.model, [torch.cat((e.context, e.question)) for e in encoded])
        return Reading(self.llm, self.examples[start:stop], encoded, self.longest, recording)


@dataclass(frozen=True)
class Reading:
    """Examples that were read, for any cache to answer. See `Questions`."""

    llm: LLM
    examples: Sequence[Example]
    encoded: Sequence[Encoded]
    longest: int
    recording: Recording

    def answer(self, args: KVCacheArgs, seen: bool) -> Answered:
        """Answer the questions greedily.

        Args:
            args: What the cache keeps.
            seen: Whether the question stands in the prompt when it is compressed; else the text is compressed first,
                and the question is read token by token.

        Raises:
            ValueError: If the cache cannot be built, or cannot hold the prompts.
        """
        began, model, count = time.perf_counter(), self.llm.model, len(self.examples)
        cache = KVCache.build(model, args.resolved(self.longest), count, self.longest)
        new = [example.new_tokens for example in self.examples]
        if seen:  # the first new token is the recording's
            self.recording.seed(cache)
            first = self.recording.logits.argmax(dim=-1, keepdim=True)
            rows = [torch.cat(pair) for pair in zip(first.cpu(), self._go_on(cache, list(first), [n - 1 for n in new]))]
        else:
            length = torch.tensor([len(e.context) for e in self.encoded], device=self.recording.length.device)
            self.recording.seed(cache, length)
            rows = self._go_on(cache, [e.question for e in self.encoded], new)
        texts = [self.llm.decode(row) for row in rows]
        scores = [example.score(text) for example, text in zip(self.examples, texts)]
        size, kept = cache.allocated()["total"] // count, max(cache.tokens()["kept"])
        return Answered(texts, scores, time.perf_counter() - began, size, kept)

    def _go_on(self, cache: KVCache, prompts: list[Tensor], new: list[int]) -> list[Tensor]:
        return generate(self.llm.model, prompts, cache, max_new_tokens=new, sampling=GREEDY, prefill="full")
