"""Where litgpt 0.5.13 is wrong or wasteful: each test shows the fault in litgpt, and that litgpt_kv does not share it.

docs/litgpt_users.md has the list. If a new litgpt mends one, its test fails on litgpt's side, and goes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import litgpt.generate.base as litgpt_generate
import litgpt.model as base
from litgpt.config import Config
from litgpt.prompts import Gemma
from litgpt_kv import GPT, LLM, KVCache, KVCacheArgs, SamplingArgs
from litgpt_kv.attention import causal
from litgpt_kv.attention.rope import theta_of
from litgpt_kv.attention.yarn import yarn_theta
from litgpt_kv.generate import generate
from litgpt_kv.generate.request import Request, Sequence
from tests.oracle.reference import lift, logits_of, tokens_of
from tests.oracle.shrink import LLAMA, SYNTHETIC, WINDOW, YARN, shrink, twins

ROWS = [tokens_of(seed, 4 * WINDOW, 90) for seed in range(2)]
TOKENS = torch.tensor(ROWS)  # (2, 20)
T = TOKENS.size(1)


@torch.no_grad()
def theirs_cached(model: base.GPT, tokens: Tensor, first: int, chunk: int = 1, maxp1: bool = True) -> Tensor:
    """litgpt's own cache over tokens (1, T): a prompt, then blocks; logits (T, V) of all."""
    model.set_kv_cache(1)
    cuts = [0, first, *range(first + chunk, tokens.size(1), chunk), tokens.size(1)]
    logits = []
    for a, b in itertools.pairwise(cuts):
        if a < b:
            pos = torch.arange(a, b)
            logits.append(model(tokens[:, a:b], pos, input_pos_maxp1=b if maxp1 else None)[0])
    return torch.cat(logits)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def ours_is_exact(config: Config, prompt: int, **args: Any) -> None:
    """Our cache gives what litgpt's forward without a cache gives, float64, whichever way the prompt comes in."""
    ours, theirs = (lift(m) for m in twins(config))
    truth = theirs(TOKENS)
    for way in ("streamed", "full"):
        cache = KVCache.build(ours, KVCacheArgs(**args), 2, T)
        for found, expected in zip(logits_of(ours, cache, ROWS, [prompt, prompt - 1], way), truth):
            for i, logits in found.items():
                assert off(logits, expected[i]) < 1e-8, (way, i)


