"""A conversation keeps its cache: only new turns are read, and replies equal those to the whole text."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from litgpt.prompts import R1Base, prompt_styles
from litgpt_kv import LLM, KVCacheArgs, SamplingArgs, registry
from litgpt_kv.__main__ import main
from litgpt_kv.cli.output import Output
from litgpt_kv.cli.terminal import _reply
from litgpt_kv.generate import generate
from litgpt_kv.llm.chat import later_turn
from tests.oracle.strategies import FEW

GREEDY = SamplingArgs(temperature=0)
TURNS = ["def fib(n):\n", "\n\nclass Parser:\n    def __init__(self):\n", "\nimport os\n"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("demo", accelerator="cpu")


@pytest.mark.parametrize("name", FEW)
def test_turns_equal_the_whole_text_read_again(llm: LLM, name: str) -> None:
    kind = registry.get("strategy", name)
    args = KVCacheArgs(name, 24 if kind.evicts and kind.recency else None)  # others keep what came to them in its order
    chat = llm.chat(kv_cache=args, max_tokens=200, max_new_tokens=12, temperature=0.0)
    ids: list[int] = []
    for n, turn in enumerate(TURNS):
        before = chat.cache.seen[0]
        new = llm.encode(turn).tolist()[bool(n) :]  # a later turn has no beginning of text
        reply = chat.ask(turn)
        assert chat.stats.prompt_tokens == len(new) + bool(n), "only the new turn and the last token are read"
        assert chat.cache.seen[0] == before + len(new) + bool(n) + 11
        ids += new
        (made,) = generate(llm.model, [ids], llm.build_cache(args, 1, 200), max_new_tokens=12, sampling=GREEDY)
        assert reply == llm.decode([*ids, *made.tolist()])[len(llm.decode(ids)) :]
        ids += made.tolist()


def test_reset_begins_anew(llm: LLM) -> None:
    chat = llm.chat(max_tokens=200, max_new_tokens=8, seed=4)
    first = [chat.ask(turn) for turn in TURNS]
    chat.reset()
    assert chat.cache.seen == [0]
    assert [chat.ask(turn) for turn in TURNS] == first


def test_a_reply_that_was_broken_off_stays_as_it_is(llm: LLM) -> None:
    chat = llm.chat(max_tokens=200, max_new_tokens=30, temperature=0.0)
    pieces = chat.say(TURNS[0])
    texts = [next(pieces) for _ in range(5)]
    pieces.close()
    seen = chat.cache.seen[0]
    assert seen == len(llm.encode(TURNS[0])) + 4
    chat.ask(TURNS[1])
    assert chat.stats.prompt_tokens == len(llm.encode(TURNS[1]))  # the last token instead of the beginning of text
    assert "".join(texts)


def test_a_conversation_that_is_full_says_so(llm: LLM) -> None:
    chat = llm.chat(max_tokens=40, max_new_tokens=30, temperature=0.0)
    chat.ask(TURNS[0])
    seen = chat.cache.seen[0]
    for _ in range(9):  # replies get shorter until nothing fits
        try:
            chat.ask("x")
        except ValueError as error:
            assert "do not fit the 40 of this conversation" in str(error)
            break
    else:
        pytest.fail("it went on")
    assert seen < chat.cache.seen[0] <= 40
    with pytest.raises(ValueError, match="prompt is empty"):
        chat.say("")
    endless = llm.chat(kv_cache=KVCacheArgs("sink", 32), max_new_tokens=30)
    for _ in range(4):
        endless.ask(TURNS[1])
    assert endless.cache.seen[0] > 100


def test_each_turn_has_its_seed_and_stop_texts_end_a_reply(llm: LLM) -> None:
    chat = llm.chat(max_tokens=300, max_new_tokens=12, seed=4)
    replies = []
    for _ in range(3):
        replies.append(chat.ask("def f(x):"))
        chat.reset()
    assert len(set(replies)) == 1
    one, two = llm.chat(max_tokens=300, max_new_tokens=12, seed=4), llm.chat(max_tokens=300, max_new_tokens=12, seed=5)
    one.ask("x")
    two.ask("x")
    assert llm.chat(max_tokens=300, max_new_tokens=12, seed=5).ask("x") != llm.chat(seed=4, max_new_tokens=12).ask("x")
    assert one.turns == 1
    assert one._reply.request.sampling.seed == 4
    one.ask("y")
    assert one._reply.request.sampling.seed == 5
    whole = llm.chat(max_new_tokens=30, temperature=0.0).ask("def fib(n):\n")
    stop = whole[10:13]
    assert llm.chat(max_new_tokens=30, temperature=0.0, stop=stop).ask("def fib(n):\n") == whole[: whole.index(stop)]


def test_a_reply_that_ends_itself_has_its_end_in_the_cache_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    free = llm.chat(max_new_tokens=12, temperature=0.0, max_tokens=300)
    free.ask("def fib(n):\n")
    made = list(free._reply.tokens)
    end = made[5]
    monkeypatch.setattr(llm, "ends", lambda: [[end]])
    chat = llm.chat(max_new_tokens=12, temperature=0.0, max_tokens=300)
    reply = chat.ask("def fib(n):\n")
    first = made.index(end)
    assert reply == llm.decode(made[:first]) and chat._reply.reason == "stop"
    before = chat.cache.seen[0]
    later = llm.encode("x = 1").tolist()[1:]
    chat.ask("x = 1")
    assert chat.stats.prompt_tokens == len(later) + 1, "the end is read, then the turn"
    monkeypatch.setattr("litgpt_kv.llm.chat.later_turn", lambda style, text: llm.decode([end]) + text)
    again = llm.chat(max_new_tokens=12, temperature=0.0, max_tokens=300)
    again.ask("def fib(n):\n")
    assert again.cache.seen[0] == before
    again.ask("x = 1")
    both = llm.tokenizer.encode(llm.decode([end]) + "x = 1", bos=False).tolist()
    assert again.stats.prompt_tokens == len(both) + (both[0] != end), "a style that ends the reply does so once"


def test_the_repetition_penalty_remembers_earlier_turns(llm: LLM) -> None:
    chat = llm.chat(max_new_tokens=8, temperature=0.0, max_tokens=300, repetition_penalty=1.5)
    text: list[int] = []
    for n, turn in enumerate(TURNS):
        text += llm.encode(turn).tolist()[bool(n) :]
        chat.ask(turn)
        cache = llm.build_cache(KVCacheArgs(), 1, 300)
        greedy = SamplingArgs(temperature=0, repetition_penalty=1.5)
        (made,) = generate(llm.model, [text], cache, max_new_tokens=8, sampling=greedy)
        assert chat._reply.tokens == made.tolist()
        text += made.tolist()


def test_an_interrupt_ends_a_reply_and_not_the_conversation(llm: LLM, capsys: pytest.CaptureFixture) -> None:
    chat = llm.chat(max_new_tokens=200, temperature=0.0)
    real, texts = chat.say, []

    def say(text):
        for n, piece in enumerate(real(text)):
            texts.append(piece)
            if n == 4:
                signal.raise_signal(signal.SIGINT)
            yield piece

    chat.say = say
    _reply(chat, "def f(x):", Output())
    out = capsys.readouterr().out
    assert out == "".join(texts) + "\n" and len(texts) == 5
    assert chat.cache.seen[0] == len(llm.encode("def f(x):")) + 4
    chat.say = real
    assert chat.ask("x")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("call", [0, 3])
def test_an_interrupt_in_a_step_is_said_and_the_conversation_starts_anew(
    llm: LLM, capsys: pytest.CaptureFixture, call: int
) -> None:
    chat, calls = llm.chat(max_new_tokens=12, temperature=0.0), []
    expected = chat.ask("def f(x):")
    chat.reset()

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt

    hook = llm.model.transformer.h[2].mlp.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            chat.ask("def f(x):")
        with pytest.raises(ValueError, match=r"in the middle of a step.*reset\(\) starts a new conversation"):
            chat.ask("x")
        chat.reset()
        calls.clear()
        _reply(chat, "def f(x):", Output())
        assert "Interrupted in the middle of a step: a new conversation starts." in capsys.readouterr().err
        assert chat.turns == 0 and chat.cache.seen == [0]
    finally:
        hook.remove()
    assert chat.ask("def f(x):") == expected


def test_two_replies_at_once_are_refused(llm: LLM) -> None:
    chat = llm.chat(max_new_tokens=9)
    first, second = chat.say("q"), chat.say("r")
    next(first)
    next(second)
    with pytest.raises(ValueError, match="ended by a new turn"):
        next(first)
    assert len(list(second)) == 8


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"stop": ""}, "stop must be a text of at least one character"),
        ({"temperature": -1.0}, "temperature must be 0 or greater"),
        ({"prefill": "left"}, "prefill must be one of"),
        ({"kv_cache": "none"}, "A chat needs a cache"),
        ({"kv_cache": "h2o", "budget": 0}, "budget must be at least 1"),
    ],
)
def test_what_is_refused(llm: LLM, given: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        llm.chat(**given)


def test_what_stands_between_turns() -> None:
    found = {name: later_turn(style(), "Hi?") for name, style in prompt_styles.items()}
    assert all("Hi?" in text for text in found.values())
    assert found["llama3"] == (
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert found["qwen2.5"] == "<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert found["gemma"] == "<end_of_turn>\n<start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n"
    bar = "\uff5c"
    assert later_turn(R1Base(), "Hi?") == f"<{bar}User{bar}>Hi?<{bar}Assistant{bar}>"  # not among the named styles


def talk(text: str, *args: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    main(["chat", "demo", "--accelerator", "cpu", "--threads", "1", "--temperature", "0", *args])
    return capsys.readouterr()


def test_the_command(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    io_ = {"monkeypatch": monkeypatch, "capsys": capsys}
    chat = llm.chat(max_new_tokens=8, temperature=0.0)
    expected = [chat.ask(t) for t in ("def f(x):", "import\nos", "x")]
    out, err = talk("def f(x):\nimport\\\nos\n\nx\n/quit\nnever\n", "--max-new-tokens", "8", **io_)
    assert out == "".join(reply + "\n" for reply in expected)
    lines = "def f(x):\n!submit\nimport\nos\n!submit\n/cache\nx\n!submit\n"
    out, err = talk(lines, "--max-new-tokens", "8", "--multiline", **io_)
    assert out == "".join(reply + "\n" for reply in expected)
    assert "keeps 24 of 24 tokens" in err
    out, err = talk("def f(x):\n/cache\n/reset\n/cache\n/nonsense\n", "--max-new-tokens", "8", "--kv-cache", "sink",
                    "--kv-cache.budget", "9", **io_)  # fmt: skip
    assert "keeps 9 of 13 tokens" in err
    assert "keeps 0 of 0 tokens" in err
    assert "There is no command /nonsense" in err
    with pytest.raises(SystemExit, match="1"):  # a script must know that a turn was refused
        talk("def f(x):\n" + "y" * 2000 + "\nx\n", "--max-new-tokens", "8", **io_)
    out, err = capsys.readouterr()
    assert "do not fit" in err
    assert out.count("\n") >= 2, "the conversation goes on after a turn that was too long"


def test_no_conversation_without_a_cache(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["chat", "demo", "--kv-cache", "none"])
    assert "chat needs a cache" in capsys.readouterr().err
