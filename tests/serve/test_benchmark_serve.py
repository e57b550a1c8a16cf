"""`litgpt_kv benchmark_serve`: what it prints are the numbers of what happened."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.arguments import DeviceArgs
from litgpt_kv.benchmark import load, serve
from litgpt_kv.benchmark.serve import Measured, Way, percentile
from litgpt_kv.benchmark.servers import NoServer, other_peer, our_peer
from tests.serve.conftest import serving

CACHES = {"h2o": KVCacheArgs("h2o", budget=24)}


def test_servers_beside_the_engine(llm: LLM, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Another server of OpenAI's form, one that is not there, one that fails to start and one that cannot answer."""
    options = ["--requests", "5", "--clients", "2", "--rows", "2", "--new-tokens", "6", "--prompt-tokens", "8"]
    options += ["--repeats", "1", "--kv-cache", "h2o", "--against", "gone=http://127.0.0.1:1", "--against"]
    options += [f"broken={sys.executable} -S -c 'raise SystemExit(\"no model here\")' {{port}}", "--against"]
    (tmp_path / "health").touch()
    options += [f"files={sys.executable} -m http.server --directory {tmp_path} --bind 127.0.0.1 {{port}}"]
    with serving(llm, CACHES, rows=2) as server, serving(llm, CACHES, rows=2, name="org/other") as other:
        main(["benchmark_serve", "--url", server.url, "--against", f"other={other.url}/", *options])
        made = [each.service.metrics.new_tokens._value.get() for each in (server, other)]
    assert made == [2 * 6 + 5 * 6] * 2, "two requests to warm up, and five"
    out = capsys.readouterr().out
    assert "5 requests with 6 new tokens, 2 clients, 2 rows" in out
    rows = {line[:15].strip(): line[17:] for line in out.splitlines()}
    for name in ("engine alone", "litgpt_kv serve", "other"):
        numbers = [float(number.replace(",", "")) for number in re.findall(r"[\d.,]+", rows[name])]
        median, best, answered, good, *seconds = numbers
        assert median == best > 0 and median == pytest.approx(6 * answered, rel=0.01) and 0 <= good <= answered
        for first, second, third in (seconds[:3], seconds[3:6], seconds[6:]):
            assert 0 < first <= second <= third
    assert rows["gone"] == "not measured: nothing answers at http://127.0.0.1:1"
    assert rows["broken"] == "not measured: did not start (exit 1): no model here"
    assert rows["files"].startswith("not measured: status 501")
    assert re.search(r"HTTP costs at most 10% .* -?\d+\.\d%  (yes|no)\n", out)
    assert re.search(r"p99 between tokens, all rows busy, .* \d+\.\d\d  (yes|no) \(the engine alone: ", out)
    assert re.search(r"at least 3 times the tokens/s of litgpt serve, 2 clients +-  -\n", out)


def test_goals_are_medians_of_ratios(capsys: pytest.CaptureFixture) -> None:
    def runs(*speeds: float, late: float = 1.0) -> list[Measured]:
        return [Measured(1.0, int(s), 1, busy=[0.1] * 98 + [late / 10] * 2, steps=[0.1, 0.1, 0.5]) for s in speeds]

    ways = [("engine alone", runs(100, 200, 100)), ("litgpt_kv serve", runs(91, 150, 95, late=1.25))]
    ways += [("litgpt serve", runs(30, 30, 30)), ("litgpt serve --stream", runs(20, 20, 20))]
    serve._show_goals([Way(name, None, measured) for name, measured in ways], 8, 8)  # type: ignore[arg-type]
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()[1:]]
    found = [[part.strip() for part in line if part.strip()][-2:] for line in lines]
    assert found == [["9.0%", "yes"], ["1.25", "yes (the engine alone: 1.00)"], ["3.2", "yes"]]


def test_what_a_client_notes(llm: LLM) -> None:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"prompt": "def fib(", "max_tokens": 9, "temperature": 0, **usage}
    with serving(llm, CACHES, rows=2, queue=0) as server:
        url = f"{server.url}/v1/completions"
        timings = asyncio.run(load.run(url, [body] * 4, clients=2, rate=None, seed=0))
        refused = asyncio.run(load.run(url, [{"prompt": []}], clients=1, rate=100.0, seed=0))
        whole = asyncio.run(load.ask(url, {**body, "stream": False, "stream_options": None}))
    expected = llm.generate("def fib(", max_new_tokens=9, temperature=0.0, kv_cache=CACHES["h2o"])
    assert [timing.text for timing in [*timings, whole]] == [expected] * 5
    assert all(timing.tokens == 9 and timing.status == 200 and timing.good for timing in [*timings, whole])
    assert all(timing.sent < timing.first <= timing.ended for timing in timings)
    assert all(sum(timing.gaps) <= timing.ended - timing.first for timing in timings)
    assert [timing.status for timing in refused] == [400] and "prompt must be" in refused[0].error
    gone = asyncio.run(load.ask(url, body))
    assert not gone.good and gone.status == 0 and gone.error.startswith("ConnectionRefusedError")


