"""Encode prompts with one beginning-of-text token or none, never two.

There would be two if `tokenizer.json` adds one and the prompt style has one in its text: litgpt's `encode` keeps both.
This happens with Llama 3, and with SmolLM2, whose token is `<|im_start|>`.
"""

from __future__ import annotations

from litgpt.tokenizer import Tokenizer


def encode_first(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return litgpt's tokens of a text at the start of a row, with at most one beginning-of-text token."""
    ids = tokenizer.encode(text).tolist()
    begin = tokenizer.bos_id
    while len(ids) > 1 and ids[0] == ids[1] == begin:
        del ids[0]
    return ids


def encode_later(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text that continues a row, without tokens that the tokenizer adds at its start or end."""
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, bos=False).tolist()
