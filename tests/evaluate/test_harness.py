"""The model for lm-evaluation-harness: against numbers worked out by hand, and docs/lm_eval.md as it stands."""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litgpt_kv import KVCacheArgs
from litgpt_kv.llm.turns import Turns

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from litgpt_kv.evaluate.continuations import score
from litgpt_kv.evaluate.harness import LitgptKV, cli_evaluate

TEXT = (Path(__file__).parents[2] / "docs" / "lm_eval.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)
CODE = "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n"


def block(kind: str) -> str:
    """The last block of a kind."""
    return [text for name, text in BLOCKS if name == kind][-1]


@pytest.fixture(scope="module")
def dense() -> LitgptKV:
    return LitgptKV("demo", device="cpu", precision="64-true", batch_size=3, max_length=40)


@pytest.fixture
def h2o(dense: LitgptKV) -> LitgptKV:
    return LitgptKV("demo", "h2o", "50%", device="cpu", precision="64-true", batch_size="4", max_length=40)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The document's task and data, and a folder for what the datasets library writes."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("HF_HOME", "hf"), ("HF_DATASETS_CACHE", "hf/datasets")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "python_choice.yaml").write_text(block("yaml"))
    (tmp_path / "tasks" / "python.jsonl").write_text(block("json"))
    return tmp_path


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def by_hand(model: LitgptKV, ids: list[int], start: int) -> float:
    """The log-probability of a text's tokens from `start` on, in one pass of the full model."""
    logprobs = model.llm.model(torch.tensor([ids]))[0, :-1].detach().log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1))[start - 1 :].sum())


def test_dense_loglikelihoods_are_those_of_the_full_model(dense: LitgptKV) -> None:
    pairs = [("for i in", " range(10):"), ("for i in", " x"), ("class A(object):\n    def ", "f(x)"), ("", "import os")]
    found = dense.loglikelihood([asked(*pair) for pair in pairs])
    for (context, continuation), (logprob, greedy) in zip(pairs, found):
        whole = dense.llm.encode_text(context + continuation).tolist()
        start = len(dense.llm.encode_text(context.rstrip(" ")).tolist()) if context else 1
        assert logprob == pytest.approx(by_hand(dense, whole, start), abs=1e-8) and greedy in (True, False)
    long = [dense.llm.encode_text(CODE * 3).tolist(), dense.llm.encode_text(" + 1").tolist()[1:]]
    cut = long[0][-(41 - len(long[1])) :]  # the beginning of a context that does not fit is left out
    ((logprob, _),) = dense._loglikelihood_tokens([(None, *long)])
    assert logprob == pytest.approx(by_hand(dense, cut + long[1], len(cut)), abs=1e-8)


def test_dense_rolling_is_that_of_the_full_model_window_by_window(dense: LitgptKV) -> None:
    texts = ["import os\n", CODE * 2]
    found = dense.loglikelihood_rolling([asked(text) for text in texts])
    begin, expected = dense.prefix_token_id, []
    for text in texts:
        ids, total = dense.llm.encode_text(text).tolist()[1:], 0.0
        for at in range(0, len(ids), 40):
            window = ids[at : at + 40]
            before = [begin] if at == 0 else ids[at + len(window) - 41 : at]
            total += by_hand(dense, before + window, len(before))
        expected.append(total)
    assert len(ids) > 40 and found == pytest.approx(expected, abs=1e-8)


def test_a_cache_changes_scores_as_the_library_says(h2o: LitgptKV, dense: LitgptKV) -> None:
    pairs = [(CODE[:50], " fib(n"), (CODE[:50], " x")]
    tokens = [h2o._encode_pair(*pair) for pair in pairs]
    found = h2o.loglikelihood([asked(*pair) for pair in pairs])
    assert found == score(h2o.llm, tokens, KVCacheArgs("h2o", budget="50%"), 4)
    assert found != dense.loglikelihood([asked(*pair) for pair in pairs])
    assert "budget='50%'" in h2o.get_model_info()["kv_cache"]
    own = LitgptKV("demo", "snapkv", 20, device="cpu", window=8, sinks=2).args
    assert (own.options, own.sinks, own.budget) == ({"window": 8}, 2, 20)


