"""Random arguments of the Python interface: each call works or raises a readable TypeError or ValueError."""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import litgpt_kv
from litgpt_kv import LLM, KVCacheArgs, SamplingArgs
from litgpt_kv.arguments import DeviceArgs, RunArgs, StoppingArgs

OURS = str(Path(litgpt_kv.__file__).parent)


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("it does not show itself")


JUNK = [None, True, -1, 0, 1, 2**63, 10**400, 10**5000, -(10**400), 0.5, math.nan, math.inf, 1e308, "", "x", "h2o"]
JUNK += ["none", "\ud800", "\0", "20%", "1e9%", "x" * 100_000, [], [1], [None], ["x"], [[1]], {}, {"a": 1}, (), (1, 2)]
JUNK += [b"x", object(), Unshowable(), torch.tensor(1), torch.zeros(2), Path("x"), len, int, KVCacheArgs("h2o")]
JUNK += [SamplingArgs(), range(3), {1, 2}, iter([1]), 3j]
SAMPLING = ["temperature", "top_k", "top_p", "seed", "repetition_penalty", "min_p"]
SAMPLING += ["frequency_penalty", "presence_penalty"]
STOPPING = ["min_new_tokens", "stop", "ignore_eos"]
GENERATE = ["prompt", "sys_prompt", "return_as_token_ids", "stream", "kv_cache", "budget", "batch_size", "prefill"]
GENERATE += ["prefill_chunk", "logprobs", "unknown", *SAMPLING, *STOPPING]
CHAT = ["sys_prompt", "kv_cache", "budget", "prefill", "unknown", *SAMPLING, *STOPPING]
LOAD = ["model", "init", "tokenizer_dir", "precision", "accelerator", "quantize", "distribute"]
CACHE = ["strategy", "budget", "sinks", "recent", "storage", "positions", "options"]
DEVICE = ["precision", "accelerator", "devices", "num_nodes", "generate_strategy", "threads", "quantize", "compile"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu")


def calls(llm: LLM, rng: random.Random) -> dict[str, Callable[[], Any]]:
    """Return one call of each kind with random arguments."""

    def junk(names: list[str]) -> dict[str, Any]:
        return {name: rng.choice(JUNK) for name in rng.sample(names, rng.choice((1, 1, 2)))}

    def generate() -> None:
        given = {"prompt": "def f", "max_new_tokens": 1, **junk(GENERATE)}
        out = llm.generate(**given)
        if given.get("stream"):
            list(out)

    def chat() -> None:
        llm.chat(**{"max_new_tokens": 1, **junk(CHAT)}).ask(rng.choice(["hi", *JUNK]))

    return {
        "generate": generate,
        "chat": chat,
        "load": lambda: LLM.load(**{"model": "demo", "accelerator": "cpu", **junk(LOAD)}),
        "cache": lambda: llm.generate("def f", max_new_tokens=1, kv_cache=KVCacheArgs(**junk(CACHE))),
        "request": lambda: llm.request(rng.choice(JUNK)),
        "encode": lambda: llm.encode(rng.choice(JUNK), rng.choice(JUNK)),
        "sampling": lambda: SamplingArgs(**junk(SAMPLING)).rows(2),
        "stopping": lambda: StoppingArgs(**junk(["max_new_tokens", *STOPPING])),
        "run": lambda: RunArgs(**junk(["batch_size", "prefill", "prefill_chunk", "logprobs"])),
        "device": lambda: DeviceArgs(**junk(DEVICE)),
        "benchmark": lambda: llm.benchmark(
            rng.choice([1, "x", None, 0]), prompt="a", max_new_tokens=1, **junk(SAMPLING)
        ),
    }


@pytest.mark.parametrize("seed", range(4))
def test_junk(seed: int, llm: LLM) -> None:
    expected = llm.generate("def f", max_new_tokens=5, temperature=0.0)
    rng, refusals = random.Random(seed), 0
    for _ in range(25):
        for kind, call in calls(llm, rng).items():
            try:
                call()
            except (TypeError, ValueError) as error:
                refusals += 1
                last = traceback.extract_tb(error.__traceback__)[-1]
                assert last.filename.startswith(OURS), (kind, error, last)
                assert len(str(error)) < 1000, kind
    assert refusals > 100
    assert llm.generate("def f", max_new_tokens=5, temperature=0.0) == expected


def test_an_unknown_argument_names_the_known_ones(llm: LLM) -> None:
    with pytest.raises(TypeError, match=r"generate\(\) has no argument 'temprature'; it takes .*min_p.*temperature"):
        llm.generate("a", temprature=1)
    with pytest.raises(TypeError, match=r"chat\(\) has no argument 'batch_size'; it takes .*max_new_tokens"):
        llm.chat(batch_size=2)
