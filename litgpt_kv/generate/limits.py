"""Check that a request fits before it is added."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litgpt_kv.arguments import PREFILLS
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.plan import LayerPlan, check_prompt_kept, check_reread, limit_of, resolve
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs, shown
from litgpt_kv.generate.request import Request

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def vocabulary_of(model: abc.Callable[..., Tensor]) -> int:
    """Return the size of a model's vocabulary."""
    if not (callable(model) and hasattr(model, "lm_head")):
        raise TypeError(f"model must be a litgpt_kv.GPT, plain, compiled or wrapped, got {shown(model)}.")
    return model.lm_head.out_features


@dataclass(frozen=True)
class Limits:
    """The limits of a request.

    Attributes:
        vocabulary: The size of the vocabulary; token ids are smaller.
        limit: The most tokens of a row, None for no limit. `why`: the reason, for the message.
        one_pass: The most tokens of a prompt that is read in one pass; None for no limit.
        plans: The plan of each layer, to check that a prompt with `keep_prompt` leaves room.
    """

    vocabulary: int
    limit: int | None
    why: str
    one_pass: int | None
    plans: abc.Sequence[LayerPlan] = ()

    @classmethod
    def of(cls, model: GPT, args: KVCacheArgs | None, prefill: str, tokens: int | None = None) -> Limits:
        """Return the limits for a cache with rows of `tokens` tokens; None: the largest that the arguments allow."""
        context = model.max_seq_length
        limit, why, plans = context, "the model's context", []
        if args is not None:
            plans = resolve(model.config, args, tokens or context, context)
            limit, why = limit_of(plans, context)
        return cls(vocabulary_of(model), limit, why, context if prefill == "full" else None, plans)

    @classmethod
    def of_cache(cls, model: GPT, cache: KVCache, prefill: str) -> Limits:
        """Return the limits of an existing cache."""
        one_pass = model.max_seq_length if prefill == "full" else None
        return cls(vocabulary_of(model), cache.limit, cache.why, one_pass, cache.plans)

    def check(self, request: Request, name: str = "The prompt", seen: int = 0) -> None:
        """Raise ValueError if a request does not fit into a row that has already seen `seen` tokens."""
        prompt, new = check_prompt(request.prompt, self.vocabulary, name), request.max_new_tokens
        tokens = seen + len(prompt)
        if self.limit is not None and tokens + new - 1 > self.limit:  # the last new token is never read
            raise ValueError(
                f"{name} has {tokens} tokens; with {new} new ones it is over the limit of {self.limit}: {self.why}."
            )
        if len(request.past):
            check_prompt(request.past, self.vocabulary, f"The text before {name[0].lower()}{name[1:]}")
        if self.one_pass is not None and len(prompt) > self.one_pass and not seen:
            raise ValueError(
                f"{name} has {len(prompt)} tokens; prefill 'full' reads it in one pass and the model's context is "
                f"{self.one_pass}. The min-length prefill reads longer prompts into a cache that evicts."
            )
        if not seen:
            try:
                check_prompt_kept(self.plans, len(prompt))
                if self.one_pass is not None:
                    check_reread(self.plans, len(prompt), self.one_pass)
            except ValueError as error:
                raise ValueError(f"{name} does not fit: {error}") from error


def check_prompt(prompt: Any, vocabulary: int, name: str = "The prompt") -> Tensor:
    """Return a prompt as a 1-D int64 tensor.

    Raises:
        ValueError: If it is empty, is not a list of integers, or has a token outside the vocabulary.
    """
    try:
        tokens = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be a list of token ids of this vocabulary, got {shown(prompt)}.") from error
    if tokens.dim() != 1 or tokens.numel() == 0:
        raise ValueError(f"{name} must be a list of at least one token, got shape {tuple(tokens.shape)}.")
    if tokens.dtype not in INTEGERS:
        raise ValueError(f"{name} must be integer token ids, got {tokens.dtype}.")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(f"{name} has a token outside the vocabulary of {vocabulary}.")
    return tokens.to(torch.int64)


def check_prefill(method: str) -> None:
    """Raise ValueError if a prefill method is unknown."""
    if method not in PREFILLS:
        raise ValueError(f"prefill must be one of {', '.join(PREFILLS)}, got {shown(method)}.")
