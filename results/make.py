"""Measure what strategies and storages cost in quality on a real model; write tables and plots beside this file.

`make results` runs it: `python results/make.py CHECKPOINT`. It goes on where it was stopped; `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from litgpt_kv import LLM, KVCacheArgs, registry
from litgpt_kv.calibrate import query_centres, write_calibration
from litgpt_kv.evaluate.candidates import Candidate, candidates
from litgpt_kv.evaluate.haystack import prose
from litgpt_kv.evaluate.results import Results
from litgpt_kv.evaluate.runs import ask

HERE = Path(__file__).parent
NAME = "smollm2-135m"
BUDGETS: list[int | str] = ["50%", "25%"]
POOLED = ["keydiff:pool", "expected_attention:pool", "snapkv:pool", "kvzip:pool"]
LONGER = [1000, 2000, 4000]
BATCH = 15


def calibrated(llm: LLM, folder: Path) -> dict[str, Path]:
    """Calibrate the strategies that need it, on text of the kind that the questions use: the file of each."""
    files = {}
    for name in registry.names("strategy"):
        if "calibration" in registry.build("strategy", name).needs:
            files[name] = folder / f"{name}.safetensors"
            if not files[name].exists():
                ids = llm.encode_text(" ".join(prose()[::-1]))[:4096].tolist()
                rows = [ids[i : i + 1024] for i in range(0, len(ids), 1024)]
                write_calibration(files[name], name, query_centres(llm.model, rows), llm.config.name)
    return files


def every_strategy(files: dict[str, Path]) -> list[Candidate]:
    """Every registered strategy, and some whose heads share their slots."""
    slow = {"kvzip"}
    names = [n for n in registry.names("strategy") if n not in slow] + POOLED[:-1] + ["kvzip", POOLED[-1]]
    return [
        replace(c, args=replace(c.args, options={"calibration": str(files[c.spec])})) if c.spec in files else c
        for c in candidates(names, BUDGETS, KVCacheArgs())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    llm = LLM.load(options.checkpoint, accelerator="cpu")
    results = Results({"checkpoint": llm.config.name, "seed": 1, "haystack": "prose"}, options.out, name=f"{NAME}.json")
    if not options.fresh:
        results.resume()
    files = calibrated(llm, Path(options.checkpoint))
    ask(llm, results, candidates(["dense"], BUDGETS, KVCacheArgs()), ["needle"], [700], ("seen",), 30, BATCH)
    ask(llm, results, every_strategy(files), ["needle"], [700], ("unseen", "seen"), 30, BATCH)
    print(results.tables(), file=sys.stderr)


if __name__ == "__main__":
    main()