class Watch(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that one of them made (views are free)."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        taken = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in taken:
            self.largest = max(self.largest, out.numel())
        return out


def watched(call: Callable[[], Any]) -> Watch:
    with torch.no_grad(), Watch() as watch:
        call()
    return watch


@contextmanager
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[tuple, dict]]]:
    """What torch's attention kernel is called with: shape of the keys, and the options."""
    calls, plain = [], F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append((tuple(k.shape), options))
        return plain(q, k, v, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        yield calls


# -- wrong numbers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_softcapped_scores_are_masked_not_shifted() -> None:
    """litgpt adds its boolean mask to the scores: the past weighs e times more, and the future is seen."""
    config = SYNTHETIC["softcap-global"]
    _, theirs = twins(config)
    other = TOKENS[:1].clone()
    other[0, -1] = (other[0, -1] + 1) % 90
    seen = off(theirs_cached(theirs, TOKENS[:1], T)[0], theirs_cached(theirs, other, T)[0])
    assert seen > 0.1, "the first token's logits depend on the last token"
    assert off(theirs_cached(theirs, TOKENS[:1], 6), theirs(TOKENS[:1])[0]) > 0.1
    ours_is_exact(config, 6)
    ours, _ = (lift(m) for m in twins(config))
    truth = ours(TOKENS)
    assert off(truth[0, 0], ours(other)[0, 0]) < 1e-12


@torch.no_grad()
def test_b_prompts_longer_than_a_sliding_window() -> None:
    config = shrink("Mistral-7B-v0.1")
    _, theirs = twins(config)
    with pytest.raises(ValueError, match="exceeds the sliding window size"):
        theirs_cached(theirs, TOKENS[:1], WINDOW + 1)
    wrong = theirs_cached(theirs, TOKENS[:1], WINDOW - 1, WINDOW - 1, maxp1=False)  # as the message advises
    assert off(wrong, theirs(TOKENS[:1])[0]) > 0.1
    ours_is_exact(config, 3 * WINDOW)
    ours, theirs = (lift(m) for m in twins(config))
    cache, truth = KVCache.build(ours, "dense"), theirs(TOKENS[:1])
    ours(TOKENS[:1, : WINDOW + 2], cache, torch.tensor([WINDOW + 2]))
    for a in range(WINDOW + 2, T, WINDOW - 1):  # blocks across the window
        block = ours(TOKENS[:1, a : a + WINDOW - 1], cache)
        assert off(block, truth[:, a : a + WINDOW - 1]) < 1e-8


@torch.no_grad()
def test_b_a_window_costs_no_wait_for_the_device() -> None:
    """litgpt reads the largest position back in every local layer and step: its graph breaks there."""
    ours, theirs = twins(shrink("Gemma-3-1b-it"))

    def compiled(model: nn.Module) -> Callable:
        torch._dynamo.reset()
        return torch.compile(model, backend="eager", fullgraph=True)

    theirs.set_kv_cache(1)
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        compiled(theirs)(TOKENS[:1, :1], torch.tensor([0]))
    cache = KVCache.build(ours, "dense")
    ours(TOKENS[:1, :9], cache, torch.tensor([9]))
    compiled(ours)(TOKENS[:1, 9:10], cache)
    assert cache.pos.tolist() == [10]


def test_g_a_stop_sequence_may_begin_inside_a_failed_one() -> None:
    made = [7, 1, 1, 2, 9]

    class Says(nn.Module):
        max_seq_length = 20

        def forward(self, x: Tensor, input_pos: Tensor, input_pos_maxp1: int | None = None) -> Tensor:
            step = 0 if len(input_pos) > 1 else int(input_pos) - 1
            return F.one_hot(torch.tensor([[made[step]]]), 10).float()

    options = dict(temperature=0.0, stop_tokens=([1, 2],), include_prompt=False, include_eos=False)
    theirs = litgpt_generate.generate_fn(Says(), torch.tensor([0, 0]), 2 + len(made), **options)
    assert [int(t) for t in theirs] == made, "litgpt runs past its stop sequence"
    row, out = Sequence(Request([0], 20, stop=[[1, 2]])), []
    for token in made[:4]:
        out += row.push(token)
    assert row.reason == "stop" and out == [7, 1]


def test_h_every_token_is_computed_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """litgpt's benchmark generates twice an iteration and counts the tokens of its text anew."""
    llm, calls = LLM.load("demo", accelerator="cpu"), []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *a, **k: calls.append(a[1].size(1)) or forward(*a, **k))
    llm.generate("def fib(", max_new_tokens=9, top_k=1, ignore_eos=True)
    assert llm.stats.new_tokens == 9 and calls == [len(llm.encode("def fib("))] + [1] * 8


def test_i_a_full_cache_says_so() -> None:
    ours, theirs = twins(shrink("pythia-14m"))
    with torch.no_grad():
        theirs.set_kv_cache(1, max_seq_length=8)
        with pytest.raises((IndexError, RuntimeError)) as bare:
            theirs(TOKENS[:1, :1], torch.tensor([8]))
        assert "8" not in str(bare.value)
        cache = KVCache.build(ours, "dense", max_tokens=8)
        ours(TOKENS[:1, :8], cache, torch.tensor([8]))
        with pytest.raises(ValueError, match="Row 0 would see 9 tokens, over the limit of 8: a dense cache keeps"):
            ours(TOKENS[:1, :1], cache)


