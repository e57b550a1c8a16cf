"""Generation for batches of prompts of different lengths."""

from litgpt_kv.generate.base import Stats, decode, generate, prefill, stream

__all__ = ["Stats", "decode", "generate", "prefill", "stream"]
