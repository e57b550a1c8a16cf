"""What the generation loop drives: prompts into rows, and one more token for every row. Floor 5.

B rows · T tokens · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from litgpt_kv.arguments import PREFILLS
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.plan import limit_of, resolve
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs

BLOCK = 128  # tokens; the logits of a block are (B, BLOCK, V), so a longer one would cost memory and save little
Model = Callable[..., Tensor]


def vocabulary(model: Model) -> int:
    return model.lm_head.out_features


@dataclass
class Prompts:
    """Prompts of different lengths as one right-padded tensor (B, T); a pad is the row's own last token."""

    padded: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, prompts: Sequence[Tensor | Sequence[int]], vocabulary: int, device: torch.device) -> Prompts:
        if not prompts:
            raise ValueError("There are no prompts.")
        rows = [check_prompt(row, vocabulary, f"Prompt {b}").to(device) for b, row in enumerate(prompts)]
        longest = max(map(len, rows))
        padded = torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])
        return cls(padded, [len(row) for row in rows])


def check_prompt(prompt: Tensor | Sequence[int], vocabulary: int, name: str = "The prompt") -> Tensor:
    """A prompt as a 1-D int64 tensor.

    Raises:
        ValueError: If it is empty, not one list of integers, or has a token outside the vocabulary.
    """
    row = torch.as_tensor(prompt)
    if row.dim() != 1 or row.numel() == 0:
        raise ValueError(f"{name} must be a list of at least one token, got shape {tuple(row.shape)}.")
    if row.is_floating_point():
        raise ValueError(f"{name} must be integer token ids, got {row.dtype}.")
    if not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
        raise ValueError(f"{name} has a token outside the vocabulary of {vocabulary}.")
    return row.to(torch.int64)


def check_fit(name: str, tokens: int, max_new_tokens: int, limit: int | None, why: str) -> None:
    """Raises ValueError if a prompt of so many tokens and its new ones do not fit."""
    if limit is not None and tokens + max_new_tokens - 1 > limit:  # the last new token is never read
        raise ValueError(
            f"{name} has {tokens} tokens; with {max_new_tokens} new ones it is over the limit of {limit}: {why}."
        )


def first_pass(model: Model, batch: Prompts, cache: KVCache, method: str) -> tuple[Tensor, list[int]]:
    """Seeds empty rows: the logits (B, V) after the last token read of each row, and how many each has read."""
    lengths = batch.lengths
    if method == "min-length":
        lengths = [min(*lengths, cache.first_chunk)] * len(lengths)
    length = torch.tensor(lengths, device=batch.padded.device)
    return model(batch.padded[:, : max(lengths)], cache, length), lengths


@dataclass
class Limits:
    """What a request must fit: tokens of a row (`limit`, and `why`), tokens of one pass (`most`), vocabulary."""

    vocabulary: int
    limit: int | None
    why: str
    most: int | None

    @classmethod
    def of(cls, model: GPT, args: KVCacheArgs | None, prefill: str, tokens: int | None = None) -> Limits:
        """Those of a cache for rows of so many tokens, or of the largest that the arguments allow."""
        context = model.max_seq_length
        limit, why = context, "the model's context"
        if args is not None:
            limit, why = limit_of(resolve(model.config, args, tokens or context, context), context)
        return cls(vocabulary(model), limit, why, context if prefill == "full" else None)