def test_j_the_length_of_a_cache_is_its_own() -> None:
    """litgpt has two, the model's and the cache's, and checks the wrong one."""
    ours, theirs = twins(shrink("pythia-14m"))
    theirs.set_kv_cache(1, max_seq_length=8)
    assert theirs.max_seq_length == 48
    short, long = (KVCache.build(ours, "dense", max_tokens=n) for n in (8, 30))
    assert (short.limit, long.limit) == (8, 30)
    ours.max_seq_length = 20  # shorter rope tables: what was built for more is refused at the door
    with pytest.raises(ValueError, match="context is 20"):
        ours(TOKENS[:1].repeat(1, 2), long, torch.tensor([30]))
    with pytest.raises(ValueError, match="limit of 20: the model's context"):
        KVCache.build(ours, "dense", max_tokens=30)


def test_k_building_a_cache_prints_nothing(capsys: pytest.CaptureFixture) -> None:
    base.GPT(SYNTHETIC["latent"]).set_kv_cache(1)
    assert capsys.readouterr().out.count("has no effect") == SYNTHETIC["latent"].n_layer
    for name in SYNTHETIC:
        KVCache.build(GPT(SYNTHETIC[name]))
    out = capsys.readouterr()
    assert out.out == out.err == ""


# -- YaRN --------------------------------------------------------------------------------------------------------------


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    """The shape of DeepSeek-V3: factor 40, 64 rotated elements."""
    adjust = dict(factor=40.0, beta_fast=32.0, beta_slow=1.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0)
    config = shrink(LLAMA, head_size=64, rope_base=10000, rope_adjustments=adjust)
    plain = 1.0 / 10000 ** (torch.arange(0, 64, 2) / 64)
    ours, theirs = (theta_of(m.rope_cache())[0][:32] / plain for m in (GPT(config), base.GPT(config)))
    assert float(theirs[0]) == pytest.approx(1 / 40, rel=1e-4) and float(theirs[-1]) == pytest.approx(1, rel=1e-3)
    assert float(ours[0]) == pytest.approx(1, rel=1e-4) and float(ours[-1]) == pytest.approx(1 / 40, rel=1e-3)
    assert (ours.diff() < 1e-5).all()
    turns = 4096 * plain / (2 * math.pi)  # within the original context
    assert ((ours - 1).abs() < 1e-4)[turns > 33].all() and ((ours * 40 - 1).abs() < 1e-2)[turns < 0.8].all()


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("context", [16, 4096])
@pytest.mark.parametrize(
    "adjust",
    [{}, dict(mscale=1.0), dict(mscale_all_dim=0.8), dict(mscale=1.0, mscale_all_dim=0.8), dict(truncate=False)],
    ids=str,
)
def test_yarn_is_hugging_faces(size: int, context: int, adjust: dict) -> None:
    transformers = pytest.importorskip("transformers", minversion="4.51.3")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = dict(factor=8.0, beta_fast=32.0, beta_slow=1.0, **adjust)
    config = shrink(LLAMA, head_size=size, rope_adjustments={**given, "original_max_seq_len": context})
    scaling = dict(rope_type="yarn", original_max_position_embeddings=context, **given)
    other = transformers.LlamaConfig(head_dim=size, rope_theta=config.rope_base, rope_scaling=scaling)
    expected, amplitude = ROPE_INIT_FUNCTIONS["yarn"](other, torch.device("cpu"))
    mine, own = yarn_theta(config)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0)
    assert own == pytest.approx(amplitude, rel=1e-6)
    cos, _ = GPT(config).rope_cache()
    assert cos.shape == (config.block_size, size) and float(cos[0, 0]) == pytest.approx(amplitude, rel=1e-6)


def test_yarn_with_a_local_base_leaves_that_one_alone() -> None:
    dual = dict(rope_local_base_freq=50.0, rope_indices=[0, 1])
    both, plain = (GPT(shrink(LLAMA, rope_adjustments=YARN, **extra)).rope_cache() for extra in (dual, {}))
    local = GPT(shrink(LLAMA, rope_adjustments=None, rope_base=50)).rope_cache()
    for table, of_all, of_local in zip(both, plain, local):
        assert torch.equal(table[..., 0], of_all) and torch.equal(table[..., 1], of_local)