def test_answers_are_generated_greedily_until_a_text(h2o: LitgptKV) -> None:
    prompts = ["for i in", CODE[:30], "class A(object):"]
    requests = [asked(prompt, {"until": [")"], "max_gen_toks": 9}) for prompt in prompts]
    expected = [
        h2o.llm.generate(p, max_new_tokens=9, temperature=0.0, stop=")", kv_cache="h2o", budget="50%", prefill="full")
        for p in prompts
    ]
    assert h2o.generate_until(requests) == expected
    (sampled,) = h2o.generate_until([asked("for", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 9})])
    assert sampled != h2o.generate_until([asked("for", {"max_gen_toks": 9})])[0]
    with pytest.raises(ValueError, match="generation_kwargs 'num_beams' is not known; there are until"):
        h2o.generate_until([asked("for", {"num_beams": 2})])


def test_a_conversation_is_put_into_the_prompt_style(dense: LitgptKV) -> None:
    assert dense.apply_chat_template([{"role": "user", "content": "x = "}]) == dense.llm.prompt_style.apply("x = ")
    assert dense.chat_template(True) == type(dense.llm.prompt_style).__name__ and dense.tokenizer_name == "demo"
    with pytest.raises(ValueError, match="Only a message of the assistant can be continued"):
        dense.apply_chat_template([{"role": "user", "content": "x = "}], add_generation_prompt=False)
    described = [{"role": "system", "content": "Go on."}, {"role": "user", "content": "x = "}]
    with pytest.warns(UserWarning, match="prompt style Default has no place for system messages: left out"):
        assert dense.apply_chat_template(described) == dense.llm.prompt_style.apply("x = ")


def test_a_reply_that_a_task_begins_stands_where_the_reply_does(
    dense: LitgptKV, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = 'gen_prefix: "Answer:"\nfewshot_split: test\n'
    (folder / "tasks" / "begun.yaml").write_text(block("yaml").replace("task: python_choice", "task: begun") + more)
    monkeypatch.setattr(dense.llm, "prompt_style", Turns("<first>", "<reply>", "<between>", "<past>"))
    manager = TaskManager(include_path="tasks")
    for shots, before in ((0, "<first>"), (1, r"<first>.*<past>Answer: .*<between>")):
        found = simple_evaluate(
            dense, tasks=["begun"], task_manager=manager, num_fewshot=shots, apply_chat_template=True
        )
        assert len(found["samples"]["begun"]) == 3
        for sample in found["samples"]["begun"]:
            for context, _ in sample["arguments"]:
                assert re.fullmatch(before + re.escape(sample["doc"]["code"] + "<reply>Answer:"), context, flags=re.S)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_cache": "h3o"}, "Unknown strategy 'h3o'"),
        ({"kv_cache": "none"}, "kv_cache must be a strategy's name"),
        ({"kv_cache": "h2o", "budgets": 8}, "Unknown option 'budgets' for kv_cache 'h2o'; it takes"),
        ({"kv_cache": "h2o", "budget": -1}, "budget must be"),
        ({"batch_size": "auto"}, "batch_size must be a whole number, got 'auto'"),
        ({"max_length": 5000}, "max_length must be at most 1,024"),
    ],
)
def test_what_the_model_refuses(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LitgptKV("demo", device="cpu", **given)


def test_the_command_of_the_document(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    line = next(line for _, text in BLOCKS for line in text.splitlines() if line.startswith("python -m"))
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "litgpt_kv.evaluate.harness"]
    monkeypatch.setattr(sys, "argv", [*words[2:], "--device", "cpu"])
    cli_evaluate()
    row = next(line for line in capsys.readouterr().out.splitlines() if "python_choice" in line)
    assert re.sub(r"\s", "", row) in re.sub(r"[ ]", "", TEXT)


def test_the_example_of_the_document(folder: Path, capsys: Any) -> None:
    exec(compile(block("python"), "docs/lm_eval.md", "exec"), {"__name__": "docs"})
    assert math.isclose(float(capsys.readouterr().out.splitlines()[-1]), 2 / 3)
