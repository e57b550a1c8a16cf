"""`litgpt_kv recommend`: three caches to choose from, for a model, a context, a memory and a text."""

from __future__ import annotations

import sys
from shlex import quote
from typing import Annotated

from tqdm import tqdm

from litgpt_kv.arguments import DeviceArgs, check_count
from litgpt_kv.cli.evaluate import MOST, ONE_DEVICE, text_of
from litgpt_kv.cli.loading import load
from litgpt_kv.evaluate.recommend import (
    NEEDLES,
    Measured,
    Request,
    choose,
    fitting,
    measure,
    options,
    parse_bytes,
    parse_tokens,
    weights_bytes,
)

ROUNDING = 1e-4  # nats; float32 stays far below
SAME_WEIGHTS = ("precision", "quantize")  # options of the printed commands, as they change the bytes


def recommend(
    checkpoint_dir: str,
    *,
    context: str | int,
    memory: str | float,
    text: str,
    batch_size: int = 1,
    text_tokens: int = 250,
    text_prompt: int = 750,
    device: Annotated[DeviceArgs, ONE_DEVICE] = DeviceArgs(),
) -> None:
    """Measure caches that fit into memory on a text of yours; print three of them, with the options that use them.

    Safest loses least. Balanced and smallest are the smallest caches that still predict 95% and 85% of the tokens as
    the full cache does, and find most of the numbers that are hidden in the text.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        context: The most tokens of a row, prompt included: 32k is 32 times 1,024.
        memory: For the weights and the cache, as 24GB (24 times 10^9 bytes) or 512MiB; a number alone is GB.
        text: A text file of the kind that the model will read; "prose" is Python's manual.
        batch_size: The number of rows.
        text_tokens: How much of the text is read token by token, in up to five pieces.
        text_prompt: How much is read before each piece, at once; numbers are hidden in as much. Budgets are shares of
            both together, as they are shares of the whole context later.
        device: Where to run.
    """
    asked = Request(parse_tokens(context), batch_size, parse_bytes(memory))
    for name, value in (("batch_size", batch_size), ("text_tokens", text_tokens), ("text_prompt", text_prompt)):
        check_count(name, value, 1, MOST)
    words = text_of(text)
    llm = load(checkpoint_dir, device)
    fit, refused = fitting(llm, asked)
    weights, rows = weights_bytes(llm), "1 row" if batch_size == 1 else f"{batch_size} rows"
    print(
        f"{llm.config.name}: weights {_gb(weights)} GB, {rows} of {asked.context:,} tokens, memory "
        f"{_gb(asked.memory)} GB. Activations are not counted."
    )
    if not fit:
        name, why = refused[-1]
        hint = "Fewer rows, a shorter context, more memory or other weights (--precision, --quantize) may help."
        raise ValueError(f"None of {len(refused)} caches fits. Of the smallest, {name}: {why.rstrip('.')}. {hint}")
    with tqdm(unit="part", disable=None, file=sys.stderr) as bar:
        measured = measure(
            llm, fit, words, text_tokens, text_prompt, lambda what: (bar.set_description(what), bar.update())
        )
    chosen = choose(measured)
    print(_table(chosen))
    print("ms a step: here, of up to five rows.")
    where = "".join(f" --{name} {value}" for name in SAME_WEIGHTS if (value := getattr(device, name)) is not None)
    where += f" --batch-size {batch_size}" if batch_size > 1 else ""
    commands: dict[str, list[str]] = {}
    for name, one in chosen.items():
        command = f"litgpt_kv generate {quote(checkpoint_dir)} {options(one.candidate, asked.context)}{where}"
        commands.setdefault(command, []).append(name)
    for command, names in commands.items():
        print(f"\n{', '.join(names)}:\n  {command}")
    print(f"\nA server takes the same --kv-cache options, with --rows {batch_size} --max-tokens {asked.context}.")
    if len(commands) == 1:
        print("All three are the same: no smaller cache that fits loses little enough on this text.")
    if 2 * chosen["safest"].found < NEEDLES:
        print("This model does not find hidden numbers, so they did not count.")
    if any(one.candidate.spec == "dense" and one.kl > ROUNDING for one in measured):
        print("Dense loses nothing; its difference is rounding, as the full cache reads blocks of tokens.")
    if refused:
        name, why = refused[0]
        print(f"{len(refused)} of {len(refused) + len(fit)} caches did not fit; {name}: {why.rstrip('.')}.")


def _table(chosen: dict[str, Measured]) -> str:
    head = ("choice", "cache", "GB", "KL to full", "same token", f"found of {NEEDLES}", "ms a step")
    rows = [
        (
            name,
            one.candidate.name,
            _gb(one.bytes),
            f"{one.kl:.4f}",
            f"{100 * one.top1:.1f}%",
            str(one.found),
            f"{1000 * one.seconds:.1f}",
        )
        for name, one in chosen.items()
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join("  ".join(x.ljust(width) for x, width in zip(row, widths)).rstrip() for row in (head, *rows))


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f}" if size < 10**10 else f"{size / 1e9:.1f}"
