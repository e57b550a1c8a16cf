"""What a new user meets: notes about caches, statistics as JSON, settings that differ, piped conversations."""

from __future__ import annotations

import io
import json
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch

from litgpt_kv import LLM, KVCache, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.cli.loading import budget_note
from litgpt_kv.cli.output import Output, dense_bytes
from litgpt_kv.cli.progress import Reading, loading
from litgpt_kv.cli.run_digest import differing, digest_of
from litgpt_kv.cli.terminal import describe_cache
from litgpt_kv.generate import Stats
from litgpt_kv.llm.generated import GeneratedText
from litgpt_kv.llm.threads import best_threads, cpu_threads
from tests.cli.test_help import Terminal

SHORT = ["--accelerator", "cpu", "--max-new-tokens", "3", "--temperature", "0"]


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[str, str]:
    main(["generate", "demo", *SHORT, *map(str, args)])
    return capsys.readouterr()


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([*map(str, args)])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu")


def test_a_run_says_what_a_dense_cache_takes(llm: LLM, capsys: pytest.CaptureFixture) -> None:
    text = "import os\n" * 9
    common = ["--prompt", text, "--prefill", "full"]
    small, dense = (run(capsys, *common, *flags)[1] for flags in (["--kv-cache", "h2o", "--kv-cache.budget", 9], []))
    whole = int(dense.split("Cache dense")[1].split(" bytes")[0].split()[-1].replace(",", ""))
    assert f"A dense cache takes {whole:,} bytes: " in small and "A dense cache takes" not in dense
    assert "times as many" in small
    past = KVCache.build(llm.model, KVCacheArgs("sink", 8), 1, 5000)
    assert dense_bytes(llm, past) is None, "a dense cache cannot hold more than the context"


def test_without_a_budget_nothing_is_evicted_and_a_note_says_so(llm: LLM, capsys: pytest.CaptureFixture) -> None:
    note = "Without a budget, h2o evicts nothing: --kv-cache.budget 128 keeps 128 tokens, 25% a quarter."
    assert note in run(capsys, "--kv-cache", "h2o")[1].splitlines()
    for flags in ([], ["--kv-cache", "h2o", "--kv-cache.budget", "20%"], ["--kv-cache", "none"]):
        assert "Without a budget" not in run(capsys, *flags)[1]
    assert "nothing up to the model's context" in str(budget_note(KVCacheArgs("sink")))
    assert str(budget_note(KVCacheArgs(["dense", "h2o", "h2o"]))).startswith("Without a budget, h2o evicts")
    assert budget_note(KVCacheArgs(["dense", "h2o"], [None, 4])) is None


def test_a_budget_of_dense_names_the_strategies_that_take_one(capsys: pytest.CaptureFixture) -> None:
    line = refused(capsys, "generate", "demo", *SHORT, "--kv-cache.budget", 4)
    assert "a dense cache keeps every token; criticalkv, " in line and " h2o, " in line
    assert line.endswith("window keep a budget.")


