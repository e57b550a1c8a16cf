"""Random calls of the Python interface: TypeError or ValueError, and after each batch everything works as before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from litgpt_kv import LLM, KVCache, KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Request, generate
from litgpt_kv.generate import stream as token_stream
from tests.attack.harness import FAULTS, Case

COUNT, BATCH = 800, 25
ODD: list[Callable[[], Any]] = [  # made anew for every call
    *(lambda v=v: v for v in (None, True, False, 0, 1, 2, 3, -1, 5, 2**31, 2**63 - 1, 2**63, 10**400, -(10**400))),
    *(lambda v=v: v for v in (0.0, 0.5, 1.0, -1.0, 1e308, float("nan"), float("inf"), 1j, "", "x", "20%", "none")),
    *(lambda v=v: v for v in ("h2o", "x\0y", "\ud800", "é🙂", "x" * 20_000, b"x", (), {"a": 1}, {1}, object(), type)),
    *(lambda v=v: v for v in (len, ..., range(3), Path("x"), SamplingArgs(), slice(3))),
    *(lambda v=v: list(v) for v in ([], [1], [[1]], [None], ["x"], ["x", 1])),
    lambda: {},
    lambda: torch.tensor([1, 2, 3]),
    lambda: torch.tensor([]),
    lambda: torch.tensor(1.5),
    lambda: torch.tensor([[1, 2]]),
    lambda: torch.tensor([2**40]),
    lambda: torch.tensor([float("nan")]),
    lambda: KVCacheArgs("h2o", 16),
    lambda: iter([1]),
    lambda: (n for n in [1]),
]
FEW = 3  # new tokens where nothing else is said
GOOD: dict[str, list[Any]] = {
    "prompt": ["def ", ["def ", "import os"]],
    "prompts": [[torch.tensor([1, 2, 3])], [[1, 2], [3]]],
    "max_new_tokens": [1, 2, FEW],
    "kv_cache": ["dense", "h2o", None],
    "cache": ["dense", "h2o", None],
    "budget": [8, "50%"],
    "batch_size": [1, 2],
    "strategy": ["dense", "h2o", "sink", "window"],
    "temperature": [0.0, 1.0],
    "seed": [0, 1],
    "rows": [[0], [0, 1]],
    "count": [1, 2],
    "tokens": [[1, 2, 3]],
}
GENERATE = ["prompt", "sys_prompt", "max_new_tokens", "temperature", "top_k", "top_p", "return_as_token_ids", "stream"]
GENERATE += ["kv_cache", "budget", "batch_size", "prefill", "prefill_chunk", "min_new_tokens", "stop", "seed"]
GENERATE += ["repetition_penalty", "ignore_eos", "logprobs"]
LOW = ["prompts", "cache", "max_new_tokens", "min_new_tokens", "sampling", "stop", "prefill", "prefill_chunk"]
CHAT = ["sys_prompt", "kv_cache", "prefill", "temperature", "top_k", "top_p", "max_tokens", "max_new_tokens", "seed"]


class Target:
    """What is called, and whether it still works."""

    def __init__(self, folder: Path) -> None:
        self.llm, self.folder = LLM.load("demo", accelerator="cpu"), folder
        self.cache = KVCache.build(self.llm.model, KVCacheArgs("h2o", 16), 2, 64)
        self.cache.save(folder / "cache")
        self.expected = self.answer()
        llm, model, cache = self.llm, self.llm.model, self.cache
        self.calls: dict[str, tuple[Callable, list[str], list[str]]] = {  # with what must and what may be given
            "LLM.generate": (llm.generate, ["prompt", "max_new_tokens"], GENERATE),
            "LLM.encode": (llm.encode, ["prompt"], ["sys_prompt"]),
            "LLM.decode": (llm.decode, ["ids"], []),
            "LLM.chat": (llm.chat, [], CHAT),
            "LLM.benchmark": (llm.benchmark, ["prompt", "max_new_tokens"], ["num_iterations", *GENERATE]),
            "LLM.load": (LLM.load, ["model"], ["init", "tokenizer_dir", "precision", "accelerator", "quantize"]),
            "generate": (self._bound(generate), ["prompts", "max_new_tokens"], LOW),
            "stream": (self._bound(token_stream), ["prompts", "max_new_tokens"], LOW),
            "KVCache.build": (self._bound(KVCache.build), [], ["args", "batch_size", "max_tokens", "dtype"]),
            "KVCache.nbytes": (self._sized, ["args", "batch_size", "max_tokens"], ["dtype"]),
            "KVCache.save": (self._save, ["path"], []),
            "KVCache.load": (lambda path, args=None: KVCache.load(path, model, args), ["path"], ["args"]),
            "KVCache.reset": (cache.reset, [], ["rows"]),
            "KVCache.retire": (cache.retire, ["rows"], []),
            "KVCache.row": (cache.row, ["b"], []),
            "KVCache.rows": (cache.rows, ["start", "stop"], []),
            "KVCache.repeat": (cache.repeat, ["count"], []),
            "GPT.forward": (self._forward, ["idx"], ["cache", "length"]),
            "KVCacheArgs": (
                KVCacheArgs,
                [],
                ["strategy", "budget", "sinks", "recent", "storage", "positions", "options"],
            ),
            "SamplingArgs": (SamplingArgs, [], [f.name for f in fields(SamplingArgs)]),
            "Request": (Request, ["prompt"], [f.name for f in fields(Request)][1:]),
        }

    def answer(self) -> list[str]:
        self.cache.reset()
        return self.llm.generate(["def fib(", "import"], max_new_tokens=4, temperature=0.0, kv_cache="h2o", budget=8)

    def _bound(self, function: Callable) -> Callable:
        return lambda *args, **kwargs: function(self.llm.model, *args, **kwargs)

    def _sized(self, **kwargs: Any) -> Any:
        return KVCache.nbytes(self.llm.config, **kwargs)

    def _save(self, path: Any) -> None:
        self.cache.save(self.folder / path if isinstance(path, str) else path)

    def _forward(self, idx: Any, cache: Any = None, length: Any = None) -> Any:
        with torch.inference_mode():
            return self.llm.model(idx, self.cache if cache is None else cache, length)


def tried(first: int, seed: int) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        target, rng = Target(folder), random.Random(seed + first)
        for _ in range(BATCH):
            name = rng.choice(list(target.calls))
            call, must, may = target.calls[name]
            given = {k: _value(k, rng, odd=0.3) for k in must}
            given |= {k: _value(k, rng, odd=0.7) for k in rng.sample(may, min(len(may), rng.randrange(4)))}
            words = f"{name}({', '.join(f'{k}={v!r:.60}' for k, v in given.items())})".encode("unicode_escape").decode()
            try:
                found = call(**given)
                if hasattr(found, "__next__"):
                    list(found)
            except (TypeError, ValueError) as error:
                if len(str(error)) > 2000:
                    broke(folder, words, f"an error of {len(str(error)):,} characters")
            except Exception as error:
                broke(folder, words, f"{type(error).__name__}: {error}")
            if target.answer() != target.expected:
                raise SystemExit(f"other answers than before after {words}")

    return act


def broke(folder: Path, words: str, what: str) -> None:
    with (folder / FAULTS).open("a") as file:
        print(f"{words:.300} {what!r:.150}", file=file)


def _value(name: str, rng: random.Random, odd: float) -> Any:
    if name in GOOD and rng.random() > odd:
        return rng.choice(GOOD[name])
    value = rng.choice(ODD)()
    if "max" in name and isinstance(value, int) and value > 10**6:
        return -value  # an honest request for work without end is no fault
    return value


def cases(seed: int) -> Iterator[Case]:
    for first in range(0, COUNT, BATCH):
        yield Case(f"calls from {first}", tried(first, seed), each=True, tries=BATCH, codes=(0,))
