"""`litgpt_kv convert_gguf`: convert a GGUF file to a checkpoint folder."""

from __future__ import annotations

import sys

from litgpt_kv.convert.checkpoint import convert


def convert_gguf(file: str, *, out: str, dtype: str | None = None) -> None:
    """Convert a GGUF file to a checkpoint folder.

    Supported architectures: llama (also SmolLM, Mistral and TinyLlama), qwen2, qwen3, gemma, gemma2, gemma3, phi2 and
    phi3.

    Args:
        file: The GGUF file.
        out: The new folder; it must not exist, or must be empty.
        dtype: The dtype of the weights: float32, bfloat16 or float16. By default the file's own 16 bits if it is not
            quantised, else float32, which holds every quantised number exactly.
    """
    made = convert(file, out, dtype)
    weights = f"{made.weight_bytes / 1e6:,.0f} MB of weights in {str(made.dtype).removeprefix('torch.')}"
    print(f"{out}: litgpt's {made.config.name}, {weights}, prompt style {made.style}.")
    if made.note:
        print(made.note, file=sys.stderr)
    print(f"Try: litgpt_kv chat {out}", file=sys.stderr)
