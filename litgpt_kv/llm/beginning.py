"""Token ids of prompts that begin as the model was trained: with one beginning-of-text token, or none, never two.

Two can come from a `tokenizer.json` that adds one and a prompt style that has it in its text: litgpt's `encode` adds
none of its own then, but keeps both. Llama 3's files do so, and SmolLM2's, where the token is `<|im_start|>`.
"""

from __future__ import annotations

from litgpt.tokenizer import Tokenizer


def encode_first(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text that begins a row: litgpt's, where a repeated beginning-of-text token stands once."""
    ids = tokenizer.encode(text).tolist()
    begin = tokenizer.bos_id
    while len(ids) > 1 and ids[0] == ids[1] == begin:
        del ids[0]
    return ids


def encode_later(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text that goes on: what it says, and nothing that the tokenizer adds at the beginning or end."""
    if tokenizer.backend == "huggingface":
        return tokenizer.processor.encode(text, add_special_tokens=False).ids
    return tokenizer.encode(text, bos=False).tolist()
