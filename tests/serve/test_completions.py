"""The official `openai` client, unmodified: what it sends is understood, and what it gets is what `LLM` gives."""

from __future__ import annotations

import json
import math

import httpx
import openai
import pytest
import torch

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.llm.turns import Turns
from litgpt_kv.serve.server import Server
from tests.serve.conftest import CACHES

GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 12}
PROMPTS = ["def fib(", "import os\nimport sys\n\nclass A(object):\n    def __init__(self, x", "x = [1, 2"]


def alone(llm: LLM, prompt, cache="h2o", max_new_tokens=12, **settings):
    settings = {"temperature": 0.0, **settings}
    return llm.generate(prompt, max_new_tokens=max_new_tokens, kv_cache=CACHES[cache], **settings)


def test_models_and_health(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("name", ["demo", "org/group/model name"])
def test_one_model_by_its_name(server: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(server.service, "name", name)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    model = client.models.retrieve(name)
    assert (model.id, model.object) == (name, "model") and model == client.models.list().data[0]
    url = f"{server.url}/v1/models/{name}"
    assert httpx.get(url).json() == httpx.get(url.replace("/group/", "%2Fgroup%2F")).json() == model.to_dict()
    for other in ("gpt-4", "org/other", f"{name}/"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve(other)
        error = refused.value.response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model") and repr(other) in error["message"]


@pytest.mark.parametrize("cache", CACHES)
def test_a_text(client: openai.OpenAI, llm: LLM, cache: str) -> None:
    answer = client.completions.create(prompt=PROMPTS[1], extra_body={"kv_cache": cache}, **GREEDY)
    assert answer.choices[0].text == alone(llm, PROMPTS[1], cache)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(llm.encode_text(PROMPTS[1]))
    assert answer.usage.completion_tokens == 12
    kv = answer.usage.kv
    read = answer.usage.prompt_tokens + 11  # the last new token is not read
    kept = {"h2o": 24, "dense": read, "window": 16, "none": 0}[cache]
    assert (kv["cache"], kv["kept"], kv["seen"]) == (cache, kept, 0 if cache == "none" else read)
    assert (kv["bytes"] > 0) == (cache != "none")


def test_lists_of_texts_and_of_tokens(client: openai.OpenAI, llm: LLM) -> None:
    expected = alone(llm, PROMPTS)
    ids = [llm.encode_text(text).tolist() for text in PROMPTS]
    for prompt in (PROMPTS, ids):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(prompt=ids[2], **GREEDY).choices[0].text == expected[2]


def test_sampling_is_that_of_the_library(client: openai.OpenAI, llm: LLM) -> None:
    settings = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    ours = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    answer = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=20, n=3, extra_body=ours, **settings)
    expected = [
        alone(llm, PROMPTS[0], max_new_tokens=20, **{**settings, **ours, "seed": 5 + sample}) for sample in range(3)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 3


def test_stop_is_cut_out(client: openai.OpenAI, llm: LLM) -> None:
    whole = alone(llm, PROMPTS[0], max_new_tokens=40)
    stop = whole[10:13]
    settings = {**GREEDY, "max_tokens": 40, "stop": [stop, "never seen"]}
    answer = client.completions.create(prompt=PROMPTS[0], logprobs=0, **settings)
    choice = answer.choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    streamed = list(client.completions.create(prompt=PROMPTS[0], stream=True, logprobs=0, **settings))
    assert "".join(part.choices[0].text for part in streamed) == choice.text
    tokens = [token for part in streamed if part.choices[0].logprobs for token in part.choices[0].logprobs.tokens]
    assert tokens == choice.logprobs.tokens
    assert "".join(tokens) == choice.text[: len("".join(tokens))]


@pytest.mark.parametrize("cache", ["h2o", "dense", "none"])
def test_echo_and_logprobs_are_those_of_the_cache(client: openai.OpenAI, llm: LLM, cache: str) -> None:
    """As lm-eval asks: the prompt's own log-probabilities. The reference reads the same tokens with the model."""
    prompt = llm.encode_text(PROMPTS[1]).tolist() * 2  # longer than h2o's budget
    asked = {"prompt": prompt, "echo": True, "logprobs": 2, "extra_body": {"kv_cache": cache}, **GREEDY}
    answer = client.completions.create(**{**asked, "max_tokens": 3})
    tokens = [*prompt, *map(int, alone_ids(llm, prompt, cache, 3))]
    got = answer.choices[0].logprobs
    expected = scores(llm, tokens, len(prompt), cache)
    assert got.token_logprobs[0] is None and got.top_logprobs[0] is None
    assert got.token_logprobs[1:] == pytest.approx([odds for odds, _ in expected], abs=1e-5)
    assert [max(top.values()) for top in got.top_logprobs[1:]] == pytest.approx(
        [best for _, best in expected], abs=1e-5
    )
    assert all(odds in top.values() for odds, top in zip(got.token_logprobs[1:], got.top_logprobs[1:]))
    assert answer.choices[0].text == "".join(got.tokens) == llm.decode(tokens)
    assert got.text_offset[:3] == [0, len(got.tokens[0]), len(got.tokens[0] + got.tokens[1])]
    scored = client.completions.create(**{**asked, "max_tokens": 0})
    assert scored.choices[0].logprobs.token_logprobs == got.token_logprobs[: len(prompt)]
    assert scored.choices[0].text == llm.decode(prompt) and scored.usage.completion_tokens == 0
    parts = list(client.completions.create(**{**asked, "max_tokens": 3, "stream": True}))
    odds = [x for part in parts if part.choices[0].logprobs for x in part.choices[0].logprobs.token_logprobs]
    assert odds == got.token_logprobs
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text


def alone_ids(llm: LLM, prompt: list[int], cache: str, new: int) -> list[int]:
    from litgpt_kv.generate import generate

    args = CACHES[cache]
    from litgpt_kv import SamplingArgs

    return generate(llm.model, [prompt], args, max_new_tokens=new, sampling=SamplingArgs(temperature=0))[0].tolist()


@torch.inference_mode()
def scores(llm: LLM, tokens: list[int], prompt: int, cache: str) -> list[tuple[float, float]]:
    """Of each token but the first its log-probability, and the greatest one: a first pass, then token by token."""
    first = prompt if cache != "h2o" else CACHES["h2o"].budget
    logits = list(llm.model(torch.tensor([tokens[:first]]))[0])
    if cache == "none":
        logits = list(llm.model(torch.tensor([tokens]))[0])
    else:
        own = llm.build_cache(CACHES[cache] or KVCacheArgs(), 1, 200)
        llm.model(torch.tensor([tokens[:first]]), own, torch.tensor([first]))
        logits += [llm.model(torch.tensor([[token]]), own)[0, 0] for token in tokens[first:]]
    odds = [x.log_softmax(-1) for x in logits]
    return [(odds[at][token].item(), odds[at].max().item()) for at, token in enumerate(tokens[1:])]


def test_a_chat_and_its_stream(client: openai.OpenAI, llm: LLM) -> None:
    messages = [{"role": "user", "content": "import os"}]
    asked = {"model": "demo", "messages": messages, "temperature": 0, "max_completion_tokens": 9}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **asked)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", alone(llm, "import os", max_new_tokens=9))
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == message.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)  # greedy
    llm.generate("import os", max_new_tokens=9, temperature=0.0, kv_cache=CACHES["h2o"], logprobs=True)
    assert [token.logprob for token in content] == pytest.approx(llm.stats.logprobs[0], abs=1e-6)
    usage = {"stream_options": {"include_usage": True}}
    parts = list(client.chat.completions.create(stream=True, n=2, **usage, **asked))
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == 18
    kv, seen = parts[-1].usage.kv, parts[-1].usage.prompt_tokens + 8  # of each answer; its last token is not read
    assert (kv["cache"], kv["seen"], kv["kept"], kv["reused"]) == ("h2o", 2 * seen, 2 * min(seen, 24), 0)
    for number in range(2):
        own = [part.choices[0] for part in parts[:-1] if part.choices[0].index == number]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert own[-1].finish_reason == "length" and not own[-1].delta.content
        assert all(choice.finish_reason is None for choice in own[:-1])
        assert "".join(choice.delta.content or "" for choice in own) == message.content


def test_the_end_of_the_models_text(client: openai.OpenAI, llm: LLM) -> None:
    """With a stop token that the model makes, the reason is "stop", and max_tokens counts for nothing."""
    whole = alone(llm, PROMPTS[0], max_new_tokens=60)
    answer = client.completions.create(
        prompt=PROMPTS[0], extra_body={"ignore_eos": True}, **{**GREEDY, "max_tokens": 60}
    )
    assert len(answer.choices[0].text) >= len(whole)
    assert answer.usage.completion_tokens == 60


def test_events_end_as_openais(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 3, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {part["object"] for part in parts} == {"text_completion"}
    assert len({part["id"] for part in parts}) == 1
    assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_tokens(server: Server, llm: LLM) -> None:
    def post(path: str, **body):
        return httpx.post(f"{server.url}{path}", json=body).json()

    ids = llm.encode_text(PROMPTS[0]).tolist()
    assert post("/tokenize", prompt=PROMPTS[0]) == {"count": len(ids), "max_model_len": 1024, "tokens": ids}
    assert post("/tokenize", prompt=PROMPTS[0], add_special_tokens=False)["tokens"] == ids[1:]
    assert post("/tokenize", prompt="<|endoftext|>a", add_special_tokens=False)["tokens"] == [0, 65]
    assert post("/tokenize", messages=[{"role": "user", "content": PROMPTS[0]}])["tokens"] == ids
    assert post("/detokenize", tokens=ids) == {"prompt": PROMPTS[0]}


REFUSED = [
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"nonsense": 1}, "nonsense"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": -1, "min_tokens": 3}, "max_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logprobs": 1000}, "logprobs"),
    ({"kv_cache": "unknown"}, "kv_cache"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"conversation": "a"}, "conversation"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [5000]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda x: x if isinstance(x, str) else None)
def test_what_is_refused_names_the_field(server: Server, change: dict, param: str) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 2, **change})
    answer = httpx.post(f"{server.url}/v1/completions", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert math.isfinite(len(error["message"])) and "Traceback" not in error["message"]


def test_a_system_message_without_a_place_is_refused(server: Server) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = httpx.post(f"{server.url}{path}", json={"messages": messages})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "messages")
        assert "prompt style, Default, has no place for a system prompt" in error["message"]


