"""`litgpt_kv benchmark_serve`: what it prints are the numbers of what happened."""

from __future__ import annotations

import asyncio
import re

import pytest

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.benchmark import load
from litgpt_kv.benchmark.serve import percentile
from tests.serve.conftest import serving

CACHES = {"h2o": KVCacheArgs("h2o", budget=24)}


def test_a_server_beside_the_engine(llm: LLM, capsys: pytest.CaptureFixture) -> None:
    options = ["--requests", "5", "--clients", "2", "--rows", "2", "--new-tokens", "6", "--prompt-tokens", "8"]
    with serving(llm, CACHES, rows=2) as server:
        main(["benchmark_serve", "--url", server.url, "--repeats", "1", "--kv-cache", "h2o", *options])
        assert server.service.metrics.new_tokens._value.get() == 5 * 6
    out = capsys.readouterr().out
    table = {line[:40].strip(): line[40:].split("  ") for line in out.splitlines() if line[40:].strip()}
    assert "5 requests, 2 clients" in out and "engine alone" in out and "litgpt_kv serve" in out
    rows = {name: [value.strip() for value in values if value.strip()] for name, values in table.items()}
    assert all(float(value.replace(",", "")) > 0 for value in rows["new tokens/s"])
    assert rows["without an answer"] == ["0", "0"]
    for name in ("first token", "between tokens", "end to end"):
        for value in rows[f"{name}, p50 · p90 · p99 ms"]:
            first, second, third = map(float, re.findall(r"[\d.]+", value.replace(",", "")))
            assert 0 < first <= second <= third


def test_what_a_client_notes(llm: LLM) -> None:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"prompt": "def fib(", "max_tokens": 9, "temperature": 0, **usage}
    with serving(llm, CACHES, rows=2, queue=0) as server:
        url = f"{server.url}/v1/completions"
        timings = asyncio.run(load.run(url, [body] * 4, clients=2, rate=None, seed=0))
        refused = asyncio.run(load.run(url, [{"prompt": []}], clients=1, rate=100.0, seed=0))
    expected = llm.generate("def fib(", max_new_tokens=9, temperature=0.0, kv_cache=CACHES["h2o"])
    assert [timing.text for timing in timings] == [expected] * 4
    assert all(timing.tokens == 9 and timing.status == 200 for timing in timings)
    assert all(timing.sent < timing.first <= timing.ended for timing in timings)
    assert all(sum(timing.gaps) <= timing.ended - timing.first for timing in timings)
    assert [timing.status for timing in refused] == [400]


def test_percentiles_and_refusals(capsys: pytest.CaptureFixture) -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], p) for p in (0, 50, 99)] == [1.0, 3.0, 4.0]
    for options, says in (
        (["--rate", "0"], "rate must be"),
        (["--url", "ftp://a"], "url must"),
        (["--rows", "0"], "rows"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["benchmark_serve", *options])
        assert end.value.code == 2 and says in capsys.readouterr().err