def test_yarn_without_its_parameters_is_refused_as_in_litgpt() -> None:
    for cls in (GPT, base.GPT):
        with pytest.raises(ValueError, match="YaRN RoPE parameters are missing"):
            cls(shrink(LLAMA, rope_adjustments=dict(factor=8.0, beta_fast=32.0, beta_slow=1.0)))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_l_no_mask_of_the_square_of_the_context() -> None:
    _, theirs = twins(shrink("pythia-14m"))
    theirs.set_kv_cache(1)
    assert theirs.mask_cache.nbytes == 48**2
    config = Config.from_name("Llama-3.1-8B")
    size = KVCache.nbytes(config, KVCacheArgs("dense"), 1, 131072, torch.bfloat16)
    assert size["keys"] == size["values"] == 32 * 8 * 131072 * 128 * 2
    assert size["total"] - size["keys"] - size["values"] == 131072 * 8 + 17  # positions; two counters and a flag


def test_m_the_cache_has_the_models_type() -> None:
    ours, theirs = twins(shrink("pythia-14m"), torch.bfloat16)
    theirs.set_kv_cache(1)
    assert theirs.transformer.h[0].attn.kv_cache.k.dtype == torch.float32, "twice what is needed, until first used"
    assert {layer.keys.data.dtype for layer in KVCache.build(ours).layers} == {torch.bfloat16}


# -- time --------------------------------------------------------------------------------------------------------------


def test_p_keys_of_a_group_are_never_copied_for_its_heads() -> None:
    config = shrink(LLAMA, n_head=8, n_query_groups=2, block_size=400)
    ours, theirs = twins(config)
    heads = 8 * 300 * 16  # what all heads' keys would take
    theirs.set_kv_cache(1)
    token, pos = TOKENS[:1, :1], torch.tensor([299])
    assert watched(lambda: theirs(token, pos, input_pos_maxp1=300)).largest >= heads
    cache = KVCache.build(ours, "dense", max_tokens=320)
    with torch.no_grad():
        ours(TOKENS[:1, :1].repeat(1, 299), cache, torch.tensor([299]))
    assert watched(lambda: ours(token, cache)).largest < heads / 2


def test_q_a_prompt_runs_the_causal_kernel_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = twins(shrink("Llama-3-8B"))
    theirs.set_kv_cache(1)
    with torch.no_grad(), attention_calls(monkeypatch) as calls:
        theirs(TOKENS[:1], torch.arange(T), input_pos_maxp1=T)
        assert all(options["attn_mask"] is not None for _, options in calls) and calls
        calls.clear()
        # the last layer, of which only one token is wanted, is no causal pass
        ours(TOKENS[:1], KVCache.build(ours, "dense"), torch.tensor([T]))
        assert calls[0][1]["attn_mask"] is None and calls[0][1]["is_causal"]


@pytest.mark.parametrize("name", ["Mistral-7B-v0.1", "Gemma-2-2b", "Gemma-3-1b-it"])
def test_r_windows_of_a_whole_sequence_are_made_without_a_loop(name: str) -> None:
    ours, theirs = twins(shrink(name))

    def operations(model: nn.Module, n: int) -> int:
        return watched(lambda: model(TOKENS[:1].repeat(1, 2)[:, :n])).count

    assert operations(theirs, 40) - operations(theirs, 20) >= 2 * 20  # two a position
    ours.rope()  # made once
    assert operations(ours, 40) == operations(ours, 20)
    with torch.no_grad():
        for n in (1, WINDOW - 1, WINDOW, WINDOW + 1, T):
            assert torch.equal(ours(TOKENS[:, :n]), theirs(TOKENS[:, :n]))


