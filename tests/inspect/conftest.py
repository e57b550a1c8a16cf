"""A record of five caches of the shipped model in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.inspect import Record, record

START, TOTAL = 22, 34
TEXT = "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)  # été 😀\n\n\nclass A:\n    pass\n"
CACHES = {
    "h2o": KVCacheArgs("h2o", budget=12),
    "pool": KVCacheArgs("keydiff", budget=12, select="pool"),
    "layer": KVCacheArgs("tova", budget=12, select="layer", interval=3),
    "model": KVCacheArgs("h2o", budget=12, select="model"),
    "sink": KVCacheArgs("sink", budget=12),
    "mixed": KVCacheArgs(["dense", "window", "h2o"] * 2, budget=[None, 6, 9] * 2, positions="absolute"),
}


@pytest.fixture(scope="session")
def llm() -> LLM:
    torch.set_num_threads(1)
    return LLM.load("demo", accelerator="cpu", precision="64-true")


@pytest.fixture(scope="session")
def text(llm: LLM) -> Tensor:
    return llm.encode_text(TEXT)[:TOTAL]


@pytest.fixture(scope="session")
def found(llm: LLM, text: Tensor) -> Record:
    return record(llm, text, START, CACHES)