@pytest.mark.parametrize("is_chunked", [True, False])
def test_answers_of_litgpts_server(is_chunked: bool) -> None:
    """Objects by lines, which may come in any pieces; an error in the middle is no answer."""

    async def read(data: bytes) -> load.Timing:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"}")
            writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n\r\n" if is_chunked else b"\r\n"))
            for at in range(0, len(data), 7):
                part = data[at : at + 7]
                writer.write(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
                await writer.drain()
            writer.write(b"0\r\n\r\n" if is_chunked else b"")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await load.ask(f"http://127.0.0.1:{port}/predict", {"prompt": "a"})

    timing = asyncio.run(read(b'{"output": "f"}\n{"output": "("}\n{"output": ""}\n{"output": "x"}'))
    assert (timing.text, len(timing.times), timing.tokens, timing.good) == ("f(x", 3, None, True)
    timing = asyncio.run(read(b'data: {"choices": [{"text": "f"}]}\n\ndata: {"error": {"message": "lost"}}\n\n'))
    assert (timing.text, timing.error, timing.good) == ("f", "lost", False)


def test_gaps_while_all_rows_make_tokens() -> None:
    """The reference counts the answers that are made in each moment of each gap."""
    rng, found = random.Random(7), 0
    for _ in range(40):
        timings = [load.Timing(0.0, times=sorted(rng.random() for _ in range(rng.randrange(9)))) for _ in range(6)]
        spans = [(t.times[0], t.times[-1]) for t in timings if t.times]
        edges = sorted({edge for span in spans for edge in span})
        expected = []
        for before, after in sorted(pair for t in timings for pair in zip(t.times, t.times[1:])):
            moments = [before, *(edge for edge in edges if before < edge < after), after]
            middles = [(a + b) / 2 for a, b in pairwise(moments)]
            if all(sum(first < middle < last for first, last in spans) >= 3 for middle in middles):
                expected.append(after - before)
        assert load.busy_gaps(timings, 3) == expected
        found += len(expected)
    assert found > 100
    assert load.busy_gaps([load.Timing(0.0, times=[0.0, 1.0])], 2) == load.busy_gaps([load.Timing(0.0)], 1) == []


def test_commands_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DeviceArgs(threads=2, precision="64-true")
    ours = " ".join(our_peer(None, "demo", KVCacheArgs("h2o", budget=9), device, rows=3, max_tokens=5).command)
    assert ours.endswith(
        "-m litgpt_kv serve demo --accelerator auto --rows 3 --max-tokens 5 "
        '--kv-cache {"strategy": "h2o", "budget": 9} --precision 64-true --threads 2 --port {port}'
    )
    for name, stream in (("litgpt", "false"), ("litgpt-stream", "true")):
        peer = other_peer(name, "folder", 9, device)
        assert " ".join(peer.command).endswith(
            "-m litgpt serve folder --accelerator auto --precision 64-true --max_new_tokens 9 --top_k 1 "
            f"--timeout 3600 --stream {stream} --port {{port}}"
        )
        assert peer.body("a", 9, None) == {"prompt": "a"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoServer, match="pip install litserve"), peer.running(1):
        pass


def test_percentiles_and_refusals(capsys: pytest.CaptureFixture) -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], p) for p in (0, 50, 99)] == [1.0, 3.0, 4.0]
    for options, says in (
        (["--rate", "0"], "rate must be"),
        (["--between-limit", "-1"], "between_limit must be"),
        (["--url", "ftp://a"], "url must"),
        (["--url", "http://127.0.0.1:1"], "litgpt_kv serve: nothing answers at http://127.0.0.1:1."),
        (["--rows", "0"], "rows"),
        (["--against", "vllm"], "against must be litgpt"),
        (["--against", "a=python server.py"], "with {port} in it"),
        (["--against", "a=python '"], "No closing quotation"),
        (["--against", "a=http://b:1", "--against", "a=http://b:2"], "a name of its own"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["benchmark_serve", *options])
        assert end.value.code == 2 and says in capsys.readouterr().err, options