def test_r_masks_are_those_of_a_block_and_none_is_made_inside_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = twins(shrink("Mistral-7B-v0.1", n_layer=4, sliding_window_indices=[1] * 4))
    monkeypatch.setattr(causal, "BLOCK", 4)
    with torch.no_grad(), attention_calls(monkeypatch) as calls:
        ours(TOKENS)
        shapes = [tuple(options["attn_mask"].shape) for _, options in calls]
        assert len(shapes) == 4 * -(-T // 4) and all(b <= 4 and n <= WINDOW + 3 for b, n in shapes)
        calls.clear()
        ours(TOKENS[:, :WINDOW])
        assert [options["attn_mask"] for _, options in calls] == [None] * 4


def test_s_a_step_attends_to_what_was_seen_and_rows_differ_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = twins(shrink("pythia-14m"))
    theirs.set_kv_cache(2)
    with torch.no_grad(), attention_calls(monkeypatch) as calls:
        litgpt_generate.batched_next_token(theirs, torch.arange(5), TOKENS[:, :5], {"temperature": 0.0})
        assert {shape[2] for shape, _ in calls} == {48}, "all of the context, empty or not"
        cache = KVCache.build(ours, "dense", 2)
        ours(TOKENS[:, :5], cache, torch.tensor([5, 3]))
        calls.clear()
        ours(TOKENS[:, 5:6], cache)
        assert {shape[2] for shape, _ in calls} == {6}
    both = generate(ours, [TOKENS[0, :5], TOKENS[1, :3]], max_new_tokens=6, sampling=SamplingArgs(0))
    one = generate(ours, [TOKENS[1, :3]], max_new_tokens=6, sampling=SamplingArgs(0))
    assert both[1].tolist() == one[0].tolist()


def test_t_rows_are_sampled_together_and_copied_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = twins(shrink("pythia-14m"))
    prompts, copies = [TOKENS[0, :4], TOKENS[1, :4]], []
    with pytest.raises(AssertionError, match="same length"):  # and litgpt's `sample` takes one row
        litgpt_generate.batched_sample([torch.zeros(1, 1, 9)], [{}, {}])
    for name in ("item", "tolist"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, plain=plain: copies.append(self.shape) or plain(self))
    generate(ours, prompts, max_new_tokens=3, sampling=SamplingArgs(0))
    few = len(copies)
    generate(ours, prompts, max_new_tokens=13, sampling=SamplingArgs(0))
    assert len(copies) - few - few == 10, "ten steps more, ten copies more"


# -- others ------------------------------------------------------------------------------------------------------------


def test_a_system_prompt_without_a_place_is_refused() -> None:
    assert Gemma().apply("a", sys_prompt="b") == Gemma().apply("a")
    llm = LLM.load("demo", accelerator="cpu")
    llm.prompt_style = Gemma()
    with pytest.raises(ValueError, match="prompt style, Gemma, has no place for a system prompt"):
        llm.generate("a", sys_prompt="b")


def test_routers_of_a_random_model_are_initialised() -> None:
    """litgpt leaves the weights of its grouped router as the memory was."""
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        ours, theirs = (cls(SYNTHETIC["grouped-moe"]) for cls in (GPT, base.GPT))
    finally:
        torch.use_deterministic_algorithms(False)
    assert theirs.transformer.h[1].mlp.gate.weight.isnan().all()
    assert all(weight.isfinite().all() for weight in ours.parameters())
    assert float(ours.transformer.h[1].mlp.gate.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_angles_stay_exact_in_low_precision() -> None:
    """litgpt's `generate` casts its rope tables to bfloat16 with the weights; a checkpoint loaded here keeps them."""
    import lightning as L

    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    with fabric.init_module():
        theirs = base.GPT(shrink("pythia-14m"))
    assert fabric.setup_module(theirs).cos.dtype == torch.bfloat16
    assert LLM.load("demo", accelerator="cpu", precision="bf16-true").model.cos.dtype == torch.float32
