"""litgpt's own code drives our GPT: its tokens where it is right, those of the forward without a cache everywhere.

B rows · T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import litgpt.model as base
from litgpt.chat import base as chat
from litgpt.generate import base as generation
from litgpt.generate.sequentially import sequential
from litgpt.generate.speculative_decoding import generate as speculate
from litgpt_kv import GPT, KVCache
from tests.model.test_compile import Counting
from tests.model.test_gpt import FAMILIES, config_of
from tests.oracle.reference import lift
from tests.oracle.shrink import SYNTHETIC, WINDOW, shrink, twins

TOKENS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(3))
T = TOKENS.size(1)
assert T > 4 * WINDOW
# where litgpt's own cache is right: no softcapping with a cache, no prompt or block across a window
RIGHT = ["pythia-14m", "falcon-7b", "phi-2", "Llama-3.2-1B", "Gemma-2b", "OLMo-2-1124-7B", "Qwen3-0.6B", "latent"]
RIGHT += ["grouped-moe", "interleaved", "rope-one", "Mixtral-8x7B-v0.1"]
WRONG = ["Gemma-2-2b", "softcap-global", "Mistral-7B-v0.1", "Gemma-3-1b-it", "softcap-window", "latent-softcap"]


def exact(name: str, seed: int = 0) -> GPT:
    ours, _ = twins(config_of(name))
    return lift(ours)


class Cacheless(torch.nn.Module):
    """A model for litgpt's loops that remembers the text at its positions and reads all of it again at every step."""

    def __init__(self, model: base.GPT) -> None:
        super().__init__()
        self.model, self.max_seq_length = model, model.max_seq_length
        self.text = torch.zeros(2, model.max_seq_length, dtype=torch.int64)

    def forward(self, idx: Tensor, input_pos: Tensor, input_pos_maxp1: int | None = None) -> Tensor:
        self.text[: len(idx), input_pos] = idx
        return self.model(self.text[: len(idx), : int(input_pos[-1]) + 1])[:, input_pos]


def attach(model: base.GPT, rows: int = 1, size: int | None = None) -> base.GPT:
    model.clear_kv_cache()
    model.set_kv_cache(rows, size)
    return model


# -- the model with litgpt's arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(24,), (9, 1, 1, 6, 1, 6), (1,) * 24], ids=["whole", "blocks", "single"])
@pytest.mark.parametrize(
    "name", [name for name in (*FAMILIES, *SYNTHETIC) if name != "grouped-moe"]
)  # whose router stays float32
@torch.no_grad()
def test_any_blocks_of_positions_equal_no_cache(name: str, blocks: tuple[int, ...]) -> None:
    model = attach(exact(name), rows=3, size=40)
    expected, start = model(TOKENS), 0
    for i, n in enumerate(blocks):
        pos = torch.arange(start, start + n)
        pos = pos.expand(2, n) if i % 2 else pos
        end = start + n if i % 3 else None
        logits = model(TOKENS[:, start : start + n], pos, end)
        torch.testing.assert_close(logits, expected[:, start : start + n], rtol=0, atol=1e-8)
        start += n
    assert start == T


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-2-2b", "Gemma-3-1b-it", "latent", "rope-one"])
@torch.no_grad()
def test_padded_prompts_with_positions_of_their_own_give_what_each_gives_alone(name: str) -> None:
    model, lengths = exact(name), [9, 4]
    expected = model(TOKENS)
    for pads in ([4, 4, 4, 4, 4], [4, 5, 6, 7, 8]):  # all in one place, or one behind the other: a whole prompt
        attach(model, rows=2)
        tokens, pos = TOKENS[:, :9].clone(), torch.stack([torch.arange(9), torch.tensor([0, 1, 2, 3, *pads])])
        tokens[1, 4:] = 7
        logits = model(tokens, input_pos=pos, input_pos_maxp1=9)
        for step in range(12):
            for row, length in enumerate(lengths):
                last = length - 1 if step == 0 else 0
                want = expected[row, length - 1 + step]
                torch.testing.assert_close(logits[row, last], want, rtol=0, atol=1e-8)
            now = [length + step for length in lengths]
            token = torch.stack([TOKENS[row, n] for row, n in enumerate(now)]).view(2, 1)
            logits = model(token, torch.tensor(now).view(2, 1))


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Mistral-7B-v0.1", "Gemma-3-1b-it", "latent"])
@torch.no_grad()
def test_a_caller_may_go_back_and_write_again(name: str) -> None:
    model = attach(exact(name))
    expected = model(TOKENS[:1])
    model(TOKENS[:1, :9], torch.arange(9))
    model(torch.full((1, 8), 7), torch.arange(9, 17))  # rejected: more than a window of other tokens
    for at in range(9, 20):
        logits = model(TOKENS[:1, at : at + 1], torch.tensor([at]), input_pos_maxp1=at + 1)
        torch.testing.assert_close(logits[:, 0], expected[:, at], rtol=0, atol=1e-8)


