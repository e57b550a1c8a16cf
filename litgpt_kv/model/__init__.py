"""litgpt's model with our attention: `GPT`, its attention modules and linear layers."""

from litgpt_kv.model.gpt import GPT

__all__ = ["GPT"]
