"""`tests/soak_serve.py` finds what it looks for."""

from __future__ import annotations

import random

import httpx

from litgpt_kv import LLM
from tests import soak_serve
from tests.serve.conftest import serving
from tests.serve.test_behaviour import until

POSTED = ("wrong body", "unknown path", "large body", "large body in parts")


def test_what_goes_wrong_is_seen(llm: LLM) -> None:
    """Nothing at a good server; nonsense that is answered; and what grows."""
    with serving(llm, soak_serve.CACHES, rows=2, max_body=soak_serve.MOST_BODY, body_timeout=0.2) as server:
        load = soak_serve.Load(server.url, seconds=60)
        rng = random.Random(2)
        with httpx.Client(timeout=60) as client:
            for step in [load.completion, load.turn, load.completion] + 25 * [load.nonsense]:
                step(rng, client)
            load.killed(rng)
            assert (load.wrong, load.counts["nonsense"], len(load.kept)) == ([], 25, 2)
            assert len([kind for kind in load.counts if kind[-3:].isdigit()]) >= 8, "many kinds"
            load.posted = lambda *_: 500  # type: ignore[method-assign]
            for _ in range(9):
                load.nonsense(rng, client)
        assert load.wrong and set(load.wrong) <= {f"{kind}: 500" for kind in POSTED}
        until(lambda: server.service.loop.unfinished == 0)
    steady = [(100 + n % 7, 3, 20 + n % 5) for n in range(50)]
    assert soak_serve.growth(steady) == []
    assert soak_serve.growth([(mb + n, *more) for n, (mb, *more) in enumerate(steady)])[0].startswith(
        "memory (MB) grew"
    )
    assert soak_serve.growth([(mb, 3, files + n) for n, (mb, _, files) in enumerate(steady)])[0].startswith(
        "open files grew"
    )
