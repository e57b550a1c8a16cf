"""Key/value caches for litgpt's models: exact, small, fast."""

__version__ = "0.1.0"

from litgpt_kv.api import LLM
from litgpt_kv.cache import KVCache
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.model import GPT
from litgpt_kv.registry import register
from litgpt_kv.strategies import Seen, Strategy

__all__ = ["GPT", "LLM", "KVCache", "KVCacheArgs", "SamplingArgs", "Seen", "Strategy", "register"]
