"""Logits that are not finite end a row in an error that names it, and touch no other row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from litgpt_kv import GPT, LLM, KVCache, KVCacheArgs, SamplingArgs
from litgpt_kv.__main__ import main
from litgpt_kv.generate import Request, Stats, generate, serve, stream
from litgpt_kv.generate.sampling import Sampler
from tests.oracle.reference import tiny, tokens_of

GREEDY = SamplingArgs(temperature=0)
SETTINGS = {
    "greedy": GREEDY,
    "drawn": SamplingArgs(),
    "seeded": SamplingArgs(temperature=0.7, top_k=3, top_p=0.9, seed=1),
    "penalty": SamplingArgs(temperature=0.7, repetition_penalty=1.3),
}
INF, NAN = float("inf"), float("nan")
DEMO = Path(__file__).parents[2] / "litgpt_kv" / "demo"
BAD = 7  # the token whose embedding is damaged


@pytest.fixture
def damaged() -> GPT:
    """A model that gives NaN from the moment it reads token 7."""
    model = tiny(seed=5)
    model.transformer.wte.weight[BAD] = NAN
    return model


def clean(seed: int, count: int) -> list[int]:
    return [t if t != BAD else 8 for t in tokens_of(seed, count, 60)]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_sampler_says_which_rows_have_no_distribution(name: str) -> None:
    logits = torch.tensor(
        [
            [0.0, 1.0, 2.0, 3.0, 4.0],
            [0.0, NAN, 2.0, 3.0, 4.0],
            [0.0, 1.0, INF, 3.0, 4.0],
            [-INF] * 5,
            [-INF, -INF, 0.5, -INF, -INF],
            [NAN] * 5,
            [-INF, NAN, -INF, INF, 0.0],
            [0.0, 1.0, 2.0, 3.0, 4.0],
        ]
    )
    sampler = Sampler(8, 5, torch.device("cpu"))
    sampler.assign({b: Request([0], sampling=SETTINGS[name]) for b in range(8)})
    for _ in range(5):
        tokens = sampler(logits).tolist()
        assert [t < 0 for t in tokens] == [False, True, True, True, False, True, True, False]
        assert tokens[4] == 2 and max(tokens) <= 4 and {t for t in tokens if t < 0} == {-1}
    for bad in (3, 1):
        assert sampler(logits, torch.arange(8) != bad).tolist()[bad] == -1, "rows that draw nothing may be bad, too"


def test_a_temperature_under_which_logits_overflow() -> None:
    sampler = Sampler(2, 3, torch.device("cpu"))
    sampler.assign({b: Request([0], sampling=SamplingArgs(temperature=1e-4)) for b in range(2)})
    assert [t < 0 for t in sampler(torch.tensor([[1e36, 0.0, 1.0], [1e3, 0.0, 1.0]])).tolist()] == [True, False]


@pytest.mark.parametrize("prefill", ["min-length", "full"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_row_ends_and_the_others_are_as_alone(damaged: GPT, name: str, prefill: str) -> None:
    seeds = {"drawn": {"seed": 3}, "penalty": {"seed": 4}}.get(name, {})
    sampling = SamplingArgs(**{**vars(SETTINGS[name]), **seeds})
    prompts = [clean(1, 5), [3, BAD, 4], clean(2, 9), [*clean(3, 20), BAD], clean(4, 2), clean(5, 7)]
    requests = [Request(p, 6, sampling=sampling, stop=[[BAD]], min_new_tokens=0) for p in prompts]
    cache = KVCache.build(damaged, KVCacheArgs("h2o", 8), 2, 40)
    found = {row.index: row for step in serve(damaged, requests, cache, prefill=prefill) for row in step if row.reason}
    assert sorted(b for b, row in found.items() if row.reason == "error") == [1, 3]
    assert all(row.error is None for row in found.values() if row.reason != "error")
    assert "logits are not finite after 0 new tokens" in found[3].error and found[3].tokens == []
    for b in (0, 2, 4, 5):
        alone = KVCache.build(damaged, KVCacheArgs("h2o", 8), 1, 40)
        (expected,) = generate(
            damaged, [prompts[b]], alone, max_new_tokens=6, sampling=sampling, stop=[[BAD]], prefill=prefill
        )
        assert found[b].tokens == expected.tolist(), b


def test_what_was_made_before_stays() -> None:
    model, prompts = tiny(seed=5), [clean(1, 5), clean(2, 9)]
    free = [row.tolist() for row in generate(model, prompts, max_new_tokens=12, sampling=GREEDY)]
    others = {*free[1], *prompts[0], *prompts[1]}
    n = next(n for n in range(3, 11) if free[0][n] not in others | set(free[0][:n]))
    model.transformer.wte.weight[free[0][n]] = NAN
    stats, rows = Stats(), [[], []]
    cache, stop = KVCache.build(model, "dense", 2, 40), [[*free[0][n - 1 : n + 1], 60]]
    with pytest.raises(ValueError, match=f"Prompt 0: The model's logits are not finite after {n + 1} new tokens"):
        for step in stream(model, prompts, cache, max_new_tokens=12, sampling=GREEDY, stop=stop, stats=stats):
            for row, new in zip(rows, step):
                row += new
    assert rows == [free[0][: n + 1], free[1]], "tokens that were held back are given, too"
    assert stats.reasons == ["error", "length"] and stats.new_tokens == n + 1 + 12
    with pytest.raises(ValueError, match="Prompt 0: The model's logits"):
        generate(model, prompts, max_new_tokens=12, sampling=GREEDY)


def test_a_least_number_of_tokens_that_bans_all_of_them() -> None:
    model = tiny(seed=5)
    stops = [[t] for t in range(model.lm_head.out_features)]
    for sampling in SETTINGS.values():
        requests = [
            Request([1, 2], 5, least, sampling, stop) for least, stop in ((2, stops), (2, stops[1:]), (0, stops))
        ]
        rows = {r.index: r for step in serve(model, requests, None, rows=3) for r in step}
        reasons = ["error", "length" if rows[1].num_generated == 5 else "stop", "stop"]
        assert [rows[b].reason for b in range(3)] == reasons
        assert "min_new_tokens 2 bans all 61 tokens" in rows[0].error
        assert rows[1].tokens[:2] == [0, 0]


def test_a_step_still_copies_once_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        real = getattr(torch.Tensor, name)

        def noted(self, *args, real=real, name=name):
            calls.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, noted)
    model = tiny(seed=5)
    for logprobs, copy in ((False, ["tolist"]), (True, ["cpu", "tolist", "tolist"])):
        cache = KVCache.build(model, "h2o", 2, 40)
        settings = SamplingArgs(temperature=0.9, top_k=5)
        steps = stream(model, [[1, 2], [3]], cache, max_new_tokens=9, sampling=settings, logprobs=logprobs)
        next(steps), next(steps)
        calls.clear()
        next(steps)
        assert calls == copy


def test_text_raises_and_names_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM.load("demo", accelerator="cpu")
    texts = ["def f(x):", "class Parser:", "import os"]
    expected = llm.generate(texts, max_new_tokens=6, temperature=0.0)
    bad = int(llm.encode(texts[1])[1])
    assert all(bad not in llm.encode(t) for t in (texts[0], texts[2]))
    good = llm.model.transformer.wte.weight[bad].clone()
    with torch.no_grad():
        llm.model.transformer.wte.weight[bad] = NAN
    for batch_size in (None, 1):
        with pytest.raises(ValueError, match="Prompt 1: The model's logits are not finite after 0 new tokens"):
            llm.generate(texts, max_new_tokens=6, temperature=0.0, batch_size=batch_size)
    pieces = []
    with pytest.raises(ValueError, match="Prompt 1"):
        for step in llm.generate(texts, max_new_tokens=6, temperature=0.0, stream=True):
            pieces.append(step)
    assert ["".join(row) for row in zip(*pieces)] == [expected[0], "", expected[2]]
    chat = llm.chat(max_new_tokens=4, temperature=0.0)
    with pytest.raises(ValueError, match=r"not finite after 0 new tokens.*Start a new conversation"):
        chat.ask(texts[1])
    chat.reset()
    assert chat.ask(texts[0])
    with torch.no_grad():
        llm.model.transformer.wte.weight[bad] = good
    assert llm.generate(texts, max_new_tokens=6, temperature=0.0) == expected


def run(*args: object) -> int:
    """Run a command; return its exit code."""
    try:
        main(["generate", *map(str, args), "--accelerator", "cpu", "--threads", "1", "--max-new-tokens", "3"])
    except SystemExit as end:
        return end.code
    return 0


def overflowing(folder: Path) -> Path:
    """The shipped model with weights that are finite and too large: its logits overflow."""
    shutil.copytree(DEMO, folder)
    weights = torch.load(folder / "lit_model.pth", weights_only=True)
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"] * 1e30
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e30
    torch.save(weights, folder / "lit_model.pth")
    return folder


def test_a_file_counts_it_as_failed_and_tries_it_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, questions, out = overflowing(tmp_path / "model"), tmp_path / "q.txt", tmp_path / "a.jsonl"
    questions.write_text("def f(x):\nimport os\n")
    assert run(model, "--prompts", questions, "--out", out) == 1
    err = capsys.readouterr().err
    for number in (1, 2):
        assert f"Line {number} failed: The model's logits are not finite after 0 new tokens" in err
    assert "; 2 ended with an error: --resume tries them again; 0 of 2 lines could not be used." in err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["finish_reason"], r["text"], r["new_tokens"]) for r in records] == [("error", "", 0)] * 2
    assert all("not finite" in r["error"] for r in records)
    assert run(model, "--prompts", questions, "--out", out, "--resume") == 1
    shutil.copy(DEMO / "lit_model.pth", model / "lit_model.pth")
    capsys.readouterr()
    assert run(model, "--prompts", questions, "--out", out, "--resume") == 0
    assert "2 answers in" in (err := capsys.readouterr().err) and "failed" not in err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["line"], r["finish_reason"], r["new_tokens"]) for r in records] == [(1, "length", 3), (2, "length", 3)]
    assert not any("error" in r for r in records)


def test_a_prompt_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = overflowing(tmp_path / "model")
    assert run(model, "--prompt", "def f(x):", "--prompt", "import os") == 1
    assert "Prompt 2 failed: The model's logits are not finite" in capsys.readouterr().err
    assert run("demo", "--prompt", "def f(x):") == 0
