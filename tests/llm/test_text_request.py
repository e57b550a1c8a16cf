"""One schema of requests: flat records, OpenAI's batch lines, conversations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from litgpt.prompts import Alpaca, Default, Llama3, PromptStyle, prompt_styles
from litgpt_kv import LLM, SamplingArgs
from litgpt_kv.__main__ import main
from litgpt_kv.arguments import StoppingArgs
from litgpt_kv.llm.chat import conversation_text
from litgpt_kv.llm.openai_batch import read_batch_line
from litgpt_kv.llm.text_request import TextRequest
from litgpt_kv.llm.turns import takes_system_prompt

DEFAULTS = TextRequest(
    sys_prompt="s", stopping=StoppingArgs(max_new_tokens=9), sampling=SamplingArgs(0.5, top_k=3, seed=2**63 - 1)
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu")


def test_a_record_changes_what_it_names() -> None:
    read = DEFAULTS.read({"prompt": "a", "min_p": 0.1, "max_new_tokens": 4, "id": 7, "seed": None, "top_k": None})
    assert (read.prompt, read.id, read.sys_prompt) == ("a", 7, "s")
    assert read.stopping == dataclasses.replace(DEFAULTS.stopping, max_new_tokens=4)
    assert read.sampling == dataclasses.replace(DEFAULTS.sampling, min_p=0.1, top_k=None)
    assert read.sample(1).sampling.seed == 0, "after the last seed comes the first"
    assert read.sample(0) is read


@pytest.mark.parametrize("cls", [StoppingArgs, SamplingArgs])
def test_every_field_is_a_key(cls: type) -> None:
    values = {"stop": ["x"], "ignore_eos": True, "min_new_tokens": 1, "max_new_tokens": 3}
    values |= {"temperature": 0.1, "top_k": 2, "top_p": 0.5, "seed": 1, "repetition_penalty": 1.5, "min_p": 0.5}
    values |= {"frequency_penalty": 0.5, "presence_penalty": -0.5}
    for field in dataclasses.fields(cls):
        read = TextRequest().read({"prompt": "a", field.name: values[field.name]})
        part = read.stopping if cls is StoppingArgs else read.sampling
        assert getattr(part, field.name) == values[field.name]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([1], "it must be an object with a prompt, got"),
        ({}, "it has no prompt"),
        ({"prompt": ""}, "it has no prompt"),
        ({"prompt": 3}, "prompt must be a text, got 3"),
        (
            {"prompt": "a", "temprature": 1},
            "unknown 'temprature'. Did you mean 'temperature'\\? A request may have prompt, messages, id",
        ),
        ({"prompt": "a", "temperature": [0.1, 0.2]}, "temperature must be one value"),
        ({"prompt": "a", "seed": True}, "seed must be a whole number, got True"),
        ({"prompt": "a", "id": 1.5}, "id must be a text or a whole number"),
        ({"prompt": "a", "stop": [1]}, "stop must be a text"),
        ({"prompt": "a", "stop": ["\ud800"]}, "surrogate"),
        ({"prompt": "a", "ignore_eos": "yes"}, "ignore_eos must be true or false, got 'yes'"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "both prompt and messages"),
        ({"messages": [{"role": "user"}]}, "a message has 'role' and 'content'"),
        ({"messages": [{"role": "king", "content": "b"}]}, "role must be one of"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "the last message must be the user's"),
        ({"messages": "hello"}, "messages must be a list"),
    ],
)
def test_what_is_refused(record: object, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        TextRequest().read(record)


def chat_line(**body: object) -> dict:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def f(x):"}]
    body = {"model": "demo", "messages": messages, **body}
    return {"custom_id": "c1", "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_a_line_of_openais_batch() -> None:
    line = chat_line(max_tokens=5, temperature=0, top_p=0.5, stop=["\n"], seed=3, n=1, stream=False, user="u", top_k=2)
    request, batch = read_batch_line(line, DEFAULTS)
    assert (batch.custom_id, batch.model, batch.is_chat) == ("c1", "demo", True)
    assert request.messages == tuple(line["body"]["messages"])
    assert request.stopping == StoppingArgs(5, stop=["\n"])
    assert request.sampling == SamplingArgs(0, 2, 0.5, 3)
    text = {"custom_id": "c2", "body": {"prompt": ["a"], "max_completion_tokens": 2}}
    request, batch = read_batch_line(text, DEFAULTS)
    assert (request.prompt, request.stopping.max_new_tokens, batch.is_chat) == ("a", 2, False)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"body": {"prompt": "a"}}, "custom_id must be a text, got None"),
        ({"custom_id": "a", "body": []}, "body must be an object"),
        ({"custom_id": "a", "body": {}, "extra": 1}, "unknown 'extra'"),
        ({**chat_line(), "method": "GET"}, "method must be POST"),
        ({**chat_line(), "url": "/v1/embeddings"}, "url must be one of"),
        ({**chat_line(), "url": "/v1/completions"}, "needs 'prompt'"),
        (chat_line(n=2), "n must be 1, got 2"),
        (chat_line(n=True), "n must be 1, got True"),
        (chat_line(stream=True), "stream must be False, got True"),
        (chat_line(tools=[]), "unknown 'tools'"),
        (chat_line(max_tokens=5, max_completion_tokens=6), "given twice"),
        (chat_line(temperature="hot"), "temperature must be a number"),
        (chat_line(model=3), "model must be a text"),
        ({"custom_id": "a", "body": {"prompt": ["a", "b"]}}, "prompt must be one text, got a list of 2"),
    ],
)
def test_what_is_refused_of_a_batch(line: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_batch_line(line, DEFAULTS)


def test_a_batch_is_answered_beside_todays_lines(llm: LLM, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "def f(x):"}]
    lines = [
        chat_line(messages=messages, max_tokens=6, temperature=0),
        {"custom_id": "c2", "body": {"model": "m", "prompt": "import os", "max_tokens": 4, "temperature": 0}},
        {"prompt": "class A:", "id": "mine"},
    ]
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "demo", "--accelerator", "cpu", "--prompts", str(questions), "--out", str(out)]
    main([*command, "--max-new-tokens", "3"])
    chat, text, plain = map(json.loads, out.read_text().splitlines())
    expected = llm.generate("def f(x):", max_new_tokens=6, temperature=0.0)
    assert chat["custom_id"] == "c1" and chat["error"] is None and chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "demo")
    read = len(llm.encode("def f(x):"))
    reply = {"role": "assistant", "content": expected}
    assert body["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length", "message": reply}]
    assert body["usage"] == {"prompt_tokens": read, "completion_tokens": 6, "total_tokens": read + 6}
    assert text["response"]["body"]["object"] == "text_completion"
    choice = text["response"]["body"]["choices"][0]
    assert choice["text"] == text["text"] == llm.generate("import os", max_new_tokens=4, temperature=0.0)
    assert plain["id"] == "mine" and "response" not in plain
    before = out.read_text()
    main([*command, "--max-new-tokens", "3", "--resume"])
    assert out.read_text() == before, "answers of a batch are found again"


def test_a_system_prompt_without_a_place_is_refused_everywhere(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    says = "This model's prompt style, Default, has no place for a system prompt: leave it out, or write it"
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    for call in (
        lambda: llm.generate("x", sys_prompt="Be brief."),
        lambda: llm.chat("Be brief."),
        lambda: llm.request(TextRequest(messages=tuple(talk))),
        lambda: llm.request(TextRequest("x", sys_prompt="Be brief.")),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert len(llm.encode("x", sys_prompt="")) == len(llm.encode("x"))
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    rows = [{"messages": talk}, {"messages": talk[1:]}, {"prompt": "x", "sys_prompt": "a"}, chat_line(max_tokens=1)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as end:
        main(["generate", "demo", "--prompts", str(questions), "--out", str(out), "--max-new-tokens", "1"])
    assert end.value.code == 1 and [json.loads(line)["line"] for line in out.read_text().splitlines()] == [2]
    err = capsys.readouterr().err
    assert [f"Line {n} was skipped: {says}" in err for n in (1, 2, 3, 4)] == [True, False, True, True]
    for command in (["generate", "demo", "--prompts", str(questions)], ["generate", "demo"], ["chat", "demo"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--sys-prompt", "Be brief."])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()  # nothing was loaded
        assert says in line


@pytest.mark.parametrize("style", prompt_styles.values(), ids=prompt_styles)
def test_whether_a_style_takes_a_system_prompt(style: type[PromptStyle]) -> None:
    """A style without a place gives the same text for two system prompts."""
    one, other = (style().apply("a?", sys_prompt=text) for text in ("b", "c"))
    assert takes_system_prompt(style()) == (one != other)


@pytest.mark.parametrize("style", [Default(), Alpaca(), Llama3()], ids=lambda style: type(style).__name__)
def test_a_conversation_is_what_chat_reads_turn_by_turn(style: PromptStyle) -> None:
    from litgpt_kv.llm.chat import later_turn

    messages = [{"role": r, "content": c} for r, c in (("user", "a?"), ("assistant", "b."), ("user", "c?"))]
    if isinstance(style, Default):
        assert conversation_text(style, messages) == "a?b.c?"
        return
    text = conversation_text(style, messages, "Be brief.")
    assert text == style.apply("a?", sys_prompt="Be brief.") + "b." + later_turn(style, "c?")
    first = [{"role": "system", "content": "Be kind."}, messages[0]]
    assert conversation_text(style, first, "Be brief.") == style.apply("a?", sys_prompt="Be kind.")
    with pytest.raises(ValueError, match="user and assistant in turns"):
        conversation_text(style, [messages[0], messages[2]])
