"""`litgpt_kv calibrate`: work out from a model and a text what a strategy needs to know of the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from litgpt_kv import registry
from litgpt_kv.arguments import DeviceArgs, Without, check_count
from litgpt_kv.calibrate import query_centres, write_calibration
from litgpt_kv.calibrate.centres import FIRST
from litgpt_kv.cli.loading import load
from litgpt_kv.config import shown
from litgpt_kv.disk import check_target

ONE_DEVICE = Without("devices", "num_nodes", "generate_strategy", "compile")
MOST = 100_000_000  # tokens


def calibrate(
    checkpoint_dir: str,
    *,
    text: str,
    out: str,
    strategy: str = "triattention",
    length: int = 1024,
    max_tokens: int = 65_536,
    device: Annotated[DeviceArgs, ONE_DEVICE] = DeviceArgs(),
) -> None:
    """Work out what a strategy needs to know of a model, and write it to a file.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        text: A text file of the kind that the model will read.
        out: The file, in safetensors' format; the strategy takes it as its option `calibration`.
        strategy: The strategy, also given as --for: triattention.
        length: Tokens of each piece of the text that is read at once, at most the model's context.
        max_tokens: How much of the text is read.
        device: Where to run.
    """
    takes = [n for n in registry.names("strategy") if "calibration" in registry.build("strategy", n).needs]
    if strategy not in takes:
        raise ValueError(f"--for must be one of {', '.join(takes)}, got {shown(strategy)}: others need no calibration.")
    check_count("length", length, FIRST + 1, MOST)
    check_count("max_tokens", max_tokens, FIRST + 1, MOST)
    check_target(out)
    try:
        whole = Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"The text {text!r} cannot be read: {error}.") from error
    llm = load(checkpoint_dir, device)
    ids = llm.encode_text(whole)[:max_tokens].tolist()
    size = min(length, llm.model.max_seq_length)
    rows = [ids[i : i + size] for i in range(0, len(ids), size)]
    rows = [row for row in rows if len(row) > FIRST]
    if not rows:
        raise ValueError(f"The text {text!r} has {len(ids)} tokens: at least {FIRST + 1} are needed.")
    tensors = query_centres(llm.model, tqdm(rows, unit="piece", disable=None, file=sys.stderr))
    write_calibration(out, strategy, tensors, llm.config.name)
    print(f"Read {sum(map(len, rows)):,} tokens; wrote {out}.", file=sys.stderr)
    print(
        f"litgpt_kv generate {checkpoint_dir} --kv-cache {strategy} --kv-cache.calibration {out} --kv-cache.budget 25%"
    )
