"""Packed weights: the same numbers as `nn.Linear` but for the order of sums, whatever is done with the layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_kv import GPT, LLM, KVCache
from litgpt_kv.attention import cpu as cpu_facts
from litgpt_kv.attention.cpu import prefers_onednn
from litgpt_kv.cache.constants import weight_of
from litgpt_kv.cache.serialize import fingerprint
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.llm import llm as loaded
from litgpt_kv.model import linear, packed
from litgpt_kv.model.linear import MOST_ROWS, Linear
from litgpt_kv.model.packed import PackedLinear, pack, packs
from tests.oracle.shrink import shrink

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}  # of outputs, relative
SIZES = dict(n_embd=64, intermediate_size=48)


@pytest.fixture(autouse=True)
def everything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack layers of any size, whatever this processor is best at."""
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", dict.fromkeys(DTYPES, 0))
    monkeypatch.setattr(packed, "packs", lambda dtype: dtype in DTYPES)


def layer(dtype: torch.dtype, n: int = 33, k: int = 80, bias: bool = True) -> tuple[PackedLinear, nn.Linear]:
    torch.manual_seed(n)
    plain = nn.Linear(k, n, bias).to(dtype)
    made = copy.deepcopy(plain)
    pack(nn.Sequential(made))
    assert type(made) is PackedLinear and made.weight.is_mkldnn
    return made, plain