@torch.no_grad()
def test_the_head_in_chunks_and_gradients_that_end_at_the_cache() -> None:
    model = attach(exact("Gemma-2-2b"))
    whole = model(TOKENS[:1])
    for pos in (torch.arange(T), torch.arange(T).expand(1, T)):
        parts = model(TOKENS[:1], pos, T, 7)
        assert [part.size(1) for part in parts] == [7, 7, 7, 3]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-8)
    with torch.enable_grad():
        model(TOKENS[:1, :3], torch.arange(3)).sum().backward()
    assert not model.transformer.h[0].attn.kv_cache.k.requires_grad


def test_a_wrong_call_says_what_is_wrong() -> None:
    model = GPT(config_of("pythia-14m"))
    with pytest.raises(TypeError, match=r"call `gpt.set_kv_cache\(\)`"):
        model(TOKENS, torch.arange(T))
    attach(model, rows=1, size=20)
    for match, idx, kwargs in (
        (r"1 rows, the tokens have 2.*set_kv_cache\(2\)", TOKENS, dict(input_pos=torch.arange(T))),
        (r"\[0,20\).*up to 23", TOKENS[:1], dict(input_pos=torch.arange(T))),
        (r"\[0,20\).*up to 20", TOKENS[:1, :1], dict(input_pos=torch.tensor([20]), input_pos_maxp1=21)),
        (r"shape\[-1\] = 3 != 4", TOKENS[:1, :4], dict(input_pos=torch.arange(3))),
        ("1 or 2 dimensions", TOKENS[:1, :4], dict(input_pos=torch.arange(4).view(1, 1, 4))),
        ("2 rows, the tokens have 1", TOKENS[:1, :4], dict(input_pos=torch.arange(4).expand(2, 4))),
        ("not both", TOKENS[:1, :4], dict(cache=KVCache.build(model), input_pos=torch.arange(4))),
    ):
        with pytest.raises(ValueError, match=match):
            model(idx, **kwargs)
    model.set_kv_cache(1, 48)
    with pytest.raises(IndexError):  # a position is on the device: nobody asks for it
        model(TOKENS[:1, :1], torch.tensor([48]))


def test_buffers_are_what_callers_expect() -> None:
    model = GPT(config_of("Gemma-3-1b-it")).to(torch.bfloat16)
    before = list(model.state_dict())
    model.set_kv_cache(2, 40)
    assert list(model.state_dict()) == before
    for block in model.transformer.h:  # of a sliding layer too: litgpt's ring forgets what a rewind needs
        cache = block.attn.kv_cache
        assert isinstance(cache, base.KVCache)
        assert cache.k.shape == cache.v.shape == (2, model.config.n_query_groups, 40, model.config.head_size)
        assert cache.k.dtype == cache.v.dtype == torch.bfloat16  # litgpt's are float32 until the first pass
        cache.k.fill_(1)
        cache.reset_parameters()
        assert not cache.k.any()
    assert model.mask_cache.shape == (1, 1, 40, 40)
    assert model.mask_cache.device == model.cos.device
    assert model.mask_cache.untyped_storage().nbytes() == 1  # litgpt's at 131,072 tokens: 17 GB
    model.max_seq_length = 30
    model.set_kv_cache(1)
    assert model.mask_cache.size(3) == model.cos.size(0) == 30
    assert model.rope_cache_length() == model.config.rope_n_elem
    model.clear_kv_cache()
    assert model.mask_cache is None
    assert all(block.attn.kv_cache is None for block in model.transformer.h)
    one = model.transformer.h[0].attn.build_kv_cache(1, 12, model.rope_cache_length(), torch.device("cpu"))
    assert one.k.shape[2] == 12


def test_latent_attention_takes_its_cache_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    attach(GPT(config_of("latent")))
    assert capsys.readouterr().out == ""


def test_mixed_precision_and_the_odd_key_width() -> None:
    model = attach(GPT(config_of("rope-one")).eval())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(TOKENS[:1, :9], torch.arange(9)).dtype == torch.bfloat16
        assert model(TOKENS[:1, 9:10], torch.tensor([9])).dtype == torch.bfloat16
    cache = model.transformer.h[0].attn.kv_cache
    assert (cache.k.dtype, cache.k.size(-1), cache.v.size(-1)) == (torch.bfloat16, 5, 4)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-2-2b"])
