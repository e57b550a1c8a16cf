"""The example in CONTRIBUTING.md, run as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STRATEGY, USE = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)

GENERATE = """
import torch
from litgpt.config import Config
from litgpt_kv import GPT, KVCache, registry

config = Config(name="x", n_layer=2, n_head=4, n_query_groups=2, n_embd=32, block_size=256, padded_vocab_size=64)
torch.manual_seed(0)
model = GPT(config).double()
cache = KVCache.build(model, args, batch_size=2, max_tokens=200)
text = torch.randint(0, 64, (2, 200))
with torch.no_grad():
    model(text[:, :150], cache, torch.tensor([150, 150]))
    for t in range(150, 200):
        model(text[:, t : t + 1], cache)
assert cache.tokens() == {"seen": [200, 200], "kept": [64, 64]}
for head in cache.inspect(1)[0].heads:
    assert set(range(185, 200)) <= set(head.positions.tolist())  # 16 are protected
    torch.testing.assert_close(head.scores, head.keys.norm(dim=-1))  # sharpness 1: the score is the length of the key
assert "unusual" in registry.names("strategy")
print("done")
"""


def test_the_complete_strategy_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unusual.py").write_text(STRATEGY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    command = [sys.executable, "-c", USE + GENERATE]
    done = warm.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


def test_it_is_a_strategy_under_20_lines() -> None:
    body = STRATEGY[STRATEGY.index("@register") :].strip().splitlines()
    assert len(body) < 20
