"""Strange arguments give a readable TypeError or ValueError, or a result; then everything works as before."""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import litgpt_kv
from litgpt_kv import LLM, KVCache, KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Engine, Request, decode, generate, prefill, serve, stream

OURS = str(Path(litgpt_kv.__file__).parent)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("it cannot be shown")


STRANGE = [None, True, -1, 0, 1.5, "x", "", [], {}, object(), 10**400, 10**5000, math.nan, math.inf, b"x", (1,), {1}]
STRANGE += [[[1]], [None], ["a", 1], Unprintable(), 2**63, [True], [-1], [10**400], "none", 1j, [[]], [1.5], "20%"]
STRANGE += [torch.tensor(1.0), torch.tensor([1.5]), torch.zeros(2, 2, dtype=torch.int64)]
PROMPTS = [[1, 2, 3]]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu")


def every_call(llm: LLM) -> dict[str, Callable[[object], object]]:
    """Return calls that take one strange value each, by the name of the argument."""
    model = llm.model

    def cache() -> KVCache:
        return KVCache.build(model, "dense", 1, 64)

    def streamed(**given: object) -> list:
        return list(stream(model, **{"prompts": PROMPTS, "cache": cache(), "max_new_tokens": 2, **given}))

    def served(**given: object) -> list:
        return list(serve(model, **{"requests": [Request([1], 2)], "cache": cache(), **given}))

    def requested(**given: object) -> list:
        return served(requests=[Request(**{"prompt": [1], "max_new_tokens": 2, **given})])

    def engine(**given: object) -> Engine:
        return Engine(**{"model": model, "cache": cache(), **given})

    calls = {
        "generate.prompts": lambda v: generate(model, v, max_new_tokens=2),
        "generate.prompt": lambda v: generate(model, [v], max_new_tokens=2),
        "generate.cache": lambda v: generate(model, PROMPTS, v, max_new_tokens=2),
        "prefill.prompts": lambda v: prefill(model, v, cache()),
        "prefill.cache": lambda v: prefill(model, PROMPTS, v),
        "prefill.method": lambda v: prefill(model, PROMPTS, cache(), v),
        "decode.token": lambda v: decode(model, v, cache()),
        "decode.cache": lambda v: decode(model, torch.tensor([1]), v),
        "serve.request": lambda v: served(requests=[v]),
        "Engine.add": lambda v: engine().add(v),
        "Engine.add.row": lambda v: engine().add(Request([1], 1), v),
        "Engine.abort": lambda v: engine().abort(v),
        "LLM.run": lambda v: list(llm.run(v, None)),
        "LLM.run.request": lambda v: list(llm.run([v], None)),
        "LLM.benchmark": lambda v: llm.benchmark(v if isinstance(v, (str, float)) else "x", prompt="x"),
        "Chat.ask": lambda v: llm.chat(max_tokens=40, max_new_tokens=2).ask(v),
    }
    for run, names in (
        (streamed, "cache max_new_tokens min_new_tokens sampling stop prefill prefill_chunk decoder stats logprobs"),
        (served, "requests cache rows prefill prefill_chunk stats decode_text logprobs"),
        (engine, "model cache rows prefill prefill_chunk pieces stats decoder decode_text logprobs"),
        (requested, "prompt max_new_tokens min_new_tokens sampling stop past stop_texts id"),
        (lambda **given: SamplingArgs(**given), "temperature top_k top_p seed repetition_penalty"),
        (
            lambda **given: KVCache.build(model, KVCacheArgs(**{"strategy": "h2o", **given}), 1, 64),
            "strategy budget sinks recent storage positions options",
        ),
        (
            lambda **given: llm.generate(**{"prompt": "x", "max_new_tokens": 2, **given}),
            "prompt sys_prompt max_new_tokens temperature top_k top_p kv_cache budget batch_size prefill prefill_chunk "
            "min_new_tokens stop repetition_penalty seed",
        ),
        (
            lambda **given: llm.chat(**{"max_tokens": 40, "max_new_tokens": 2, **given}).ask("x"),
            "kv_cache budget max_tokens max_new_tokens temperature seed stop prefill",
        ),
    ):
        for name in names.split():
            calls[f"{run.__name__}.{name}.{len(calls)}"] = lambda v, run=run, name=name: run(**{name: v})
    return calls


def is_ours(error: BaseException) -> bool:
    """Return whether a `raise` of this package raised it, as TypeError or ValueError."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    raised = linecache.getline(file, trace.tb_lineno).strip().startswith("raise")
    return type(error) in (TypeError, ValueError) and file.startswith(OURS) and raised


def test_strange_values_are_refused_in_our_words(llm: LLM) -> None:
    before = llm.generate(["def f(x):", "import"], max_new_tokens=4, seed=3)
    refused, strange = 0, []
    for name, call in every_call(llm).items():
        for value in STRANGE:
            try:
                call(value)
            except BaseException as error:
                refused += is_ours(error)
                if not is_ours(error):
                    strange.append((name, type(value).__name__, type(error).__name__, str(error)[:80]))
    assert strange == []
    assert refused > 1500
    assert llm.generate(["def f(x):", "import"], max_new_tokens=4, seed=3) == before
