"""The part of `LLM` that `run` and `chat` use; a protocol, so that they do not import it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from litgpt.config import Config
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.parallel import ParallelStrategy


class TextModel(Protocol):
    """A model, its tokenizer and its devices; `LLM` documents the attributes."""

    config: Config
    model: GPT | None
    decoder: Callable[..., Tensor]
    tokenizer: Tokenizer
    prompt_style: PromptStyle
    parallel: ParallelStrategy | None
    threads: int | None
    last_run: Any

    def encode(self, prompt: str, sys_prompt: str | None = None) -> Tensor: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    @property
    def temperature(self) -> float: ...

    def ends(self) -> list[list[int]]: ...

    def build_cache(self, args: KVCacheArgs, batch_size: int, tokens: int) -> KVCache: ...
