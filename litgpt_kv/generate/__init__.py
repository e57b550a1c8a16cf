"""Generation for batches of prompts of different lengths."""

from litgpt_kv.generate.base import decode, generate, prefill, stream
from litgpt_kv.generate.batching import serve
from litgpt_kv.generate.loop import Stats
from litgpt_kv.generate.request import Request

__all__ = ["Request", "Stats", "decode", "generate", "prefill", "serve", "stream"]
