"""Layers with a sliding window: a full cache to compare with holds what the window drops, and nobody can lose it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from litgpt_kv import LLM, KVCache, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.evaluate import fidelity
from litgpt_kv.evaluate.shadow import REFERENCE, Shadow, kl_divergence, log_softmax, lost_by_layer
from litgpt_kv.inspect import record
from tests.oracle.reference import Oracle, Policy, arguments, tiny, tokens_of

WINDOW, START, TOTAL = 9, 20, 32
LOCAL = dict(sliding_window_size=WINDOW, sliding_window_indices=[1, 0], scale_embeddings=True, post_attention_norm=True)
MODELS = {
    "gemma2": dict(attention_logit_softcapping=3.0, final_logit_softcapping=2.0, attention_scores_scalar=9),
    "gemma3": dict(norm_qk=True, rope_local_base_freq=50.0, rope_indices=[1, 0]),
}
POLICIES = [
    Policy(),
    Policy("window", 6),
    Policy("h2o", 7, recent=2),
    Policy("tova", 14, recent=1, interval=3, select="layer"),
    Policy("sink", 8, sinks=2, positions="cache"),
]


def in_windows(policy: Policy) -> list[Policy]:
    """What a policy comes to in a layer with a window, and in one without."""
    if policy.budget >= WINDOW:
        return [Policy("window", WINDOW, positions=policy.positions), policy]
    return [replace(policy, sinks=0) if policy.positions == "absolute" else policy, policy]


@pytest.mark.parametrize("kind", MODELS)
def test_lost_attention_and_kl_equal_the_reference_at_every_step(kind: str) -> None:
    model, tokens = tiny(seed=7, **LOCAL, **MODELS[kind]), tokens_of(3, TOTAL)
    caches = {policy.name: arguments(policy) for policy in POLICIES}
    shadow = Shadow(model, torch.tensor(tokens[:START]), caches, TOTAL)
    whole, others = Oracle(model, Policy()), {p.name: Oracle(model, in_windows(p)) for p in POLICIES}
    seen, largest = START, dict.fromkeys(caches, (0.0, 0.0))
    expected, found = whole.feed(tokens[:START])[-1], {n: o.feed(tokens[:START])[-1] for n, o in others.items()}
    while True:
        for name, other in others.items():
            lost = [
                sum(sum(received[p] for p in received.keys() - set(kept)) for received, kept in zip(*heads)) / 2
                for heads in zip(whole.last, other.kept)
            ]
            shares = lost_by_layer(shadow.full, shadow.caches[name])
            torch.testing.assert_close(shares, torch.tensor(lost, dtype=torch.float64), rtol=0, atol=1e-8)
            kl = kl_divergence(log_softmax(shadow.full_logits), log_softmax(shadow.logits[name]))
            p, q = (moment.logits.log_softmax(-1) for moment in (expected, found[name]))
            torch.testing.assert_close(kl[0], (p.exp() * (p - q)).sum(), rtol=0, atol=1e-8)
            largest[name] = tuple(max(pair) for pair in zip(largest[name], lost))
        if seen == TOTAL:
            break
        steps = 2 if seen % 3 == 0 else 1  # a full cache may read blocks
        block = tokens[seen : seen + steps]
        shadow.read_full(torch.tensor(block))
        expected, seen = whole.feed(block)[-1], seen + len(block)
        for name, other in others.items():
            shadow.read(name, torch.tensor(block))
            found[name] = [other.feed([token])[-1] for token in block][-1]
    assert max(largest["dense"]) < 1e-12 and largest["tova"][0] < 1e-12, "what a window drops is not lost"
    assert largest["tova"][1] > 0.05 and min(*largest["window"], *largest["h2o"], *largest["sink"]) > 0.05


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with windows of 16 tokens in all layers but the last."""
    folder = tmp_path_factory.mktemp("local") / "demo"
    shutil.copytree(Path(fidelity.__file__).parents[1] / "demo", folder)
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    config |= {"sliding_window_size": 16, "sliding_window_indices": [1, 1, 1, 1, 1, 0]}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_fidelity_reads_blocks_longer_than_the_window(local: Path) -> None:
    llm = LLM.load(str(local), accelerator="cpu", precision="64-true")
    ids = llm.encode_text(Path(fidelity.__file__).read_text())[:120]
    found = fidelity.measure(llm, ids, 40, {"dense": KVCacheArgs(), "h2o": KVCacheArgs("h2o", budget=12)})
    assert max(found["dense"].kl) < 1e-8 and max(found["dense"].lost) < 1e-8 and all(found["dense"].agrees)
    page = record(llm, ids[:-1], 40, {"h2o": KVCacheArgs("h2o", budget=12)}).cache("h2o")
    assert found["h2o"].kl == pytest.approx(page.kl[:-1], rel=1e-5, abs=1e-9)
    assert found["h2o"].lost == pytest.approx(page.lost[[64, 79]].mean(-1), rel=1e-5) and min(found["h2o"].lost) > 0.05
    full = KVCache.build(llm.model, REFERENCE, 1, 120)
    assert [plan.slots for plan in full.plans] == [120] * 6 and full.plans[0].window == 16


def test_the_commands_work_with_windows(local: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common, out = [str(local), "--accelerator", "cpu", "--threads", "1", "--text", "prose"], tmp_path / "a.html"
    main(["inspect", *common, "--text-tokens", "60", "--strategies", "[dense, tova]", "--out", str(out)])
    dense, tova = capsys.readouterr().out.splitlines()[1:]
    assert dense.split()[1:] == ["0.0000", "100%", "0.0%", "23", "of", "60"]  # 16 in five layers, 60 in the last
    assert tova.startswith("tova 25%") and float(tova.split()[2]) > 0
    text = ["--text-tokens", "90", "--text-prompt", "40"]
    main(["evaluate", *common, *text, "--tasks", "[]", "--strategies", "[dense]"])
    assert "| dense | all |" in capsys.readouterr().out