class Cached:
    """Rows of a cache.

    Args:
        model: Runs prompts.
        decoder: Runs the one-token steps, a compiled model for instance.
        cache: Empty, or with what came before the prompts.
        method: "min-length" or "full".
        chunk: Blocks in which the rest of a prompt is read; None: the longest that changes nothing.
        together: Read the first prompts together also where they differ in length.
    """

    def __init__(
        self,
        model: Model,
        decoder: Model | None,
        cache: KVCache,
        method: str,
        chunk: int | None,
        together: bool = True,
    ) -> None:
        if method not in PREFILLS:
            raise ValueError(f"prefill must be one of {', '.join(PREFILLS)}, got {method!r}.")
        if chunk is not None and not 1 <= chunk <= cache.longest_block:
            raise ValueError(f"prefill_chunk must be 1 to {cache.longest_block} (budget less sinks), got {chunk}.")
        self.model, self.decoder = model, model if decoder is None else decoder
        self.cache, self.method, self.together = cache, method, together or method == "full"
        self.chunk = chunk or (min(BLOCK, cache.longest_block) if cache.exact_blocks else 1)
        self.retire = cache.retire
        self.size, self.device = cache.batch_size, cache.pos.device
        most = model.max_seq_length if method == "full" else None
        self.limits = Limits(vocabulary(model), cache.limit, cache.why, most)

    @property
    def seen(self) -> list[int]:
        """Tokens that each row holds before its prompt."""
        return self.cache.seen

    def begin(self, batch: Prompts) -> tuple[Tensor, list[int]]:
        """Reads the prompts of all rows, as far as the shortest one goes, or one after the other."""
        self.cache.revive()
        if len(batch.lengths) == self.size and (self.together or len(set(batch.lengths)) == 1):
            return self._read(batch, self.cache, any(self.seen))
        single = [self.admit(b, row[:n]) for b, (row, n) in enumerate(zip(batch.padded, batch.lengths))]
        self.retire(range(len(single), self.size))
        logits = torch.cat([its for its, _ in single])
        return torch.nn.functional.pad(logits, (0, 0, 0, self.size - len(single))), [read for _, read in single]

    def admit(self, row: int, prompt: Tensor) -> tuple[Tensor, int]:
        """Gives a row to another prompt: the logits (1, V), and how many of its tokens were read."""
        self.cache.reset([row])
        batch = Prompts(prompt.to(self.device).unsqueeze(0), [len(prompt)])
        logits, (read,) = self._read(batch, self.cache.row(row), False)
        return logits, read

    def step(self, token: Tensor) -> Tensor:
        return self.decoder(token.unsqueeze(1), self.cache).squeeze(1)

    def _read(self, batch: Prompts, cache: KVCache, seeded: bool) -> tuple[Tensor, list[int]]:
        logits, read = (None, [0] * len(batch.lengths)) if seeded else first_pass(self.model, batch, cache, self.method)
        shortest = min(batch.lengths)
        while read[0] < shortest and (self.chunk > 1 or logits is None):
            end = min(read[0] + self.chunk, shortest)
            logits = self.model(batch.padded[:, read[0] : end], cache)[:, -1]
            read = [end] * len(read)
        return logits, read


class Recompute:
    """Stands in for a cache and has none: every step runs the whole text again, the baseline."""

    def __init__(self, model: GPT, rows: int) -> None:
        self.model, self.size, self.context = model, rows, model.max_seq_length
        self.limits = Limits.of(model, None, "min-length")
        self.device = next(model.parameters()).device
        self.text = torch.zeros(rows, self.context, dtype=torch.int64, device=self.device)
        self.length, self.seen = [1] * rows, [0] * rows

    def begin(self, batch: Prompts) -> tuple[Tensor, list[int]]:
        rows, longest = batch.padded.shape
        self.text[:rows, :longest] = batch.padded
        self.length[:rows] = batch.lengths
        return self._logits(), batch.lengths

    def admit(self, row: int, prompt: Tensor) -> tuple[Tensor, int]:
        self.text[row, : len(prompt)] = prompt.to(self.device)
        self.length[row] = len(prompt)
        return self._logits()[row : row + 1], len(prompt)

    def step(self, token: Tensor) -> Tensor:
        end = [min(n, self.context - 1) for n in self.length]  # a row that ended may have no room left
        self.text.scatter_(1, torch.tensor(end, device=self.device).unsqueeze(1), token.unsqueeze(1))
        self.length = [n + 1 for n in end]
        return self._logits()

    def _logits(self) -> Tensor:
        last = torch.tensor(self.length, device=self.device) - 1
        logits = self.model(self.text[:, : max(self.length)])
        return logits[torch.arange(self.size, device=self.device), last]

    def retire(self, rows: Sequence[int]) -> None:
        """Rows are independent: a finished one goes on unseen, from the beginning of its text."""
        for row in rows:
            self.length[row] = 1
