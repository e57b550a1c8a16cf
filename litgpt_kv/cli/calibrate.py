"""`litgpt_kv calibrate`: work out from a model and a text what a strategy needs to know of the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

from torch import Tensor
from tqdm import tqdm

from litgpt_kv.arguments import DeviceArgs, Without, check_count
from litgpt_kv.calibrate import (
    deserved_budgets,
    passkey_text,
    query_centres,
    retrieval_gates,
    write_calibration,
)
from litgpt_kv.calibrate.centres import FIRST
from litgpt_kv.cli.loading import load
from litgpt_kv.config import shown
from litgpt_kv.disk import check_target, reason
from litgpt_kv.llm.llm import LLM

ONE_DEVICE = Without("devices", "num_nodes", "generate_strategy", "compile")
MOST = 100_000_000  # tokens
LEAST = 8  # tokens of a piece


def calibrate(
    checkpoint_dir: str,
    *,
    text: str,
    out: str,
    strategy: str = "triattention",
    length: int = 1024,
    max_tokens: int = 65_536,
    keep: float = 0.25,
    device: Annotated[DeviceArgs, ONE_DEVICE] = DeviceArgs(),
) -> None:
    """Work out what a strategy needs to know of a model, and write it to a file.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        text: A text file of the kind that the model will read.
        out: The file, in safetensors' format; the strategy takes it as its option `calibration`.
        strategy: The strategy, also given as --for: triattention (centres of queries), duo (which heads retrieve), or
            budgets (what each layer deserves, for any strategy).
        length: Tokens of each piece of the text that is read at once, at most the model's context.
        max_tokens: How much of the text is read.
        keep: For budgets: the part of the tokens that will be kept.
        device: Where to run.
    """
    if strategy not in MEASURES:
        raise ValueError(f"--for must be one of {', '.join(MEASURES)}, got {shown(strategy)}: others need none.")
    check_count("length", length, FIRST + 1, MOST)
    check_count("max_tokens", max_tokens, FIRST + 1, MOST)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1:
        raise ValueError(f"keep must be over 0 and below 1, got {shown(keep)}.")
    if strategy == "budgets" and not out.endswith(".safetensors"):
        raise ValueError(f"A file for budgets has a name that ends with .safetensors, got {shown(out)}.")
    check_target(out)
    try:
        whole = Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"The text {text!r} cannot be read: {reason(error)}.") from error
    llm = load(checkpoint_dir, device)
    ids = llm.encode_text(whole)[:max_tokens].tolist()
    size = min(length, llm.model.max_seq_length)
    rows = [ids[i : i + size] for i in range(0, len(ids), size)]
    rows = [row for row in rows if len(row) >= LEAST]
    if not rows:
        raise ValueError(f"The text {text!r} has {len(ids)} tokens: at least {LEAST} are needed.")
    write_calibration(out, strategy, MEASURES[strategy](llm, rows, size, keep), llm.config.name)
    print(f"Read {sum(map(len, rows)):,} tokens; wrote {out}.", file=sys.stderr)
    if strategy == "budgets":
        use = f"--kv-cache keydiff --kv-cache.budget_pattern {out}"
    else:
        use = f"--kv-cache {strategy} --kv-cache.calibration {out}"
        use += " --kv-cache.select model --kv-cache.floor 0" if strategy == "duo" else ""
    print(f"litgpt_kv generate {checkpoint_dir} {use} --kv-cache.budget 25%")


def _progress(rows: list) -> Iterable:
    return tqdm(rows, unit="piece", disable=None, file=sys.stderr)


def _gates(llm: LLM, rows: list[list[int]], size: int, keep: float) -> dict[str, Tensor]:
    """Passkeys in the pieces of the text."""

    def encode(sentence: str) -> list[int]:
        return llm.tokenizer.encode(sentence, bos=False).tolist()

    texts = [passkey_text(row, size, encode, seed) for seed, row in enumerate(rows) if len(row) == size]
    texts = texts or [passkey_text(rows[0], size, encode, 0)]
    return retrieval_gates(llm.model, _progress(texts))


MEASURES: dict[str, Callable[[LLM, list[list[int]], int, float], dict[str, Tensor]]] = {
    "triattention": lambda llm, rows, size, keep: query_centres(llm.model, _progress(rows)),
    "duo": _gates,
    "budgets": lambda llm, rows, size, keep: deserved_budgets(llm.model, _progress(rows), keep),
}
"""What can be measured, by the name after --for: from a model, pieces of a text, their size, and what is kept."""
