"""Our own caches, to be measured beside those of other libraries."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from litgpt_kv.benchmark.parallel import cache_args
from litgpt_kv.benchmark.peers.base import Job, Variant, name_of, step_bytes
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.model.packed import is_changed_to_compile
from litgpt_kv.model.quantized import Int8Linear


class Ours(Variant):
    """A strategy of ours.

    Args:
        job: What is run.
        strategy: Its name, with a `select` after a colon.
        compiled: Whether the decode step is compiled.
        chunk: Tokens of a block; strategies that evict read a prompt in blocks after a first pass of as many tokens as
            they keep. None: in one pass.
    """

    def __init__(self, job: Job, strategy: str, compiled: bool, chunk: int | None) -> None:
        self.name = f"{strategy}, compiled" if compiled else strategy
        own = compiled and is_changed_to_compile(job.model, job.rows)
        self.model = copy.deepcopy(job.model) if own else job.model
        self.decoder = CompiledDecoder(self.model) if compiled else self.model
        self.cache = KVCache.build(self.model, cache_args(strategy, job.budget), job.rows, job.total, static=compiled)
        self.chunk = chunk if chunk is None else min(chunk, self.cache.longest_block)
        self.lengths: list[int] = []
        self.weights = "int8" if isinstance(job.model.lm_head, Int8Linear) else name_of(job.dtype)
        self.weight_bytes, self.token_bytes = step_bytes(job.model), job.token_bytes

    def prefill(self, prompts: list[Tensor]) -> Tensor:
        self.cache.reset()
        self.cache.set_prompt_lengths({row: len(prompt) for row, prompt in enumerate(prompts)})
        self.lengths = [len(prompt) for prompt in prompts]
        if len(set(self.lengths)) == 1:
            return self._read(torch.stack(prompts), self.cache)
        return torch.cat([self._read(p.unsqueeze(0), self.cache.row(row)) for row, p in enumerate(prompts)])

    def _read(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read prompts (B, T) of the same length: logits (B, V)."""
        size = tokens.size(1)
        first = size if self.chunk is None else min(size, self.cache.first_chunk)
        logits = self.model(tokens[:, :first], cache, torch.full((len(tokens),), first, device=tokens.device))
        for start in range(first, size, self.chunk or size):
            logits = self.model(tokens[:, start : start + self.chunk], cache)[:, -1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        with self.cache.expect(max(self.lengths)):
            logits = self.decoder(tokens.unsqueeze(1), self.cache)
        self.lengths = [length + 1 for length in self.lengths]
        return logits[:, -1]

    def read_bytes(self, lengths: list[int]) -> int:
        held = self.cache.allocated()
        rows_and_slots = self.cache.batch_size * sum(plan.slots for plan in self.cache.plans)
        kept = sum(min(length, plan.slots) for length in lengths for plan in self.cache.plans)
        return self.weight_bytes + (held["keys"] + held["values"]) * kept // rows_and_slots


def our_variants(job: Job, strategies: Sequence[str], chunk: int | None) -> list[Ours]:
    """Return each strategy with an eager step and, if the job asks for it, with a compiled one."""
    ways = (False, True) if job.compiled else (False,)
    return [Ours(job, strategy, compiled, chunk) for strategy in strategies for compiled in ways]
