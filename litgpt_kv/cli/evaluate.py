"""`litgpt_kv evaluate`: what strategies and budgets cost in quality, on any checkpoint, without a network."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from litgpt_kv.arguments import DeviceArgs, Without, check_count
from litgpt_kv.cli.loading import load
from litgpt_kv.config import KVCacheArgs, shown
from litgpt_kv.disk import reason, write_text
from litgpt_kv.evaluate.candidates import candidates
from litgpt_kv.evaluate.haystack import prose
from litgpt_kv.evaluate.picture import draw, draw_text
from litgpt_kv.evaluate.results import Results
from litgpt_kv.evaluate.runs import ask, read
from litgpt_kv.evaluate.tasks import check_depths, check_task

MOST = 1_000_000  # of everything that is counted
ONE_DEVICE = Without("devices", "num_nodes", "generate_strategy", "compile")
ASKED, READ = ("examples", "haystack", "depths"), ("text", "text_tokens", "text_prompt")  # settings of each kind
QUESTIONS = {"seen": ("seen",), "unseen": ("unseen",), "both": ("unseen", "seen")}


def evaluate(
    checkpoint_dir: str,
    *,
    strategies: list[str] | None = None,
    budgets: list[int | str] | None = None,
    tasks: list[str] | None = None,
    lengths: list[int] | None = None,
    depths: list[float] | None = None,
    examples: int = 30,
    questions: str = "both",
    haystack: str = "prose",
    text: str | None = None,
    text_tokens: int = 1500,
    text_prompt: int = 500,
    batch_size: int = 8,
    seed: int = 1,
    out: str | None = None,
    resume: bool = False,
    kv_cache: KVCacheArgs = KVCacheArgs(),
    device: Annotated[DeviceArgs, ONE_DEVICE] = DeviceArgs(),
) -> None:
    """Measure what strategies and budgets cost in quality: questions about long texts, and a text read token by token.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        strategies: Which caches to compare (default: all that need no calibration file): NAME, NAME:pool,
            NAME@STORAGE, "NAME OPTION=VALUE", my_file.py:MyStrategy.
        budgets: Of the strategies that evict: tokens, or shares of the longest row (default: --kv-cache.budget,
            or 50% and 25%).
        tasks: Kinds of questions (default: needle): needle, multi-key, multi-value, multi-query, variables,
            common-words, frequent-words; an empty list asks none.
        lengths: Tokens of the texts (default: 700).
        depths: Where needles are hidden, in turns: 0 is the beginning of a text, 1 its end (default: spread evenly).
        examples: Questions of each kind and length.
        questions: Whether a question is "seen" when the text is compressed, "unseen", or "both", one after the other.
        haystack: What needles are hidden in: prose (Python's manual) or noise (a few sentences again and again).
        text: A text file to read token by token, for perplexity and the difference from a full cache; "prose" is
            Python's manual.
        text_tokens: How much of it.
        text_prompt: How much of that is read at once, as a prompt.
        batch_size: Questions at a time.
        seed: Of the questions.
        out: A folder for results.json, results.md, and pictures: quality.png and .svg of answers, text.png and .svg of
            the text.
        resume: Go on with the results in that folder; what is not asked for now may be asked for later.
        kv_cache: What all caches have in common: positions, sinks, interval, and options for those that have them.
        device: Where to run.
    """
    counts = {"examples": examples, "text_tokens": text_tokens, "text_prompt": text_prompt, "batch_size": batch_size}
    for name, value in counts.items():
        check_count(name, value, 1, MOST)
    if questions not in QUESTIONS:
        raise ValueError(f"questions must be one of {', '.join(QUESTIONS)}, got {shown(questions)}.")
    if resume and out is None:
        raise ValueError("--resume goes with --out FOLDER.")
    base = KVCacheArgs.of(kv_cache)
    if base is None:
        raise ValueError("kv_cache 'none' keeps nothing: choose strategies with --strategies.")
    own = base.budget if isinstance(base.budget, (int, str)) else None
    compared = candidates(strategies, budgets or ([own] if own is not None else ["50%", "25%"]), base)
    asked = ["needle"] if tasks is None else tasks
    for name in asked:
        check_task(name, haystack)
    check_depths(depths)
    for length in lengths or ():
        check_count("lengths", length, 1, MOST)
    words = None if text is None else text_of(text)
    settings = {"checkpoint": checkpoint_dir, "examples": examples, "haystack": haystack, "seed": seed}
    settings |= {"text": text, "text_tokens": text_tokens, "text_prompt": text_prompt}
    settings["kv_cache"] = {k: v for k, v in asdict(base).items() if k not in ("strategy", "budget")}
    if depths is not None:
        settings["depths"] = depths
    for name in ("quantize", "precision"):  # results of other weights are not continued with these
        if getattr(device, name) is not None:
            settings[name] = getattr(device, name)
    results = Results(settings, None if out is None else Path(out))
    if results.folder is not None:
        results.folder.mkdir(parents=True, exist_ok=True)
        if resume:
            results.resume((() if asked else ASKED) + (() if words is not None else READ))
        elif results.path is not None and results.path.exists():
            raise ValueError(f"{results.path} exists: --resume continues it, or choose another folder.")
    llm = load(checkpoint_dir, device)
    try:
        if words is not None:  # first: a text that is too short is noticed at once
            print(f"Reading a text with {len(compared)} caches.", file=sys.stderr)
            ids = llm.encode_text(words)[:text_tokens].unsqueeze(0)
            read(llm, results, compared, ids, text_prompt)
        if asked:
            count = len(asked) * len(lengths or [700]) * examples * len(QUESTIONS[questions])
            print(f"Asking {len(compared)} caches {count} questions each.", file=sys.stderr)
            ask(llm, results, compared, asked, lengths or [700], QUESTIONS[questions], examples, batch_size)
    except KeyboardInterrupt:
        if results.folder is not None:
            print(f"\nStopped. The same command with --resume goes on with {out}.", file=sys.stderr)
        raise
    print(results.tables())
    if results.folder is not None:
        write_text(results.folder / "results.md", results.tables())
        pictures = draw(results.cells, results.folder) + draw_text(results.cells, results.folder)
        files = ["results.json", "results.md", *(path.name for path in pictures)]
        print(f"Written to {out}: {', '.join(files)}.", file=sys.stderr)


def text_of(path: str) -> str:
    """A text file, or Python's manual for "prose".

    Raises:
        ValueError: If it cannot be read.
    """
    if path == "prose":
        return " ".join(prose())
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"The text {path!r} cannot be read: {reason(error)}.") from error
