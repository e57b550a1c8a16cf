"""A server of the shipped model in float64, so that an answer in a batch equals the same prompt alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import openai
import pytest

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.serve.server import Server
from litgpt_kv.serve.settings import ServeArgs

CACHES = {
    "h2o": KVCacheArgs("h2o", budget=24),
    "dense": KVCacheArgs(),
    "window": KVCacheArgs("window", budget=16),
    "none": None,
}
Serve = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without a limit of their own wait for a minute, also on a busy machine."""
    for name in ("get", "post", "stream"):
        monkeypatch.setattr(httpx, name, functools.partial(getattr(httpx, name), timeout=60))


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu", precision="64-true")


@contextlib.contextmanager
def serving(llm: LLM, caches: Any = CACHES, *, port: int = 0, rows: int = 4, **settings: Any) -> Iterator[Server]:
    """A server on a port that the system chooses; at the end nothing waits or runs."""
    options = {name: settings.pop(name) for name in ("sampling", "stopping", "run") if name in settings}
    server = Server(llm, caches, ServeArgs(port=port, rows=rows, **settings), **options)
    with server.running():
        yield server
    assert server.service.loop.unfinished == 0
    assert not server.service.loop.is_alive


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with serving(llm) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