@torch.no_grad()
def test_prompt_and_decode_compile_to_one_graph_each(name: str) -> None:
    torch._dynamo.reset()
    model, counting = attach(exact(name)), Counting()
    expected = model(TOKENS[:1])
    fast = torch.compile(model, backend=counting, fullgraph=True)
    got = [fast(TOKENS[:1, :9], torch.arange(9))]
    got += [fast(TOKENS[:1, at : at + 1], torch.tensor([at])) for at in range(9, T)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=0, atol=1e-8)
    assert counting.graphs == 2
    for at in range(9, T):  # its size of the cache is a number, which becomes a symbol
        logits = fast(TOKENS[:1, at : at + 1], torch.tensor([at]), input_pos_maxp1=at + 1)
        torch.testing.assert_close(logits[:, 0], expected[:, at], rtol=0, atol=1e-8)
    assert counting.graphs <= 4


# -- litgpt's loops -------------------------------------------------------------------------------------------------


def sampled(loop: Callable, *models: torch.nn.Module, **options: Any) -> list:
    """What a loop of litgpt gives, as lists, with a seed."""
    torch.manual_seed(5)
    out = loop(*models, **options)
    if isinstance(out, tuple):  # speculative decoding
        return [out[0].tolist(), out[1]]
    return [[int(t) for t in tokens] if isinstance(tokens, list) else int(tokens) for tokens in out]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", [*RIGHT, *WRONG])
def test_generate_and_chat(name: str, temperature: float) -> None:
    ours, theirs = (attach(m) for m in twins(config_of(name)))
    options = dict(max_returned_tokens=25, temperature=temperature, top_k=20)
    prompt = TOKENS[0, :13]  # more than two windows
    expected = sampled(generation.generate, Cacheless(theirs), prompt=prompt, **options)
    assert len(set(expected[13:])) > 2  # not a loop that hides the cache
    assert sampled(generation.generate, ours, prompt=prompt, **options) == expected
    if name in RIGHT:
        assert sampled(generation.generate, theirs, prompt=prompt, **options) == expected
    for block in ours.transformer.h:
        block.attn.kv_cache.reset_parameters()
    stop = expected[-1]
    chatted = sampled(chat.generate, ours, prompt=prompt, stop_tokens=([stop],), **options)
    assert chatted == expected[13 : expected.index(stop, 13)]


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-2-2b", "Gemma-3-1b-it"])
def test_batched_generate(name: str) -> None:
    ours, theirs = twins(config_of(name))
    options = dict(prompts=TOKENS[:, :13], max_returned_tokens=25, include_prompt=True, include_eos=True)
    options["sample_args"] = [dict(temperature=0.0), dict(temperature=1.0, top_k=20)]
    expected = sampled(generation.batched_generate_fn, Cacheless(theirs), **options)
    assert len(expected) == 25
    assert sampled(generation.batched_generate_fn, attach(ours, rows=2), **options) == expected


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Gemma-2-2b", "Mistral-7B-v0.1", "Gemma-3-1b-it", "latent"])
@pytest.mark.parametrize("k, noise", [(6, 0.05), (2, 0.05)])
def test_speculative_decoding(name: str, k: int, noise: float) -> None:
    """Rejected tokens: the models go back over positions they have written."""
    ours, theirs = twins(config_of(name))
    drafts = []
    for model in (ours, theirs):
        draft = deepcopy(model)
        with torch.no_grad():
            draft.lm_head.weight += noise * torch.randn(draft.lm_head.weight.shape, generator=torch.manual_seed(2))
        drafts.append(draft)
    options = dict(prompt=TOKENS[0, :13], max_returned_tokens=40, temperature=0.7, speculative_k=k)
    expected = sampled(speculate, Cacheless(drafts[1]), Cacheless(theirs), **options)
    assert sampled(speculate, attach(drafts[0]), attach(ours), **options) == expected
    assert 0.2 < expected[1] < 0.95


def test_one_model_over_the_layers_of_sequential() -> None:
    ours, _ = twins(shrink("Llama-3.2-1B", n_layer=4))
    options = dict(prompt=TOKENS[0, :13], max_returned_tokens=25, temperature=0.0)
    expected = sampled(generation.generate, Cacheless(ours), **options)
    assert sampled(generation.generate, sequential(ours, torch.device("cpu"), 40, 2), **options) == expected


def test_there_is_something_to_get_wrong() -> None:
    """litgpt's own model fails where the tests above say it does."""
    for name in ("Gemma-2-2b", "softcap-global"):
        ours, theirs = twins(config_of(name))
        assert (attach(theirs)(TOKENS[:1, :4], torch.arange(4)) - ours(TOKENS[:1, :4])).abs().max() > 0.1
    theirs = attach(twins(config_of("Mistral-7B-v0.1"))[1])
    with pytest.raises(ValueError, match="exceeds the sliding window"):
        theirs(TOKENS[:1], torch.arange(T))
