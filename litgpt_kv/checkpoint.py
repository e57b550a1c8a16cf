"""The old path of `litgpt_kv.llm.checkpoint`."""

from litgpt_kv.llm.checkpoint import DEMO

__all__ = ["DEMO"]
