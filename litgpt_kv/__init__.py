"""Key/value caches for litgpt's models: exact, small, fast."""

__version__ = "0.1.0"

from litgpt_kv.attention.kernels import Kernel
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.storage.base import Storage
from litgpt_kv.cache.strategies.base import Strategy, Tokens
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.llm.llm import LLM
from litgpt_kv.registry import register

__all__ = [
    "GPT",
    "LLM",
    "KVCache",
    "KVCacheArgs",
    "Kernel",
    "SamplingArgs",
    "Seen",
    "Storage",
    "Strategy",
    "Tokens",
    "register",
]

Seen = Tokens
"""The old name of `Tokens`."""
