"""`litgpt_kv recommend`: what fits, what is chosen, and the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from litgpt_kv import LLM, KVCache, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.evaluate import recommend
from litgpt_kv.evaluate.candidates import candidates
from litgpt_kv.evaluate.recommend import (
    Measured,
    Request,
    choose,
    fitting,
    measure,
    options,
    parse_bytes,
    parse_tokens,
    sentences,
    weights_bytes,
)

CODE = Path(recommend.__file__).read_text(encoding="utf-8")


def test_tokens_and_bytes() -> None:
    assert [parse_tokens(x) for x in ("32k", "1M", "500", 500)] == [32_768, 2**20, 500, 500]
    assert [parse_bytes(x) for x in ("24GB", "0.5 gb", 2, "1.5", "512MiB")] == [
        24 * 10**9, 5 * 10**8, 2 * 10**9, 15 * 10**8, 2**29,
    ]  # fmt: skip
    for wrong in ("32g", "0", "-1", "k", "", True):
        with pytest.raises(ValueError, match="context must be a number of tokens"):
            parse_tokens(wrong)
    for wrong in ("24XB", "0", "GB", "-1GB", "0.0000000001B", True):
        with pytest.raises(ValueError, match="memory must be a size"):
            parse_bytes(wrong)


def test_sentences() -> None:
    assert sentences("One is here. Two? Three\nfour  five") == ("One is here.", "Two?", "Three", "four five")


def measured(name: str, size: int, kl: float, top1: float, found: int) -> Measured:
    (candidate,) = candidates([name], [40], KVCacheArgs())
    return Measured(candidate, size, kl, top1, found, 0.01)


def test_choice() -> None:
    full, half = measured("dense", 1000, 0.0, 1.0, 8), measured("dense@int8", 500, 1e-4, 0.99, 8)
    small, sink = measured("keydiff", 250, 0.05, 0.9, 6), measured("sink", 200, 0.02, 0.96, 0)
    names = {k: v.candidate.spec for k, v in choose([sink, small, half, full]).items()}
    assert names == {"safest": "dense", "balanced": "dense@int8", "smallest": "keydiff"}, "sink forgets the numbers"
    blind = [measured(m.candidate.spec, m.bytes, m.kl, m.top1, 1) for m in (full, half, small)] + [sink]
    assert choose(blind)["balanced"].candidate.spec == "sink", "a model that finds nothing cannot say who forgets"
    assert {m.candidate.spec for m in choose([measured("sink", 9, 2.0, 0.3, 0)]).values()} == {"sink"}
    as_good = measured("dense@plain", 900, 1e-9, 1.0, 8)
    assert choose([full, as_good])["safest"] is as_good, "what is lost to rounding does not count"


def test_what_fits_is_what_would_be_allocated() -> None:
    demo = LLM.load("demo", accelerator="cpu")
    asked = Request(512, 4, 10**9)
    fit, refused = fitting(demo, asked)
    assert not refused
    candidate, size = next((c, n) for c, n in fit if c.spec == "keydiff:pool@int8")
    cache = KVCache.build(demo.model, candidate.args.resolved(512), 4, 512)
    assert size == cache.allocated()["total"]
    limit = Request(512, 4, weights_bytes(demo) + size)
    kept = {c.name: n for c, n in fitting(demo, limit)[0]}
    assert candidate.name in kept and "dense" not in kept and max(kept.values()) == size
    for context, budgets in ((4096, ["25%", "12.5%"]), (32_768, ["3.1%", "1.5%"])):
        beyond = [c.name for c, _ in fitting(demo, Request(context, 1, 10**9))[0]]
        assert beyond == [f"sink {budget}" for budget in budgets], "others end at the model's context"
    with pytest.raises(ValueError, match="context must be at most 51,200: the model's is 1,024 tokens, got 60,000"):
        fitting(demo, Request(60_000, 1, 10**9))
    for prompt, tokens, message in (
        (1000, 20, r"up to 1,064 tokens, over the model's context of 1,024: give a smaller text_prompt \(now 1,000\)"),
        (100, 5, "sink 3.1% cannot be measured on 102 tokens: The budget must be more than the sinks"),
        (9000, 5, r"The text has \d,\d+ tokens: 9,006 are needed, or a smaller"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(demo, fitting(demo, Request(32_768, 1, 10**9))[0], CODE, tokens, prompt)
    assert options(candidate, 512) == (
        f"--kv-cache keydiff --kv-cache.budget {cache.plans[0].slots} --kv-cache.select pool --kv-cache.storage int8"
    )


def test_the_command_prints_three_caches_whose_options_work(capsys: pytest.CaptureFixture) -> None:
    torch.set_num_threads(1)
    common = ["recommend", "demo", "--accelerator", "cpu", "--threads", "1", "--context", "300", "--text", "prose"]
    more = ["--batch-size", "2", "--precision", "32-true"]
    main([*common, *more, "--memory", "1GB", "--text_prompt", "90", "--text_tokens", "30"])
    out = capsys.readouterr().out
    assert "2 rows of 300 tokens, memory 1.000 GB" in out and "so they did not count" in out
    assert "A server takes the same --kv-cache options, with --rows 2 --max-tokens 300." in out
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines() if re.match(r"(safest|balanced|smallest)  ", line)]
    assert [line[0] for line in lines] == ["safest", "balanced", "smallest"] and lines[0][1] == "dense"
    assert lines[0][3:5] == ["0.0000", "100.0%"] and float(lines[2][2]) <= float(lines[1][2]) <= float(lines[0][2])
    commands = re.findall(r"^  litgpt_kv (generate demo .*)$", out, re.M)
    names = re.findall(r"^(\w+(?:, \w+)*):$", out, re.M)
    assert ", ".join(names) == "safest, balanced, smallest" and len(commands) == len(names) == len({*commands})
    for command in commands:
        assert command.endswith("--precision 32-true --batch-size 2")
        main(shlex.split(command))
    with pytest.raises(SystemExit):
        main([*common, "--memory", "1MB"])
    refused = (
        r"None of \d+ caches fits. Of the smallest, keydiff:pool@int8 25%: it needs 0\.\d+ GB with the weights. Fewer"
    )
    assert re.search(refused, capsys.readouterr().err)
