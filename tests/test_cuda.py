"""What only an NVIDIA GPU can show: the same numbers as on a CPU, steps that wait for nothing, and CUDA graphs.

Run them there with `python -m pytest tests/test_cuda.py tests/test_triton.py`; without a GPU they are skipped.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs, registry
from litgpt_kv.generate import compiled, generate
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.generate.cuda_graph import CudaGraph
from litgpt_kv.model.packed import pack
from litgpt_kv.model.quantized import Int8Linear, to_int8
from tests.cache.test_pairs import args_of
from tests.oracle.reference import kept_of, logits_of, tiny, tokens_of
from tests.oracle.strategies import NAMES, plain
from tests.oracle.walks import steps_agree

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GPU = torch.device("cuda")
ROWS, PROMPTS = [tokens_of(1, 26), tokens_of(2, 19)], [13, 6]
STORAGES = [name for name in registry.names("storage") if name not in ("offload", "kivi")]
CACHES = {name: (name, "plain", {}) for name in NAMES}
CACHES |= {f"dense-{storage}": ("dense", storage, {}) for storage in STORAGES}
CACHES |= {"kivi": ("window", "kivi", {"group": 4}), "offload": ("h2o", "offload", {})}


@pytest.fixture(params=CACHES)
def args(request: pytest.FixtureRequest) -> KVCacheArgs:
    name, storage, options = CACHES[request.param]
    return args_of(name, tiny(), storage, options)


def on_gpu(model: GPT, args: KVCacheArgs, **others: object) -> tuple[GPT, KVCache]:
    model = model.to(GPU)
    return model, KVCache.build(model, args, len(ROWS), 40, **others)


def compare(found: list[dict[int, Tensor]], expected: list[dict[int, Tensor]], tol: float) -> None:
    for b in range(len(expected)):
        assert found[b].keys() == expected[b].keys()
        for i, logits in expected[b].items():
            torch.testing.assert_close(found[b][i].cpu(), logits.cpu(), rtol=0, atol=tol)


@pytest.mark.parametrize("prefill", ["full", "streamed"])
def test_ragged_rows_give_what_a_cpu_gives_in_float64(args: KVCacheArgs, prefill: str) -> None:
    if prefill == "streamed" and plain(str(args.strategy)).rereads:
        pytest.skip("reads prompts in one pass")
    own = KVCacheArgs(**{**vars(args), "storage": "plain"}) if args.storage == "offload" else args
    model = tiny()
    cache = KVCache.build(model, own, len(ROWS), 40)
    expected = logits_of(model, cache, ROWS, PROMPTS, prefill)
    kept = [kept_of(cache, b) for b in range(2)]
    gpu, theirs = on_gpu(tiny(), args)
    compare(logits_of(gpu, theirs, ROWS, PROMPTS, prefill), expected, 1e-8)
    assert [kept_of(theirs, b) for b in range(2)] == kept


def test_decode_steps_wait_for_nothing(args: KVCacheArgs) -> None:
    if args.storage == "offload":
        pytest.skip("copies new tokens to the host, step by step")
    model, cache = on_gpu(tiny(exact=False), args)
    tokens = torch.tensor([row[:6] for row in ROWS], device=GPU)
    length = torch.tensor([6, 4], device=GPU)
    with torch.no_grad():
        model(tokens, cache, length)
        model(tokens[:, :1], cache)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(12):  # from empty slots to full ones
                model(tokens[:, :1], cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded when they come for the second time."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "RECORD_AFTER", 2)


def recorded(decoder: CompiledDecoder, cache: KVCache) -> list[CudaGraph | None]:
    return list(decoder._known[cache].graphs.values())


@torch.inference_mode()
def test_a_recorded_step_equals_an_eager_one(at_once: None, args: KVCacheArgs) -> None:
    """The steps of a static cache as CUDA graphs, of the model as it is; the same graph after a reset."""
    if args.storage == "offload":
        pytest.skip("is refused")
    model, eager = on_gpu(tiny(), args)
    expected = logits_of(model, eager, ROWS, PROMPTS, "full")
    decoder = CompiledDecoder(model, backend="eager")
    for _ in range(2):  # a second cache, too
        cache = KVCache.build(model, args, len(ROWS), 40, static=True)
        for _ in range(2):
            compare(logits_of(model, cache, ROWS, PROMPTS, "full", step=decoder), expected, 1e-8)
            assert [kept_of(cache, b) for b in range(2)] == [kept_of(eager, b) for b in range(2)]
            cache.reset()
        assert len(recorded(decoder, cache)) == 1 and None not in recorded(decoder, cache)


@torch.inference_mode()
def test_generating_with_cuda_graphs(at_once: None, args: KVCacheArgs) -> None:
    """Compiled by inductor, through the engine, with read lengths."""
    if args.strategy not in ("dense", "h2o", "sink", "window") or args.storage in ("int4-hadamard", "offload"):
        pytest.skip("these are enough: compiling takes a while")
    model, cache = on_gpu(tiny(exact=False), args)
    facts = dict(max_new_tokens=12, sampling=SamplingArgs(temperature=0.0), prefill="full")
    prompts = [row[:n] for row, n in zip(ROWS, PROMPTS)]
    expected = generate(model, prompts, cache, **facts)
    cache.reset()
    decoder = CompiledDecoder(model)
    assert decoder.warm_up(cache, max(PROMPTS)) > 0
    found = generate(model, prompts, cache, decoder=decoder, **facts)
    assert [x.tolist() for x in found] == [x.tolist() for x in expected]
    assert recorded(decoder, cache) and None not in recorded(decoder, cache)


def test_graphs_follow_the_mode_the_weights_and_slices_of_tokens(at_once: None) -> None:
    model = tiny().to(GPU)
    plain, cache = (KVCache.build(model, "dense", 2, 60, static=flag) for flag in (False, True))
    text, decoder = torch.tensor([tokens_of(1, 40), tokens_of(2, 40)], device=GPU), CompiledDecoder(model)

    steps = functools.partial(steps_agree, decoder, model, [cache, plain], text)
    with torch.no_grad():
        for c in (plain, cache):
            model(text[:, :4], c, torch.tensor([4, 4], device=GPU))
        steps(4, 8)
    with torch.inference_mode():
        steps(8, 12)
    with torch.no_grad():
        steps(12, 14)
        model.load_state_dict({name: 1.1 * weight for name, weight in model.state_dict().items()}, assign=True)
        steps(14, 18)
    assert len(recorded(decoder, cache)) == 1 and None not in recorded(decoder, cache)


@torch.no_grad()
def test_int8_weights_give_the_products_of_what_they_stand_for() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 320, bias=False, device=GPU)
    model = torch.nn.Sequential(layer)
    reference = torch.nn.Linear(256, 320, bias=False, device=GPU)
    to_int8(model)
    assert isinstance(model[0], Int8Linear)
    reference.weight.copy_(model[0].dequantized())
    for rows in (1, 3, 16, 17, 200):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 256, device=GPU).to(torch.bfloat16)
            y = model[0](x.to(dtype))
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), reference(x.float()), rtol=2e-2, atol=2e-2)


def test_packing_for_a_processor_leaves_a_model_on_a_gpu_as_it_is() -> None:
    model = tiny(exact=False).to(GPU)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pack(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_cache_moves_to_the_gpu_and_back_in_the_middle_of_a_text() -> None:
    model, args, row = tiny(), KVCacheArgs("h2o", 8, recent=2), tokens_of(3, 20)
    with torch.no_grad():
        found = []
        for moves in (False, True):
            cache = KVCache.build(model, args, 1, 40)
            model(torch.tensor([row[:10]]), cache, torch.tensor([10]))
            for i in range(10, 20):
                device = GPU if moves and i % 4 > 1 else torch.device("cpu")
                model.to(device), cache.to(device)
                found.append(model(torch.tensor([row[i : i + 1]], device=device), cache).cpu())
    for a, b in zip(found[:10], found[10:]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)
