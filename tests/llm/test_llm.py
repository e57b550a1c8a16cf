"""`LLM` on the shipped checkpoint."""

import pytest
import torch

from litgpt import LLM as LitLLM
from litgpt_kv import LLM, KVCacheArgs
from litgpt_kv.llm.checkpoint import DEMO

PROMPTS = ["def fib(", "import os\nimport sys\n\n\nclass Parser:\n    def __init__(self", "x"]


@pytest.fixture(scope="module")
def llm():
    return LLM.load("demo", accelerator="cpu")


def test_a_string_gives_a_string_and_a_list_a_list(llm):
    one = llm.generate(PROMPTS[0], max_new_tokens=9, temperature=0.0)
    many = llm.generate(PROMPTS, max_new_tokens=9, temperature=0.0)
    assert isinstance(one, str)
    assert one
    assert many == [llm.generate(p, max_new_tokens=9, temperature=0.0) for p in PROMPTS]


def test_the_text_that_litgpt_makes_of_the_same_checkpoint(llm):
    litgpt_llm = LitLLM.load(str(DEMO), distribute=None)
    litgpt_llm.distribute(accelerator="cpu", precision="32-true")
    for prompt in PROMPTS:
        expected = litgpt_llm.generate(prompt, max_new_tokens=30, top_k=1)
        assert llm.generate(prompt, max_new_tokens=30, top_k=1, ignore_eos=True).rstrip() == expected.rstrip()


def test_streaming_gives_the_same_text(llm):
    text = llm.generate(PROMPTS[1], max_new_tokens=20, temperature=0.0)
    pieces = list(llm.generate(PROMPTS[1], max_new_tokens=20, temperature=0.0, stream=True))
    assert len(pieces) > 10
    assert "".join(pieces) == text
    rows = list(llm.generate(PROMPTS, max_new_tokens=20, temperature=0.0, stream=True))
    assert "".join(row[1] for row in rows) == text


def test_token_ids(llm):
    ids = llm.generate(PROMPTS, max_new_tokens=6, temperature=0.0, return_as_token_ids=True)
    assert [(i.dtype, i.shape) for i in ids] == [(torch.int64, (6,))] * 3


def test_cache_options(llm):
    text = llm.generate(PROMPTS[1], max_new_tokens=40, temperature=0.0, kv_cache="h2o", budget=16)
    assert llm.cache.tokens() == {"seen": [len(llm.encode(PROMPTS[1])) + 39], "kept": [16]}
    assert text == llm.generate(PROMPTS[1], max_new_tokens=40, temperature=0.0, kv_cache=KVCacheArgs("h2o", 16))
    assert text != llm.generate(PROMPTS[1], max_new_tokens=40, temperature=0.0)
    assert llm.generate(PROMPTS[1], max_new_tokens=9, temperature=0.0, kv_cache=None) == llm.generate(
        PROMPTS[1], max_new_tokens=9, temperature=0.0
    )


def test_a_seed_repeats(llm):
    first = llm.generate(PROMPTS[0], max_new_tokens=20, seed=1)
    assert first == llm.generate(PROMPTS[0], max_new_tokens=20, seed=1)
    assert first != llm.generate(PROMPTS[0], max_new_tokens=20, seed=2)


def test_compiled_decoding_gives_the_same_text():
    llm = LLM.load("demo", accelerator="cpu")
    settings = dict(max_new_tokens=24, temperature=0.0, kv_cache="h2o")
    seen = len(llm.encode(PROMPTS[1])) + 23
    share = f"{100 * 16 / seen:.2f}%"  # of the tokens that the row will see, not of a rounded number
    plain = [llm.generate(PROMPTS[1], **settings, budget=budget) for budget in (16, share, [share] * 6)]
    assert plain == [plain[0]] * 3 and max(llm.cache.tokens()["kept"]) == 16
    notes, seconds = [], []
    llm.compile(notes.append)
    for budget in (16, share, [share] * 6):
        assert llm.generate(PROMPTS[1], **settings, budget=budget) == plain[0]
        assert max(llm.cache.tokens()["kept"]) == 16
        seconds.append(llm.stats.compile_seconds)
        assert llm.stats.decode_seconds < 5
    assert len(notes) == 2 * llm.decoder.graphs and notes[0].startswith("Compiling the decode step")
    assert sum(seconds) == pytest.approx(llm.decoder.seconds) and seconds[0] > 0 == seconds[1] == seconds[2]


def test_precisions():
    for precision in ("32-true", "bf16-true", "64-true", "bf16-mixed"):
        llm = LLM.load("demo", accelerator="cpu", precision=precision)
        assert len(llm.generate(PROMPTS, max_new_tokens=8, temperature=0.0, kv_cache="h2o", budget=16)) == 3


def test_random_weights(tmp_path):
    with pytest.raises(ValueError, match="tokenizer_dir"):
        LLM.load("pythia-14m", init="random")
    llm = LLM.load("pythia-14m", init="random", tokenizer_dir=DEMO, accelerator="cpu")
    assert isinstance(llm.generate("x", max_new_tokens=3, top_k=1), str)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "no prompts"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"kv_cache": "nope"}, "Unknown strategy 'nope'"),
        ({"budget": 3}, "over the limit of 3"),
        ({"top_p": -0.1}, "top_p"),
    ],
)
def test_what_is_refused(llm, settings, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(**{"prompt": "def f", "max_new_tokens": 5, **settings})


def test_settings_one_a_prompt(llm):
    many = llm.generate(PROMPTS, max_new_tokens=9, temperature=[0.0, 1.0, 0.7], top_k=[None, 5, 9], seed=[1, 2, 3])
    for b, (t, k) in enumerate(((0.0, None), (1.0, 5), (0.7, 9))):
        assert many[b] == llm.generate(PROMPTS[b], max_new_tokens=9, temperature=t, top_k=k, seed=b + 1)
    with pytest.raises(ValueError, match="temperature has 2 values for 3 rows"):
        llm.generate(PROMPTS, temperature=[0.0, 1.0])


def test_few_rows_for_many_prompts(llm):
    texts = [f"{p}{n}" for n in range(4) for p in PROMPTS]
    expected = llm.generate(texts, max_new_tokens=7, seed=3, logprobs=True)
    odds = llm.stats.logprobs
    assert llm.generate(texts, max_new_tokens=7, seed=3, batch_size=2, logprobs=True) == expected
    assert [len(row) for row in llm.stats.logprobs] == [len(row) for row in odds]
    assert llm.stats.reasons == ["length"] * 12
    pieces = list(llm.generate(texts, max_new_tokens=7, seed=3, batch_size=5, stream=True))
    assert ["".join(row) for row in zip(*pieces)] == expected


def test_benchmark(llm):
    text, table = llm.benchmark(3, prompt=PROMPTS[0], max_new_tokens=9, temperature=0.0)
    assert text == llm.generate(PROMPTS[0], max_new_tokens=9, temperature=0.0)
    assert table["Tokens generated"] == [9, 9, 9]
    assert all(len(values) == 3 and min(values) > 0 for values in table.values())
    streamed, _ = llm.benchmark(1, prompt=PROMPTS, max_new_tokens=9, temperature=0.0, stream=True)
    assert streamed == llm.generate(PROMPTS, max_new_tokens=9, temperature=0.0)