def test_a_system_message_without_a_place_in_a_template_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma's chat template does: nothing that a client says is left out in silence."""
    monkeypatch.setattr(server.service.llm, "prompt_style", Turns("", "\n", "", "\n"))
    body = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]}
    for path, more in (("/v1/chat/completions", {"max_tokens": 2}), ("/tokenize", {})):
        answer = httpx.post(server.url + path, json={**body, **more})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "messages"), error
        assert "no place for a system prompt" in error["message"]
        without = httpx.post(server.url + path, json={"messages": body["messages"][1:], **more})
        assert without.status_code == 200


def test_a_number_with_too_many_digits_is_refused_in_our_words(server: Server) -> None:
    body = b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}"
    answer = httpx.post(f"{server.url}/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The body has a number with too many digits."


def test_several_answers_to_a_prompt_read_it_once(client: openai.OpenAI, server: Server) -> None:
    stats = server.service.loop.served()["h2o"][0].stats
    asked = {"model": "demo", "prompt": "def several(answers, to, one):", "max_tokens": 8, "temperature": 1.0}
    before = stats.prompt_tokens
    together = client.completions.create(**asked, n=3, seed=5)
    read = stats.prompt_tokens - before
    assert read == together.usage.prompt_tokens
    alone = [client.completions.create(**asked, seed=seed).choices[0].text for seed in (5, 6, 7)]
    assert [choice.text for choice in together.choices] == alone
    assert len(set(alone)) > 1


def test_what_asks_for_nothing_special_is_taken(server: Server) -> None:
    neutral = {"response_format": {"type": "text"}, "tools": [], "logit_bias": {}, "user": "me", "seed": None}
    assert (
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 1, **neutral}).status_code == 200
    )


def test_a_prompt_that_does_not_fit_says_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"1000 tokens; with 100 new ones it is over the limit of 1024"):
        client.completions.create(model="demo", prompt=[5] * 1000, max_tokens=100, extra_body={"kv_cache": "dense"})
    with pytest.raises(openai.NotFoundError, match="not 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="a")
