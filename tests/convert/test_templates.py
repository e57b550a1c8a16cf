"""Prompt styles say what the files' chat templates say, in conversations too, and no text begins twice."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jinja2
import pytest
import yaml
from tokenizers import processors

from litgpt import prompts
from litgpt_kv import LLM
from litgpt_kv.convert.checkpoint import convert
from litgpt_kv.convert.templates import style_of
from litgpt_kv.llm.chat import conversation_text, later_turn
from litgpt_kv.llm.checkpoint import TURNS, load_prompt
from litgpt_kv.llm.text_request import TextRequest
from litgpt_kv.llm.turns import Turns
from tests.convert.tiny import CHATML, make_model, make_tokenizer, write_gguf

# Written in the manner of published templates.
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}" + CHATML.partition("%}")[2]
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA2 = (  # the system prompt stands inside of the first turn, and every turn begins and ends as a text
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{{ '<|assistant|>\n' }}"
)
COUNTING = (  # numbers its turns: no style of fixed texts can
    "{% for message in messages %}{{ loop.index ~ message['role'] ~ ':' ~ message['content'] ~ '\n' }}{% endfor %}"
)
TEMPLATES = {"smollm": SMOLLM, "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "llama2": LLAMA2, "phi3": PHI3}
MESSAGES = [
    ("user", " What's 2+2? "),
    ("assistant", "4 {ok}"),
    ("user", "And\n3?"),
    ("assistant", "6"),
    ("user", "Bye 🙂"),
]


def rendered(template: str, messages: list[dict[str, str]], bos: str = "<s>", eos: str = "</s>") -> str:
    """What jinja2 makes of it, as transformers sets it up."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    made = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    given = dict(bos_token=bos, eos_token=eos, add_generation_prompt=True, raise_exception=refuse)
    return made.render(messages=messages, **given)


def messages(system: str | None, turns: int = 5) -> list[dict[str, str]]:
    first = [("system", system)] if system else []
    return [{"role": role, "content": content} for role, content in [*first, *MESSAGES[:turns]]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_the_templates(name: str) -> None:
    style, exact = style_of(TEMPLATES[name], "<s>", "</s>")
    assert exact
    own = {"smollm": prompts.SmolLM2, "chatml": prompts.Qwen3}
    assert type(style) in (own.get(name, Turns), prompts.ChatML)
    style = style if not isinstance(style, Turns) else Turns.of(yaml.safe_load(yaml.safe_dump(style.data())))
    for system in (None, "Be brief."):
        for turns in (1, 3, 5):
            asked = messages(system, turns)
            if name == "gemma" and system:
                with pytest.raises(ValueError, match="no place for a system prompt"):
                    conversation_text(style, asked)
                continue
            text = conversation_text(style, asked)
            assert text == rendered(TEMPLATES[name], asked)
            assert conversation_text(style, messages(None, turns), system) == text
    first = style.apply(MESSAGES[0][1]) + "4" + later_turn(style, MESSAGES[2][1])
    asked = messages(None, 3)
    asked[1]["content"] = "4"
    past = first if name != "llama2" else first.replace("[/INST]4", "[/INST] 4")  # the reply's own space is the model's
    assert past == rendered(TEMPLATES[name], asked)


def test_a_template_that_is_more_than_texts_says_so() -> None:
    style, exact = style_of(COUNTING, "", "")
    assert not exact and style.apply("Hi") == "1user:Hi\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ raise_exception('never') }}",
        "nothing of the messages",
        "{{ messages[0]['content'] * 2 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "x" * 200_000,
    ],
    ids=["syntax", "refuses", "no-message", "twice", "endless", "large", "escape", "long"],
)
def test_hostile_templates_end(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="its chat template"):
        style_of(template, "", "")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "turns must name"),
        ({"first": "a", "reply": "b", "between": "c"}, "turns must name"),
        ({"first": "a", "reply": "b", "between": "c", "past": "d", "code": "e"}, "turns must name"),
        ({"first": 1, "reply": "b", "between": "c", "past": "d"}, "first cannot be 1"),
        ({"first": "a", "reply": "b", "between": "c", "past": "d", "system": "e"}, "system cannot be"),
        ({"first": "a", "reply": "b", "between": "c", "past": "d", "strip": "e"}, "strip cannot be"),
        ({"first": "a" * 200_000, "reply": "b", "between": "c", "past": "d"}, "first cannot be"),
    ],
)
def test_damaged_texts_are_refused(data: object, says: str, tmp_path: Path) -> None:
    (tmp_path / "prompt_style.yaml").write_text(yaml.safe_dump({"class_path": TURNS, "turns": data}))
    with pytest.raises(ValueError, match=says):
        load_prompt(tmp_path, None)


# -- whole checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model with SmolLM2's ChatML, whose first token begins a text, and one with Llama 2's template."""
    made = {}
    for name, template in (("SmolLM2-tiny-Instruct", SMOLLM), ("turns", LLAMA2)):
        folder = made[name] = tmp_path_factory.mktemp("converted") / name
        file = folder.with_suffix(".gguf")
        write_gguf(file, "qwen2", make_model("qwen2"), template=template, add_bos=name == "turns")
        assert convert(file, folder).note is None
    return made


@pytest.mark.parametrize("adds", [False, True], ids=["", "tokenizer-adds"])
@pytest.mark.parametrize("name", ["SmolLM2-tiny-Instruct", "turns"])
def test_three_turns_have_the_templates_tokens_and_one_beginning(
    name: str, adds: bool, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = folders[name]
    llm = LLM.load(folder, accelerator="cpu")
    plain = make_tokenizer()
    if adds:  # what transformers makes of the same file: the tokenizer itself begins every text
        begin = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
        llm.tokenizer.processor.post_processor = begin
        assert llm.tokenizer.encode("<|im_start|>x").tolist()[:2] == [0, 0], "litgpt keeps both"
    for system in (None, "Be brief."):
        chat = llm.chat(system)
        ids, asked = [], [{"role": "system", "content": system}] if system else []
        template = SMOLLM if name != "turns" else LLAMA2
        for text in ("Hi {there}", "And\n1984?", "Bye 🙂"):
            ids += chat.turn(text)
            asked.append({"role": "user", "content": text})
            expected = rendered(template, asked, "<|im_start|>", "<|im_end|>")
            assert plain.decode(ids, skip_special_tokens=False) == expected
            assert ids == plain.encode(expected).ids and ids[:2].count(0) == 1
            one = llm.request(TextRequest(messages=tuple(asked))).prompt.tolist()
            assert one == ids
            reply = " ok" if name == "turns" else "ok"
            ids += plain.encode(reply).ids
            asked.append({"role": "assistant", "content": "ok"})
            chat._reply = type("Ended", (), {"last": -1})()


def test_what_a_converted_folder_says(folders: dict[str, Path]) -> None:
    folder = folders["SmolLM2-tiny-Instruct"]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<|im_start|>" and settings["eos_token"] == "<|im_end|>"
    assert settings["add_bos_token"] is False and settings["chat_template"] == SMOLLM
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}
    assert type(load_prompt(folder, None)) is prompts.SmolLM2
    llm = LLM.load(folder, accelerator="cpu")
    assert llm.ends() == [[1]]
    assert isinstance(load_prompt(folders["turns"], None), Turns)