def assert_is_linear(y: Tensor, x: Tensor, plain: nn.Linear) -> None:
    """Sums are exact to float32, and outputs are rounded once."""
    exact = F.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
    size = F.linear(x.double().abs(), plain.weight.double().abs()) + 1
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= ROUNDING[x.dtype] * exact.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_its_definition(dtype: torch.dtype, bias: bool) -> None:
    made, plain = layer(dtype, bias=bias)
    inputs = [torch.randn(*shape, 80) for shape in [(), (0,), (1,), (1, 1), (2, 3), (17,), (2, 0), (130,)]]
    inputs += [torch.randn(80, 5).mT, torch.randn(1, 80).expand(4, 80), torch.randn(3, 200)[:, 7:87]]
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            for x in inputs:
                assert_is_linear(made(x.to(dtype)), x.to(dtype), plain)
    x = torch.randn(3, 80, dtype=dtype, requires_grad=True)
    made(x).float().square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    plain(expected).float().square().sum().backward()
    assert torch.equal(x.grad, expected.grad) and not made(x.detach()).requires_grad
    with pytest.raises(RuntimeError, match="same dtype"):
        made(torch.randn(2, 80, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_can_be_read_saved_loaded_copied_and_moved(dtype: torch.dtype) -> None:
    made, plain = layer(dtype)
    state, x = made.state_dict(), torch.randn(2, 80, dtype=dtype)
    assert torch.equal(state["weight"], plain.weight) and torch.equal(state["bias"], plain.bias)
    assert torch.equal(weight_of(made), plain.weight)
    assert (made.weight.shape, made.weight.dtype, made.weight.nbytes) == ((33, 80), dtype, plain.weight.nbytes)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(copied) is PackedLinear and torch.equal(copied(x), made(x))
    other = layer(dtype)[0].requires_grad_(False)
    nn.init.zeros_(plain.weight)
    other.load_state_dict(plain.state_dict())
    assert type(other) is PackedLinear and torch.equal(other.dequantized(), plain.weight)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        other.load_state_dict({**state, "weight": state["weight"][:, :40]})
    assert type(other) is PackedLinear
    wide = made.double()
    assert type(wide) is Linear and torch.equal(wide.weight, state["weight"].double())
    assert type(made.to(dtype)) is Linear  # packing is for whom asks for it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "pythia-14m", "Mixtral-8x7B-v0.1", "Gemma-2-2b", "Qwen2.5-0.5B"])
def test_a_packed_model_is_the_model(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = GPT(shrink(name, **SIZES)).eval().to(dtype)
    plain = copy.deepcopy(model)
    pack(model)
    assert not any(type(layer) in (nn.Linear, Linear) for layer in model.modules())
    assert fingerprint(model) == fingerprint(plain)  # a cache of the one is a cache of the other
    idx, seen = torch.randint(90, (2, 26)), []
    exact = copy.deepcopy(plain).double()
    with torch.inference_mode():
        for one in (model, plain, exact):
            cache = KVCache.build(one, "dense", 2, 32)
            one(idx[:, :20], cache, torch.tensor([20, 7]))
            seen.append(torch.cat([one(idx[:, i : i + 1], cache) for i in range(20, 26)], dim=1).double())
    errors = [(logits - seen[2]).norm() / seen[2].norm() for logits in seen[:2]]
    assert errors[0] < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype] and errors[0] < 1.5 * errors[1] + 1e-6


def test_latent_attention_keeps_what_decoding_multiplies_with_queries() -> None:
    sizes = dict(latent_attention=dict(q_lora_rank=16, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16))
    sizes["latent_attention"]["v_head_dim"] = 16
    model = GPT(shrink("Llama-3.2-1B", **SIZES, n_query_groups=4, head_size=24, **sizes)).eval()
    pack(model)
    attn = model.transformer.h[0].attn
    assert type(attn.q_a_proj) is PackedLinear and type(attn.kv_b_proj) is nn.Linear


def test_a_decode_step_is_one_graph() -> None:
    made, x = layer(torch.bfloat16)[0], torch.randn(2, 80).bfloat16()
    with torch.inference_mode():  # inductor has its own idea of oneDNN's operators; here it has no code to make
        assert torch.equal(torch.compile(made, fullgraph=True)(x), made(x))
    torch.manual_seed(0)
    model = GPT(shrink("Llama-3.2-1B", n_embd=64, intermediate_size=48, n_layer=1)).eval()
    pack(model)
    idx, logits = torch.randint(90, (2, 8)), []
    with torch.inference_mode():
        for decoder in (model, torch.compile(model, dynamic=False, fullgraph=True, backend="eager")):
            cache = KVCache.build(model, "dense", 2, 16, static=True)
            model(idx[:, :6], cache, torch.tensor([6, 3]))
            logits.append(torch.cat([decoder(idx[:, i : i + 1], cache) for i in (6, 7)]))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_loaded_models_are_packed_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for able in (False, True):
        monkeypatch.setattr(packed, "packs", lambda dtype, able=able: able and dtype in DTYPES)
        llm = LLM.load("demo", accelerator="cpu", precision="bf16-true")
        assert (type(llm.model.lm_head) is PackedLinear) == able
        texts.append(llm.generate("import os\n", max_new_tokens=8, temperature=0.0))
        assert type(LLM.load("demo", accelerator="cpu", precision="64-true").model.lm_head) is not PackedLinear
    assert texts[0] == texts[1]
    mixed = LLM.load("demo", accelerator="cpu", precision="bf16-mixed").model
    assert not any(type(layer) is PackedLinear for layer in mixed.modules())
    part = LLM.load("demo", accelerator="cpu", distribute=None, precision="bf16-true")
    part.distribute(accelerator="cpu", devices=1, generate_strategy="sequential", precision="bf16-true")
    assert type(part.model.lm_head) is PackedLinear
    assert loaded.pack is pack


def test_what_this_processor_packs(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    cpu, text = torch.backends.cpu, tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu_facts, "CPUINFO", text)
    for vendor, capability, bf16, expected in [
        ("AuthenticAMD", "AVX512", True, (True, True)),
        ("AuthenticAMD", "AVX2", False, (False, False)),
        ("GenuineIntel", "AVX512", True, (False, True)),
        ("GenuineIntel", "AVX512", False, (False, False)),
    ]:
        text.write_text(f"vendor_id\t: {vendor}\n")
        monkeypatch.setattr(cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(packed, "has_bf16_products", lambda bf16=bf16: bf16)
        packs.cache_clear(), prefers_onednn.cache_clear()
        assert (packs(torch.float32), packs(torch.bfloat16)) == expected
        assert not packs(torch.float64) and not packs(torch.float16)
    packs.cache_clear(), prefers_onednn.cache_clear()


def test_many_rows_of_float32_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    true = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(1) or true(*a))
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)
    plain = nn.Linear(80, 33)
    made = Linear(80, 33)
    made.load_state_dict(plain.state_dict())
    x = torch.randn(3, MOST_ROWS, 80)
    with torch.no_grad():
        assert torch.equal(made(x), plain(x)) and not calls  # litgpt's to the bit
    with torch.inference_mode():
        assert_is_linear(made(x), x, plain)
        assert_is_linear(made(x[:, :1]), x[:, :1], plain)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("dtype", "rows", "threads", "kept"),
    [
        (torch.float32, 1, 2, False),
        (torch.float32, 2, 2, True),
        (torch.float32, 1, 1, True),
        (torch.bfloat16, 1, 2, True),
    ],
)
@torch.inference_mode()
def test_one_row_on_several_threads_is_compiled_from_weights_in_the_usual_order(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, threads: int, kept: bool
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.inference_mode(False):
        model = GPT(shrink("Llama-3-8B", **SIZES)).eval().to(dtype)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        pack(model)
    decoder, cache = CompiledDecoder(model, backend="eager"), KVCache.build(model, "dense", rows, 16, static=True)
    token = torch.zeros(rows, 1, dtype=torch.int64)
    model(token, cache, torch.ones(rows, dtype=torch.int64))
    expected = model(token, cache)
    cache.reset()
    model(token, cache, torch.ones(rows, dtype=torch.int64))
    torch.testing.assert_close(
        decoder(token, cache), expected, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5
    )
    assert isinstance(model.lm_head, PackedLinear) == kept and not model.lm_head.weight.is_inference()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
