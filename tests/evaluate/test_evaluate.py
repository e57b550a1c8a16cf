"""Questions, fidelity and results: against what can be counted by hand, and the command from end to end."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from litgpt_kv import LLM, KVCache, KVCacheArgs, registry
from litgpt_kv.__main__ import main
from litgpt_kv.evaluate import fidelity
from litgpt_kv.evaluate.answering import Answered, Questions, encode
from litgpt_kv.evaluate.candidates import candidates
from litgpt_kv.evaluate.haystack import prose
from litgpt_kv.evaluate.recording import record
from litgpt_kv.evaluate.results import Results, standard_error
from litgpt_kv.evaluate.tasks import TASKS, Example, depth, examples
from litgpt_kv.generate import prefill


@pytest.fixture(scope="module")
def demo() -> LLM:
    torch.set_num_threads(1)
    return LLM.load("demo", accelerator="cpu")


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", TASKS)
def test_examples_hold_their_answers_at_their_depth_and_come_from_the_seed(task: str) -> None:
    made = examples(task, 4, 300, words, seed=3)
    assert made == examples(task, 4, 300, words, seed=3) != examples(task, 4, 300, words, seed=4)
    for i, example in enumerate(made):
        assert 200 <= words(example.context) <= 340
        assert all(found in example.context for found in example.answers)
        assert example.score(" and ".join(example.answers).upper()) == 1 and example.score("none") == 0
        if example.depth is not None:
            assert example.depth == depth(i, 4)
            at = example.context.index(example.answers[0]) / len(example.context)
            assert abs(at - example.depth) < 0.15
            chosen = examples(task, 3, 300, words, seed=3, depths=[0.2, 0.9])
            assert [one.depth for one in chosen] == [0.2, 0.9, 0.2]


def test_depths_are_even_in_every_part() -> None:
    for number in (1, 2, 8, 15, 30):
        depths = [depth(i, number) for i in range(number)]
        assert sorted(depths) == pytest.approx([(i + 0.5) / number for i in range(number)])
    assert sorted(int(8 * depth(i, 24)) for i in range(8)) == list(range(8))


def test_variables_are_told_in_order_and_words_are_counted_right() -> None:
    for example in examples("variables", 8, 300, words):
        at = [example.context.index(f"The variable {name} is") for name in example.answers]
        assert at == sorted(at)
    for task, most in (("common-words", 5), ("frequent-words", 3)):
        for example in examples(task, 3, 400, words):
            text = (
                re.sub(r"\d+\.", ",", example.context) if task == "common-words" else example.context.replace(" ", ",")
            )
            entries = [entry.strip() for entry in text.split(",")]
            counts = {entry: entries.count(entry) for entry in dict.fromkeys(entries) if entry}
            assert set(sorted(counts, key=lambda word: -counts[word])[:most]) == set(example.answers)


def test_common_words_are_never_fewer_than_asked_for() -> None:
    with pytest.raises(ValueError, match=r"has words for \d+,\d+ tokens, got lengths 32,000"):
        examples("common-words", 1, 32_000, lambda text: len(text) // 2)


def test_prose_is_prose_and_noise_repeats() -> None:
    assert len(prose()) > 500 and len(set(prose())) == len(prose())
    (noisy,) = examples("needle", 1, 200, words, haystack="noise")
    sentences = noisy.context.split(". ")
    assert len(set(sentences)) <= 7 < len(sentences)
    for wrong in ({"task": "needles"}, {"haystack": "hay"}):
        with pytest.raises(ValueError, match="must be"):
            examples(**{"task": "needle", "number": 1, "tokens": 50, "count": words, **wrong})


def test_a_question_is_cut_off_without_changing_a_token(demo: LLM) -> None:
    example = Example("import os\nx = 1", "what = x", "x is", ("1",), 4)
    cut = encode(demo, example)
    whole = demo.encode_text(demo.prompt_style.apply("import os\nx = 1\n\nwhat = x") + "x is")
    assert torch.equal(torch.cat((cut.context, cut.question)), whole)


def answer(llm: LLM, made: list[Example], args: KVCacheArgs, seen: bool) -> Answered:
    return Questions(llm, made, len(made)).read(0, len(made)).answer(args, seen)


def test_a_full_cache_answers_the_same_whether_it_saw_the_question_or_not(demo: LLM) -> None:
    made = examples("needle", 3, 60, words)
    seen, unseen = (answer(demo, made, KVCacheArgs("dense"), flag) for flag in (True, False))
    assert seen.texts == unseen.texts and len(seen.texts) == 3
    small = answer(demo, made, KVCacheArgs("window", budget="25%"), False)
    assert small.texts != seen.texts and small.bytes < 0.3 * seen.bytes and small.kept < 0.3 * seen.kept


@pytest.mark.parametrize("strategy", ["dense", "h2o", "snapkv:pool", "criticalkv", "kvzip", "kvzip:pool"])
@pytest.mark.parametrize("short", [False, True])
def test_a_recording_seeds_what_a_prefill_seeds(strategy: str, short: bool, demo: LLM) -> None:
    ids = demo.encode_text(Path(fidelity.__file__).read_text())
    prompts, name, _, select = [ids[:150], ids[50:130]], *strategy.partition(":")
    recording = record(demo.model, prompts)
    lengths = [120, 60] if short else [150, 80]
    given = torch.tensor(lengths) if short else None
    for budget in (40, 30):  # the second time, a second reading is there already
        args = KVCacheArgs(name, budget=None if name == "dense" else budget, select=select or None)
        seeded, expected = (KVCache.build(demo.model, args, 2, 200) for _ in range(2))
        recording.seed(seeded, given)
        logits, _ = prefill(demo.model, [p[:n] for p, n in zip(prompts, lengths)], expected, "full")
        assert short or torch.allclose(recording.logits, logits, atol=1e-5)
        assert seeded.tokens() == expected.tokens()
        with torch.inference_mode():
            token = torch.tensor([[5], [7]])
            assert torch.allclose(demo.model(token, seeded), demo.model(token, expected), atol=1e-4)


def test_a_second_reading_is_done_once_for_all_budgets(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    recording, calls = record(demo.model, [demo.encode_text("import os\n" * 40)]), []
    embed = demo.model.embed
    monkeypatch.setattr(demo.model, "embed", lambda idx: calls.append(idx.size(1)) or embed(idx))
    for budget in (40, 30, 20):
        recording.seed(KVCache.build(demo.model, KVCacheArgs("kvzip", budget=budget), 1, 200))
    assert sum(calls) == int(recording.length)
    recording.seed(KVCache.build(demo.model, KVCacheArgs("kvzip", budget=20, options={"chunk": 16}), 1, 200))
    assert sum(calls) == 2 * int(recording.length), "parts of another size: read anew"


# -- fidelity ----------------------------------------------------------------------------------------------------------


def test_fidelity_of_caches_equals_what_one_pass_and_a_loop_give(demo: LLM) -> None:
    ids = demo.encode_text(Path(fidelity.__file__).read_text())[:200]
    args = {"all": KVCacheArgs("dense"), "few": KVCacheArgs("window", budget=30)}
    found = fidelity.measure(demo, ids, 40, args)
    logits = demo.model(ids.unsqueeze(0))[0].detach().log_softmax(-1)
    nll = [-float(logits[i - 1, ids[i]]) for i in range(40, 199)]
    assert found["all"].nll == pytest.approx(nll, abs=1e-4)
    assert max(found["all"].kl) < 1e-6 and all(found["all"].agrees) and max(found["all"].lost) == 0
    assert found["all"].perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    cache, kl = KVCache.build(demo.model, args["few"], 1, 200), []
    last = prefill(demo.model, [ids[:40]], cache, "full")[0][0]
    for i in range(40, 199):
        mine = last.log_softmax(-1)
        kl.append(float((logits[i - 1].exp() * (logits[i - 1] - mine)).sum()))
        last = demo.model(ids[i].view(1, 1), cache)[0, 0].detach()
    assert found["few"].kl == pytest.approx(kl, abs=1e-4) and max(kl) > 0.01


def test_lost_attention_is_what_goes_to_tokens_outside_the_window(demo: LLM) -> None:
    ids = demo.encode_text(Path(fidelity.__file__).read_text())[:50]
    full, cache = (KVCache.build(demo.model, a, 1, 60) for a in (fidelity.REFERENCE, KVCacheArgs("window", budget=20)))
    for each in (full, cache):
        prefill(demo.model, [ids], each, "full")
    expected = [head.statistics["last"][:30].sum() for layer in full.inspect(0) for head in layer.heads]
    assert fidelity.lost_attention(full, cache) == pytest.approx(float(sum(expected) / len(expected)), abs=1e-5)
    assert fidelity.REFERENCE not in registry.names("strategy")


def test_texts_side_by_side_and_in_blocks_give_what_each_alone_gives() -> None:
    demo = LLM.load("demo", accelerator="cpu", precision="64-true")  # else rounding to int8 depends on the batch
    ids = demo.encode_text(Path(fidelity.__file__).read_text())[:200].view(2, 100)
    args = {"sink": KVCacheArgs("sink", budget=50), "h2o": KVCacheArgs("h2o", budget=50)}
    args["int8"] = KVCacheArgs("window", budget=70, storage="int8")
    both = fidelity.measure(demo, ids, 40, args, blocks=True)
    for name in args:
        alone = [fidelity.measure(demo, text, 40, {name: args[name]})[name] for text in ids]
        for what in ("nll", "kl", "lost"):
            together, apart = getattr(both[name], what), getattr(alone[0], what) + getattr(alone[1], what)
            assert sorted(together) == pytest.approx(sorted(apart), abs=1e-5)
        assert both[name].bytes == alone[0].bytes
    assert not fidelity.measure(demo, ids, 40, {"all": KVCacheArgs("dense")}, compare=False)["all"].kl
    small = fidelity.measure(demo, ids, 40, {"all": KVCacheArgs("dense")}, dtype=torch.bfloat16)["all"]
    assert 1e-7 < sum(small.kl) / len(small.kl) < 1e-2 and small.bytes < 0.3 * both["h2o"].bytes * 100 / 50


def test_a_text_longer_than_the_context_has_no_full_cache(demo: LLM) -> None:
    with pytest.raises(ValueError, match="over the limit of 1024"):
        fidelity.check(demo, KVCacheArgs("dense"), 1100, 40)
    ids = demo.encode_text(Path(fidelity.__file__).read_text())[:100].repeat(11)
    found = fidelity.measure(demo, ids, 1000, {"sink": KVCacheArgs("sink", budget=16)})["sink"]
    assert len(found.nll) == 99 and not found.kl and not found.lost


# -- the command -------------------------------------------------------------------------------------------------------


def test_names_of_caches() -> None:
    made = candidates(["dense", "h2o:pool", "sink@plain"], ["50%", 30], KVCacheArgs())
    assert [c.name for c in made] == ["dense", "h2o:pool 50%", "h2o:pool 30", "sink@plain 50%", "sink@plain 30"]
    assert made[1].args.select == "pool" and made[4].args.budget == 30 and made[3].args.storage == "plain"
    with pytest.raises(ValueError, match="Unknown strategy 'h3o'"):
        candidates(["h3o"], ["50%"], KVCacheArgs())


def test_options_go_to_the_caches_that_have_them() -> None:
    base = KVCacheArgs(budget=9, budget_pattern="pyramid", options={"window": 16}, storage_options={"group": 32})
    names = ["dense", "snapkv", "snapkv window=8 interval=4", "h2o@int4", "window positions=cache budget_pattern=null"]
    dense, snapkv, own, h2o, window = candidates(names, [40], base)
    assert dense.args.options == {} and dense.args.budget_pattern is None and dense.args.storage_options == {}
    assert snapkv.args.options == {"window": 16} and snapkv.args.budget_pattern == "pyramid"
    assert own.args.options == {"window": 8} and own.args.interval == 4 and own.name == f"{names[2]} 40"
    assert h2o.args.storage_options == {"group": 32} and h2o.args.options == {}
    assert window.args.positions == "cache" and window.args.budget_pattern is None
    for spec, message in (
        ("snapkv windw=8", "has no option 'windw'; it takes window,"),
        ("snapkv budget=8", "has no option 'budget'"),
        ("snapkv window", "Caches are named NAME"),
        ("snapkv window=[", "no value that can be read"),
        ("", "Unknown strategy ''"),
    ):
        with pytest.raises(ValueError, match=message):
            candidates([spec], [40], KVCacheArgs())
    with pytest.raises(ValueError, match="No cache that is compared has the option 'window'"):
        candidates(["dense", "h2o"], [40], KVCacheArgs(options={"window": 16}))


def test_standard_error() -> None:
    assert standard_error([0, 1, 1, 0]) == pytest.approx(math.sqrt(1 / 3 / 4)) and standard_error([1]) == 0


def run(*args: object) -> None:
    options = ["--accelerator", "cpu", "--threads", "1", "--examples", "2", "--lengths", "[80]", "--text-tokens", "130"]
    main(["evaluate", "demo", *options, "--text-prompt", "30", "--text", fidelity.__file__, *map(str, args)])


def test_the_command_writes_tables_and_pictures_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import dataclass\nfrom litgpt_kv import Strategy\n\n\n@dataclass(frozen=True)\n"
        "class First(Strategy):\n    def score(self, tokens):\n        return -tokens.pos\n"
    )
    out = tmp_path / "out"
    names = f"[dense, sink, {mine}:First]"
    run("--strategies", names, "--budgets", "[40%]", "--out", out)
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "results.md").read_text().strip()
    found = json.loads((out / "results.json").read_text())
    assert len(found["cells"]) == 3 * 3 and found["versions"]["torch"] == torch.__version__
    dense = next(c for c in found["cells"] if c["cache"] == "dense" and c["task"] == "text")
    assert dense["kl"] < 1e-5 and dense["top1"] == 1 and dense["lost"] == 0
    for name in ("quality", "text"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (out / f"{name}.svg").read_text()

    def fixed(cells: list[dict]) -> list[dict]:
        return [{k: v for k, v in cell.items() if "seconds" not in k} for cell in cells]

    whole = fixed(found["cells"])
    found["cells"] = found["cells"][:2] + found["cells"][-1:]
    (out / "results.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit):
        run("--strategies", names, "--budgets", "[40%]", "--out", out)
    assert "results.json exists: --resume continues it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--strategies", names, "--budgets", "[40%]", "--out", out, "--resume", "--seed", "9")
    assert "was made with another seed: 1, now 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--strategies", names, "--out", out, "--resume", "--precision", "bf16-true")
    assert "was made with another precision: None, now 'bf16-true'" in capsys.readouterr().err
    run("--strategies", names, "--budgets", "[40%]", "--out", out, "--resume", "--examples", "9", "--tasks", "[]")
    assert json.loads((out / "results.json").read_text())["settings"]["examples"] == 2, "nothing was asked"
    run("--strategies", names, "--budgets", "[40%]", "--out", out, "--resume")
    again = fixed(json.loads((out / "results.json").read_text())["cells"])
    assert sorted(map(str, again)) == sorted(map(str, whole)), "the same numbers twice"


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("litgpt_kv.cli.evaluate.read", interrupted)
    with pytest.raises(SystemExit) as end:
        run("--strategies", "dense", "--out", tmp_path / "out")
    assert end.value.code == 130 and f"--resume goes on with {tmp_path / 'out'}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "[needle, x]"], "tasks must be some of needle,"),
        (["--depths", "[0.5, 1.5]"], "depths must be numbers from 0 (the beginning) to 1 (the end), got 1.5"),
        (["--questions", "no"], "questions must be one of seen, unseen, both"),
        (["--resume"], "--resume goes with --out"),
        (["--strategies", "[h3o]"], "Unknown strategy 'h3o'"),
        (["--examples", "0"], "examples must be at least 1"),
        (["--kv-cache", "none"], "keeps nothing"),
        (["--text", "no.txt"], "The text 'no.txt' cannot be read"),  # before any question is asked
    ],
)
def test_what_the_command_refuses(args: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "demo", *args])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_cache_that_cannot_be_built_is_a_line_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("--strategies", "[dense]", "--tasks", "[]", "--text-tokens", "5000", "--text-prompt", "900")
    assert "- dense: A dense cache of" in capsys.readouterr().out
    text = ("--tasks", "[]", "--text-tokens", "90", "--text-prompt", "40", "--budgets", "[16]")
    run("--strategies", "[dense, h2o]", *text, "--kv-cache.keep_prompt")
    out = capsys.readouterr().out
    assert "| dense | all |" in out and "- h2o: keep_prompt needs a budget of" in out
    damaged = Results({"seed": 1}, tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be continued"):
        damaged.resume()
