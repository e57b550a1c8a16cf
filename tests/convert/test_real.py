"""The real model, SmolLM2-135M-Instruct: skipped unless `make real` has fetched it, which no test does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from litgpt import prompts
from litgpt_kv import LLM
from litgpt_kv.llm.text_request import TextRequest
from tests.convert.test_templates import SMOLLM, rendered

FOLDER = Path(__file__).parents[2] / "checkpoints" / "SmolLM2-135M-Instruct"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (FOLDER / "lit_model.pth").is_file(), reason="the real model is not here: `make real`"),
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(FOLDER, accelerator="cpu")


def test_it_is_the_model_that_it_says(llm: LLM) -> None:
    assert llm.config.name == "SmolLM2-135M-Instruct" and llm.config.rope_base == 100_000
    assert sum(p.numel() for p in llm.model.transformer.parameters()) == 134_515_008
    assert isinstance(llm.prompt_style, prompts.SmolLM2) and llm.ends() == [[2]]


def test_it_answers(llm: LLM) -> None:
    assert "Paris" in llm.generate("What is the capital of France?", max_new_tokens=12, temperature=0.0)


@torch.no_grad()
def test_it_expects_what_comes(llm: LLM) -> None:
    """Measured: a loss of 2.135 a token; 4.325 with the rows of q and k left in GGUF's order."""
    text = "The quick brown fox jumps over the lazy dog. One, two, three, four, five, six, seven, eight, nine, ten."
    ids = llm.encode_text(text)
    logits = llm.model(ids[None])[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    assert 2.1 < loss < 2.2


def test_digits_stand_alone_and_a_conversation_begins_once(llm: LLM) -> None:
    assert [llm.decode([id]) for id in llm.tokenizer.processor.encode("a 1984").ids] == ["a", " ", "1", "9", "8", "4"]
    rng = random.Random(0)
    asked = []
    for n in range(3):
        asked.append({"role": "user", "content": f"{rng.random()} 数字 🙂?"})
        ids = llm.request(TextRequest(messages=tuple(asked))).prompt.tolist()
        expected = rendered(SMOLLM, asked)
        assert llm.tokenizer.processor.decode(ids, skip_special_tokens=False) == expected
        assert ids.count(1) == expected.count("<|im_start|>") == 2 * n + 3 and ids[1] != 1
        asked.append({"role": "assistant", "content": "Yes."})
