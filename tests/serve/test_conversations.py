"""A conversation on the server goes on from what the cache kept, as `Chat` does."""

from __future__ import annotations

import openai
import pytest

from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.llm.turns import Turns
from litgpt_kv.serve.conversations import Conversations, KeptState
from tests.serve.conftest import CACHES, serving

TURNS = ["import os\nimport sys", "class A(object):", "def x(self):"]


def say(client: openai.OpenAI, messages: list, text: str, id: str | None = "a", **settings):
    """One turn; the reply is added to the messages."""
    messages.append({"role": "user", "content": text})
    extra = {key: value for key, value in {"conversation": id, **settings.pop("extra", {})}.items() if value}
    settings = {"temperature": 0, "max_tokens": 20, **settings}
    answer = client.chat.completions.create(model="demo", messages=messages, extra_body=extra, **settings)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    return answer


@pytest.mark.parametrize("cache", ["h2o", "dense", "window"])
def test_turns_are_those_of_chat(client: openai.OpenAI, llm: LLM, cache: str) -> None:
    """Also with settings that look back: the repetition penalty counts all that was said."""
    settings = {"repetition_penalty": 1.2, "temperature": 0.7}
    chat = llm.chat(kv_cache=CACHES[cache], max_tokens=1024, max_new_tokens=20, seed=7, **settings)
    messages: list = []
    for turn, text in enumerate(TURNS):
        extra = {"kv_cache": cache, "repetition_penalty": 1.2}
        answer = say(client, messages, text, f"chat {cache}", temperature=0.7, seed=7 + turn, extra=extra)
        assert answer.choices[0].message.content == chat.ask(text)
        kv = answer.usage.kv
        assert (kv["seen"], kv["kept"]) == (chat.cache.seen[0], chat.cache.tokens()["kept"][0])
        assert (kv["reused"] > 0) == (turn > 0)


def test_a_turn_that_begins_with_the_beginning_of_text_token_is_that_of_chat(llm: LLM) -> None:
    """The token is a part of the turn there, as between the turns of some chat templates."""
    plain, llm.prompt_style = llm.prompt_style, Turns("", "\n", "<|endoftext|>", "\n")
    try:
        chat, messages = llm.chat(kv_cache=CACHES["h2o"], max_tokens=1024, max_new_tokens=20, temperature=0), []
        with serving(llm, {"h2o": CACHES["h2o"]}) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
            for text in TURNS:
                answer = say(client, messages, text)
                assert answer.choices[0].message.content == chat.ask(text)
                assert answer.usage.kv["seen"] == chat.cache.seen[0]
    finally:
        llm.prompt_style = plain


def test_other_messages_start_anew(client: openai.OpenAI) -> None:
    messages: list = []
    say(client, messages, TURNS[0])
    changed = [*messages[:1], {"role": "assistant", "content": "something else"}]
    assert say(client, changed, TURNS[1]).usage.kv["reused"] == 0
    assert say(client, messages, TURNS[1], extra={"kv_cache": "dense"}).usage.kv["reused"] == 0
    with pytest.raises(openai.BadRequestError, match="n must be 1"):
        say(client, messages, TURNS[2], n=2)
    with pytest.raises(openai.BadRequestError, match="keeps nothing"):
        say(client, messages[:-1], TURNS[2], extra={"kv_cache": "none"})


def test_memory_is_bounded_and_the_least_recently_used_leaves(llm: LLM) -> None:
    one = llm.build_cache(KVCacheArgs("h2o", budget=24), 1, 1024).allocated()["total"]
    with serving(llm, {"h2o": KVCacheArgs("h2o", budget=24)}, conversation_bytes=5 * one // 2) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        talks = {id: [] for id in "abc"}
        for id in "ab":
            say(client, talks[id], TURNS[0], id)
        assert say(client, talks["a"], TURNS[1], "a").usage.kv["reused"] > 0
        say(client, talks["c"], TURNS[0], "c")  # b is the oldest now
        kept = server.service.conversations
        assert len(kept) == 2 and 2 * one < kept.nbytes < 5 * one // 2, "messages and tokens count, too"
        assert say(client, talks["a"], TURNS[1], "a").usage.kv["reused"] > 0
        assert say(client, talks["b"], TURNS[1], "b").usage.kv["reused"] == 0


def test_a_state_that_is_too_large_is_not_kept() -> None:
    kept = Conversations(10)
    kept.keep("a", KeptState("h2o", (), None, 0, (), 8, 1))  # type: ignore[arg-type]
    kept.keep("a", KeptState("h2o", (), None, 0, (), 11, 1))  # type: ignore[arg-type]
    assert len(kept) == 0 and kept.nbytes == 0