def test_fractions_and_mappings_are_the_same_everywhere(
    llm: LLM, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    text = "import os\n" * 5
    options = {"prompt": text, "max_new_tokens": 3, "temperature": 0.0}
    file = tmp_path / "a.yaml"
    file.write_text("kv_cache: {strategy: snapkv, budget: 0.4, window: 4}\n")
    flags = ["--kv-cache", "snapkv", "--kv-cache.budget", "0.4", "--kv-cache.window", 4]
    texts = {run(capsys, "--prompt", text, *given)[0] for given in (["--config", file], flags)}
    for given in (
        {"kv_cache": {"strategy": "snapkv", "budget": 0.4, "window": 4}},
        {"kv_cache": {"strategy": "snapkv", "window": 4}, "budget": "40%"},
        {"kv_cache": KVCacheArgs("snapkv", options={"window": 4}), "budget": 0.4},
    ):
        texts.add(text + llm.generate(**options, **given) + "\n")
        assert {slots.plan.slots for slots in llm.cache.slots} == {round(0.4 * llm.cache.max_tokens)}
    assert len(texts) == 1
    assert llm.chat(kv_cache={"strategy": "sink", "budget": 9}, max_tokens=40).cache.args == KVCacheArgs("sink", 9)


def test_a_text_has_its_tokens_and_logprobs(llm: LLM) -> None:
    settings = dict(max_new_tokens=5, temperature=0.0)
    text = llm.generate("def f(x):", **settings, logprobs=True)
    assert isinstance(text, GeneratedText) and text == llm.generate("def f(x):", **settings)
    assert llm.decode(text.tokens) == text and text.finish_reason == "length"
    assert text.logprobs == llm.generate(["def f(x):"], **settings, logprobs=True)[0].logprobs
    ids = llm.encode("def f(x):").tolist()
    odds = llm.model(torch.tensor([ids + text.tokens])).log_softmax(-1)[0, len(ids) - 1 : -1]
    expected = odds.gather(1, torch.tensor(text.tokens)[:, None])[:, 0].tolist()
    assert text.logprobs == pytest.approx(expected, abs=1e-4)
    assert llm.generate("def f(x):", **settings).logprobs == []
    copy = pickle.loads(pickle.dumps(text))
    assert (copy, copy.tokens, copy.logprobs) == (text, text.tokens, text.logprobs)


def test_json_has_answers_statistics_and_the_cache(llm: LLM, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    flags = ["--prompt", "def f(x):", "--prompt", "x", "--kv-cache", "h2o", "--kv-cache.budget", 5]
    plain = run(capsys, *flags)[0]
    out, err = run(capsys, *flags, "--json", "--logprobs", "--num-samples", 2)
    found = json.loads(out)
    assert out.count("\n") == 1 and "Cache h2o" in err
    assert [(a["prompt"], a["sample"]) for a in found["answers"]] == [
        ("def f(x):", 0),
        ("x", 0),
        ("def f(x):", 1),
        ("x", 1),
    ]
    assert plain == "".join(a["prompt"] + a["text"] + "\n" for a in found["answers"][:2])
    assert all(len(a["tokens"]) == len(a["logprobs"]) == a["new_tokens"] == 3 for a in found["answers"])
    assert found["stats"]["new_tokens"] == 12 and found["stats"]["decode_tokens_per_second"] > 0
    cache = found["cache"]
    assert cache["strategy"] == ["h2o"] and cache["budget"] == [5] and cache["kept"] == [5, min(5, cache["seen"][1])]
    assert cache["dense_bytes"] > cache["bytes"]["total"] > 0
    assert json.loads(run(capsys, "--kv-cache", "none", "--json")[0])["cache"] is None
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    files = ["--prompts", prompts, "--out", tmp_path / "answers.jsonl", "--json"]
    found = json.loads(run(capsys, *files)[0])
    assert found["answers"] == found["lines"] == 2 and found["stats"]["new_tokens"] == 6
    assert "--out FILE" in refused(capsys, "generate", "demo", "--prompts", prompts, "--json")
    assert "--logprobs needs --json" in refused(capsys, "generate", "demo", "--logprobs")


def test_a_file_of_generates_options_is_one_for_chat(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "demo", *SHORT, "--kv-cache", "sink", "--kv-cache.budget", "30", "--print-config"])
    whole = capsys.readouterr().out
    options = tmp_path / "a.yaml"
    options.write_text(whole)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x = 1\n/cache\n"))
    main(["chat", "--config", str(options)])
    out, err = capsys.readouterr()
    assert out and "sink 30 tokens a row" in err
    for text, says in (
        (
            whole.replace("num_samples: 1", "num_samples: 2"),
            "chat has no option 'num_samples', which generate has: take",
        ),
        (whole.replace("prompts: null", "prompts: a.txt"), "chat has no option 'prompts', which generate has"),
        (whole + "temprature: null\n", "chat has no option 'temprature'. Did you mean 'temperature'?"),
    ):
        options.write_text(text)
        assert f"{options}: {says}" in refused(capsys, "chat", "--config", options)


def test_a_note_within_a_text_has_a_line_of_its_own(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a step is compiled in the middle of a text."""
    for both_seen in (True, False):
        output = Output()
        both = io.StringIO()
        terminal = both if both_seen else Terminal()  # else standard output is a file
        monkeypatch.setattr(sys, "stdout", both)
        monkeypatch.setattr(sys, "stderr", terminal)
        output.note("Loaded.")
        output.text("def f", end="")
        output.text("", end="")
        output.note("Compiling ...")
        output.note("... done.")
        output.text("(x):")
        output.note("Read.")
        if both_seen:
            assert both.getvalue() == "Loaded.\ndef f\nCompiling ...\n... done.\n(x):\nRead.\n"
        else:
            assert (both.getvalue(), terminal.getvalue()) == (
                "def f(x):\n",
                "Loaded.\nCompiling ...\n... done.\nRead.\n",
            )


def test_chats_cache_is_shown_beside_a_dense_one(llm: LLM) -> None:
    chat = llm.chat(kv_cache="sink", budget=12, max_tokens=60, max_new_tokens=20)
    whole = KVCache.nbytes(llm.config, KVCacheArgs(), 1, 60)["total"]
    assert describe_cache(chat).endswith(f"A dense cache takes {whole:,} bytes for the 60 of a whole conversation.")
    chat.ask("x = 1\n")
    seen = chat.cache.seen[0]
    dense = KVCache.nbytes(llm.config, KVCacheArgs(), 1, seen)["total"]
    assert f"keeps 12 of {seen} tokens" in describe_cache(chat)
    assert f"takes {dense:,} bytes for these tokens, {whole:,} bytes for the 60 of" in describe_cache(chat)
    assert "A dense cache" not in describe_cache(llm.chat(max_tokens=60))
    pool = llm.chat(kv_cache={"strategy": "h2o", "select": "pool", "budget": 12}, max_tokens=60)
    assert "a head keeps up to 0 of 0 tokens" in describe_cache(pool)
    past = llm.chat(kv_cache="sink", budget=12, max_tokens=60)
    past.cache.context = -1
    assert "A dense cache cannot hold so many" in describe_cache(past)


def test_resume_says_which_settings_differ(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    files = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "answers.jsonl", "--kv-cache.budget", 30]
    run(capsys, *files)
    changed = ["--resume", "--kv-cache.budget", 31, "--top-k", 9]
    line = refused(capsys, "generate", "demo", *SHORT, *files, *changed)
    assert "made with other settings (top_k 50, now 9; kv_cache.budget 30, now 31): use the same" in line
    line = refused(capsys, "generate", "demo", *SHORT, *files[:-2], "--resume", "--seed", 3, "--stop", "z" * 50)
    assert "(stop null, now #" in line and "; seed 1234, now 3; kv_cache.budget 30, now null)" in line
    usual = {"a": 1, "b": None, "c": []}
    digests = [digest_of({**usual, **other}, usual) for other in ({}, {"a": 2}, {"b": "x" * 99}, {"c": [1]})]
    assert len({digest[:8] for digest in digests}) == 4 and max(map(len, digests)) < 40
    assert [differing(digests[0], other, usual) for other in digests[1:]] == [
        ["a 1, now 2"],
        [f"b null, now {json.loads(digests[2][9:])['b']}"],
        ["c [], now [1]"],
    ]
    assert differing("1a2b3c4d", digests[1], usual) == differing("1a2b3c4d 3", digests[1], usual) == []


@pytest.mark.parametrize(
    ("turns", "code"), [("x = 1\n", 0), ("/nothing\nx = 1\n", 0), ("x " * 300 + "\nx = 1\n", 1), ("/cache\n/quit\n", 0)]
)
def test_a_piped_chat_that_refused_a_turn_does_not_end_with_0(
    turns: str, code: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
    chat = ["chat", "demo", *SHORT, "--max-tokens", "60"]
    if code:
        with pytest.raises(SystemExit) as end:
            main(chat)
        assert end.value.code == code
    else:
        main(chat)
    out = capsys.readouterr().out
    assert bool(out.strip()) == ("x = 1" in turns), "turns after a refused one are answered"


def test_a_small_model_runs_on_one_thread_and_others_keep_theirs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert best_threads(llm.model, torch.device("cpu")) == 1
    assert best_threads(llm.model, torch.device("meta")) is best_threads(None, torch.device("cpu")) is None
    large = torch.nn.Linear(5000, 5000, device="meta")
    assert best_threads(large, torch.device("cpu")) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert best_threads(llm.model, torch.device("cpu")) is None, "the user has said how many"
    plain = llm.decode
    monkeypatch.setattr(llm, "decode", lambda ids: (seen.append(torch.get_num_threads()), plain(ids))[1])
    monkeypatch.setattr(llm, "threads", 2)
    for piece in llm.generate("x", max_new_tokens=2, stream=True):
        assert torch.get_num_threads() == before and isinstance(piece, str)
    llm.chat(max_new_tokens=2, max_tokens=60).ask("x")
    assert set(seen) == {2} and torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), cpu_threads(2):
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1"):
        LLM.load("demo", threads=0)


def test_progress_of_loading_and_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    loaded = LLM.load("demo", accelerator="cpu", on_progress=lambda *call: calls.append(call))
    total = sum(p.nbytes for p in loaded.model.state_dict().values())
    assert calls[0] == (0, calls[0][1]) and calls[-1][0] == calls[-1][1] >= total / 4
    assert [done for done, _ in calls] == sorted(done for done, _ in calls) and len(calls) > 20
    with pytest.raises(TypeError, match="on_progress"):
        LLM.load("demo", on_progress=3)
    monkeypatch.setattr("litgpt_kv.cli.progress.DELAY", 0.0)
    monkeypatch.setattr("litgpt_kv.cli.progress.EVERY", 0.001)
    terminal, stats = Terminal(), Stats()
    monkeypatch.setattr(sys, "stderr", terminal)
    reading = Reading(stats, 2000)
    stats.prompt_tokens = 500
    deadline = math.inf
    while "500/2000" not in terminal.getvalue() and deadline > 0:
        deadline = min(deadline, 2000) - 1
        reading._ended.wait(0.005)
    reading.close()
    reading.close()
    assert "500/2000" in terminal.getvalue() and "tokens/s" in terminal.getvalue()
    with loading("demo") as show:
        show(5, 10)
    assert "Loading demo" in terminal.getvalue()
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    Reading(stats, 2000).close()
    with loading("demo") as show:
        assert show is None
    assert quiet.getvalue() == ""
