"""Measure what strategies and storages cost in quality on a real model; write tables and plots beside this file.

`make results` runs it: `python results/make.py CHECKPOINT`. It goes on where it was stopped; `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from litgpt_kv import LLM, KVCacheArgs, registry
from litgpt_kv.cli.calibrate import calibrate
from litgpt_kv.disk import write_text
from litgpt_kv.evaluate.candidates import Candidate, candidates
from litgpt_kv.evaluate.haystack import prose
from litgpt_kv.evaluate.picture import draw, draw_ranking, draw_storages, draw_streams
from litgpt_kv.evaluate.report import report
from litgpt_kv.evaluate.results import Results
from litgpt_kv.evaluate.runs import ask, read

NAME = "smollm2-135m"
BUDGETS: list[int | str] = ["50%", "25%"]
SHARED = ["keydiff:pool", "snapkv:pool", "duo:model floor=0", "kvzip:pool floor=0", "kvzip:model floor=0"]
SHARED += ["expected_attention:pool epsilon=0.01"]  # the epsilon of kvpress' leaderboard; with 0 it finds nothing
STORAGES = ["float8", "int8", "k8v4", "int4", "int4-hadamard", "kivi"]
EVICTING_STORAGES = ["int8", "k8v4", "int4-hadamard"]
LONGER = {1000: 20, 2000: 20, 4000: 20}  # tokens of a text: questions
QUESTIONS, BATCH = 30, 15
TOKENS = 700  # of a text with a needle
ROOM = 64  # slots beside the share of the text that stays: the question and the answer evict nothing
ROWS, PROMPT, READ = 16, 500, 125  # texts for the storages, side by side; tokens of each
STREAM, WINDOW, STREAM_PROMPT = 20_000, 1024, 512


def calibrated(checkpoint: Path) -> dict[str, Path]:
    """Calibrate the strategies that need it, on text of the kind that the questions use: the file of each."""
    files = {}
    for name in registry.names("strategy"):
        if "calibration" in registry.build("strategy", name).needs:
            files[name] = checkpoint / f"{name}.safetensors"
            if not files[name].exists():
                with TemporaryDirectory() as folder:
                    text = Path(folder) / "prose.txt"
                    text.write_text(" ".join(prose()[::-1]), encoding="utf-8")
                    where = {"text": str(text), "out": str(files[name])}
                    calibrate(str(checkpoint), **where, strategy=name, max_tokens=4096)
    return files


def every_strategy(files: dict[str, Path]) -> list[Candidate]:
    """Every registered strategy, and some whose heads share their slots."""
    own = [name for name in registry.names("strategy") if name != "duo"]
    made = map(with_room, candidates([*own, *SHARED], BUDGETS, KVCacheArgs()))
    return [
        replace(c, args=replace(c.args, options={"calibration": str(files[name])}))
        if (name := str(c.args.strategy)) in files
        else c
        for c in made
    ]


def with_room(candidate: Candidate) -> Candidate:
    """Keep the share of the text alone, once it is read, as published tables do: `ROOM` tokens leave together then.

    Where all layers share one budget, tokens leave in each layer: there the share is of all tokens, answer included.
    """
    if candidate.budget is None or candidate.args.select == "model":
        return candidate
    kept = round(TOKENS * float(str(candidate.budget).rstrip("%")) / 100)
    return replace(candidate, args=replace(candidate.args, budget=kept + ROOM, interval=ROOM))


def storages() -> list[Candidate]:
    """Every storage with all tokens, and half and a quarter of the tokens with some of them."""
    full = candidates(["dense", *(f"dense@{name}" for name in STORAGES)], BUDGETS, KVCacheArgs())
    return full + candidates(["keydiff", *(f"keydiff@{name}" for name in EVICTING_STORAGES)], BUDGETS, KVCacheArgs())


def streams() -> list[Candidate]:
    """What goes on for ever: with the first four tokens, and without them."""
    window = KVCacheArgs("window", budget=WINDOW, positions="cache")
    return [Candidate("sink", WINDOW, KVCacheArgs("sink", budget=WINDOW)), Candidate("window", WINDOW, window)]


def measure(llm: LLM, results: Results, folder: Path) -> None:
    """Measure all that is not measured yet, half of the questions first."""
    asked = every_strategy(calibrated(folder))
    for until in (BATCH, QUESTIONS):
        ask(llm, results, asked, ["needle"], [TOKENS], ("unseen", "seen"), QUESTIONS, BATCH, until=until)
    words = llm.encode_text(" ".join(prose()))
    size = PROMPT + READ + 1
    read(llm, results, storages(), words[: ROWS * size].view(ROWS, size), PROMPT, dtype=torch.bfloat16)
    dense = [Candidate("dense", None, KVCacheArgs("dense"))]
    for tokens, count in LONGER.items():
        ask(llm, results, dense, ["needle"], [tokens], ("unseen",), count, BATCH)
    context = llm.model.max_seq_length
    options = {"blocks": True, "compare": False}
    read(llm, results, streams(), words[:STREAM].view(1, -1), STREAM_PROMPT, "stream", **options)
    read(llm, results, dense, words[:context].view(1, -1), STREAM_PROMPT, "stream", **options)


def publish(results: Results, folder: Path, context: int) -> None:
    """Write the tables and the pictures."""
    write_text(folder / f"{NAME}.md", report(results, NAME))
    needles = [c for c in results.cells if c["task"] == "needle" and c["tokens"] == TOKENS and "score" in c]
    if needles:
        draw_ranking(needles, folder / f"{NAME}-needles")
    draw(needles, folder, f"{NAME}-bytes")
    if stored := [c for c in results.cells if c["task"] == "text" and "kl" in c]:
        draw_storages(stored, folder / f"{NAME}-storages")
    if streamed := [c for c in results.cells if c["task"] == "stream" and "nll" in c]:
        draw_streams(streamed, folder / f"{NAME}-stream", 250, STREAM_PROMPT, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a folder in litgpt's layout; calibration files are put there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where results go")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    llm = LLM.load(options.checkpoint, accelerator="cpu")
    settings = {"checkpoint": llm.config.name, "seed": 1, "haystack": "prose"}
    results = Results(settings, options.out, name=f"{NAME}.json")
    if not options.fresh:
        results.resume()
    try:
        measure(llm, results, Path(options.checkpoint))
    finally:  # what there is, if it is stopped
        publish(results, options.out, llm.model.max_seq_length)
    print(f"{options.out / NAME}.md is complete after {(time.perf_counter() - began) / 60:.0f} minutes of this run.")


if __name__ == "__main__":
    main()
