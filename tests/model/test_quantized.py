"""int8 weights: the layer against its definition, and models against the same models with the dequantized weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from litgpt_kv import GPT, LLM, KVCache, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.cli import loading
from litgpt_kv.llm.check_weights import read_weights
from litgpt_kv.llm.checkpoint import DEMO, WEIGHTS
from litgpt_kv.model import quantized
from litgpt_kv.model.quantized import MOST_ROWS, Int8Linear, head_inputs, quantize_channels, to_int8
from tests.oracle.quantise import int8_linear
from tests.oracle.shrink import shrink

ROUNDING = 2.0**-8  # of bfloat16, relative
PROMPTS = ["def fib(", "import os\nimport sys\n\n\nclass Parser:\n    def __init__(self"]
SHAPES = dict(n_embd=64, intermediate_size=48)


def layer(n: int = 33, k: int = 80, bias: bool = True, typical: Tensor | None = None) -> tuple[Int8Linear, nn.Linear]:
    torch.manual_seed(n)
    plain = nn.Linear(k, n, bias)
    plain.weight.data[3] = 0.0
    made = Int8Linear(k, n, plain.bias, plain.weight.device, typical)
    made.set_weight(plain.weight)
    return made, plain


def dequantize(model: GPT) -> GPT:
    """The same model with float layers whose weights are those that the int8 layers multiply with."""
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Int8Linear):
                linear = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                linear.weight.data = child.dequantized()
                linear.bias = child.bias
                setattr(parent, name, linear)
    return plain


@pytest.mark.parametrize("typical", [None, torch.linspace(0.1, 3.0, 80)], ids=["", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_layer_is_its_definition(dtype: torch.dtype, typical: Tensor | None) -> None:
    """Inputs are rounded, sums are float32's, outputs are rounded; few rows and many take different operators."""
    made, _ = layer(typical=typical)
    roundings = 1  # of outputs
    if dtype == torch.bfloat16:  # and of the products with scales, and of the sums with the bias
        made, roundings = made.to(dtype), 3
    for rows in (0, 1, 2, 7, MOST_ROWS, MOST_ROWS + 1, 40):
        x = torch.randn(rows, 80).to(dtype)
        column = None if made.column is None else made.column
        exact, size = int8_linear(x, made.weight, made.scale, made.bias, column)
        y = made(x)
        assert y.dtype == dtype and y.shape == (rows, 33)
        before = exact.abs() + made.bias.abs()
        assert ((y.double() - exact).abs() <= 1.01 * roundings * ROUNDING * before + 1e-6 * size).all()
    assert made(torch.randn(2, 3, 80).to(dtype)).shape == (2, 3, 33)


@torch.inference_mode()
def test_without_bfloat16_instructions_the_result_is_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = layer()
    x = torch.randn(40, 80)
    exact, size = int8_linear(x, made.weight, made.scale, made.bias)
    monkeypatch.setattr(quantized, "_product_dtype", lambda device: torch.float32)
    assert ((made(x).double() - exact).abs() <= 1e-6 * size).all()  # no output is rounded to bfloat16


@torch.inference_mode()
def test_a_row_equals_itself_alone_to_the_bit() -> None:
    made, _ = layer(n=50, k=576)
    x = torch.randn(MOST_ROWS, 576)
    together = made(x)
    for rows in (1, 2, 3, 4, 5, 9):
        for first in range(0, MOST_ROWS - rows, 3):
            assert torch.equal(made(x[first : first + rows]), together[first : first + rows])
    shifted = torch.randn(1, 577).bfloat16()[:, 1:]  # at an address that the operator could not read
    assert torch.equal(made(shifted), made(shifted.clone()))


def test_weights_are_within_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 32) * torch.logspace(-6, 3, 40).unsqueeze(1)
    weight[5] = 0
    q, scale = quantize_channels(weight)
    step = scale.float().unsqueeze(1)
    largest = weight.abs().amax(dim=1)
    # a scale that was rounded down clips the largest weight by the rounding, 2**-9 of it at most
    assert ((q * step - weight).abs() <= 0.5 * step + largest.unsqueeze(1) * 2.0**-9).all()
    assert (q[5] == 0).all() and int(q.abs().max()) == 127
    monkeypatch.setattr(quantized, "PART", 100)  # three rows at a time
    assert all(torch.equal(a, b) for a, b in zip((q, scale), quantize_channels(weight)))
    weight[7, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantize_channels(weight)


def test_column_factors_make_typical_outputs_more_exact() -> None:
    torch.manual_seed(0)
    typical = torch.rand(80) * 4
    weight, x = torch.randn(64, 80) * torch.linspace(0.2, 2, 80), torch.randn(256, 80) * typical
    errors = []
    for known in (None, typical):
        made = Int8Linear(80, 64, None, weight.device, known)
        made.set_weight(weight)
        errors.append(float((x @ (made.dequantized() - weight).mT).square().mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "pythia-14m", "Mixtral-8x7B-v0.1", "Gemma-2-2b", "Qwen2.5-0.5B"])
@torch.inference_mode()
def test_a_model_is_the_model_with_the_dequantized_weights(name: str) -> None:
    """Prompts of different lengths, then steps: the difference is bfloat16's rounding of inputs and outputs."""
    torch.manual_seed(1)
    model = GPT(shrink(name, **SHAPES)).eval()
    refused = to_int8(model, head_inputs(model.config, model.state_dict()))
    assert not refused and type(model.lm_head) is Int8Linear and model.lm_head.column is not None
    if "Mixtral" in name:
        moe = model.transformer.h[0].mlp
        assert type(moe.gate) is not Int8Linear and type(moe.experts[1].fc_1) is Int8Linear
    plain = dequantize(model)
    length, idx = torch.tensor([20, 3, 11]), torch.randint(90, (3, 26))
    logits = []
    for each in (model, plain):
        cache = KVCache.build(each, "dense", 3, 32)
        seen = [each(idx[:, :20], cache, length)]
        seen += [each(idx[:, i : i + 1], cache)[:, 0] for i in range(20, 26)]
        logits.append(torch.stack(seen))
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert 1e-5 < error < 3 * ROUNDING  # rounding adds up over two layers and the head
    for row, tokens in enumerate(length.tolist()):
        cache = KVCache.build(model, "dense", 1, 32)
        seen = [model(idx[row : row + 1, :tokens], cache, length[row : row + 1])]
        seen += [model(idx[row : row + 1, i : i + 1], cache)[:, 0] for i in range(20, 26)]
        alone = torch.stack(seen)[:, 0]
        assert (alone - logits[0][:, row]).norm() / alone.norm() < 3 * ROUNDING


@torch.inference_mode()
def test_latent_attention_keeps_what_decoding_multiplies_with_queries() -> None:
    sizes = dict(latent_attention=dict(q_lora_rank=16, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16))
    sizes["latent_attention"]["v_head_dim"] = 16
    model = GPT(shrink("Llama-3.2-1B", **SHAPES, n_query_groups=4, head_size=24, **sizes)).eval()
    to_int8(model)
    attn = model.transformer.h[0].attn
    assert type(attn.q_a_proj) is Int8Linear and type(attn.kv_b_proj) is not Int8Linear
    idx = torch.randint(90, (1, 12))
    cache = KVCache.build(model, "dense", 1, 16)
    model(idx[:, :6], cache, torch.tensor([6]))
    steps = torch.cat([model(idx[:, i : i + 1], cache) for i in range(6, 12)], dim=1)
    exact = dequantize(model)(idx)[:, 6:]
    assert (steps - exact).norm() / exact.norm() < 3 * ROUNDING


def test_the_float_weights_are_gone_and_loading_is_converting() -> None:
    torch.manual_seed(0)
    config = shrink("Llama-3.2-1B", **SHAPES)
    plain, loaded = GPT(config).eval(), GPT(config).eval()
    state = {name: weight.clone() for name, weight in plain.state_dict().items()}
    inputs = head_inputs(config, state)
    assert to_int8(loaded, inputs, empty=True) == to_int8(plain, inputs) == []
    loaded.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), loaded.state_dict().values()))
    again = GPT(config)
    to_int8(again, inputs, empty=True)
    again.load_state_dict(loaded.state_dict())  # int8 weights load as they are
    assert torch.equal(again.lm_head.weight, plain.lm_head.weight)
    linear = sum(w.numel() for n, w in state.items() if w.dim() == 2 and "wte" not in n)
    held = sum(p.nbytes for n, p in plain.named_parameters() if "wte" not in n and "norm" not in n and "ln_f" not in n)
    assert linear <= held < 1.2 * linear
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded.load_state_dict({**state, "lm_head.weight": state["lm_head.weight"][:, :32]})
    with pytest.raises(ValueError, match=r"lm_head\.weight cannot be quantized: it has values that are not finite"):
        loaded.load_state_dict({**state, "lm_head.weight": state["lm_head.weight"] * float("inf")})


def test_layers_of_other_sizes_stay_and_are_named_once() -> None:
    model = GPT(shrink("Llama-3.2-1B", n_embd=64, intermediate_size=56)).eval()
    refused = to_int8(model)
    assert refused == ["transformer.h.0.mlp.proj", "transformer.h.1.mlp.proj"]
    assert quantized.describe_refused(refused) == "Not quantized, since their inputs are no multiple of 16: proj."
    assert quantized.describe_refused([]) == ""
    assert model(torch.randint(90, (1, 5))).isfinite().all()


@pytest.mark.parametrize(("rows", "select"), [(2, "head"), (MOST_ROWS + 4, "pool")])
def test_a_decode_step_is_one_graph(rows: int, select: str) -> None:
    """Compiled steps of few rows and of many, in caches that evict, give the logits of eager ones."""
    made, x = layer()[0], torch.randn(MOST_ROWS + 1, 80)
    with torch.inference_mode():
        assert torch.equal(torch.compile(made, fullgraph=True, backend="eager")(x), made(x))
    torch.manual_seed(0)
    model = GPT(shrink("Llama-3.2-1B", **SHAPES, n_layer=1)).eval()
    to_int8(model, head_inputs(model.config, model.state_dict()))
    idx, lengths, logits = torch.randint(90, (rows, 12)), torch.arange(rows) % 4 + 3, []
    with torch.inference_mode():
        for decoder in (model, torch.compile(model, dynamic=False, fullgraph=True, backend="eager")):
            cache = KVCache.build(model, KVCacheArgs("h2o", budget=8, select=select), rows, 16, static=True)
            model(idx[:, :6], cache, lengths)
            logits.append(torch.cat([decoder(idx[:, i : i + 1], cache) for i in range(6, 12)]))
    assert min(cache.tokens()["seen"]) > 8  # every row has evicted
    assert torch.equal(*logits)


def test_programs_and_python(capsys: pytest.CaptureFixture) -> None:
    llm = LLM.load("demo", accelerator="cpu", quantize="int8")
    assert type(llm.model.transformer.h[0].attn.qkv) is Int8Linear and type(llm.model.lm_head) is Int8Linear
    assert llm.model.transformer.wte.weight.dtype == torch.float32 and llm.model.unquantized == []
    texts = llm.generate(PROMPTS, max_new_tokens=8, temperature=0.0)
    assert llm.cache.layers[0].keys.data.dtype == torch.float32
    assert llm.generate(PROMPTS[0], max_new_tokens=8, temperature=0.0) == texts[0]
    weights = read_weights(DEMO / WEIGHTS)
    made, kept = llm.model.transformer.h[2].mlp.fc_1, weights["transformer.h.2.mlp.fc_1.weight"]
    assert (made.dequantized() - kept).abs().max() <= 0.6 * made.scale.max()
    flags = [part for p in PROMPTS for part in ("--prompt", p)]
    common = ["--accelerator", "cpu", "--quantize", "int8"]
    main(["generate", "demo", *flags, *common, "--max-new-tokens", "8", "--temperature", "0"])
    assert all(text in capsys.readouterr().out for text in texts[:1])
    half = LLM.load("demo", accelerator="cpu", quantize="int8", precision="bf16-true")
    assert half.generate(PROMPTS, max_new_tokens=4, temperature=0.0, kv_cache="criticalkv", budget=16)
    random = LLM.load("pythia-14m", init="random", tokenizer_dir=DEMO, accelerator="cpu", quantize="int8")
    assert type(random.model.lm_head) is Int8Linear
    main(["evaluate", "demo", *common, "--strategies", "[sink]", "--budgets", "[50%]", "--tasks", "[]",
          "--text", "prose", "--text-tokens", "60", "--text-prompt", "40"])  # fmt: skip
    assert "sink" in capsys.readouterr().out


def test_a_large_model_in_float32_gets_a_hint(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "has_bf16_products", lambda: True)
    for size, flags, said in ((10**6, [], 1), (10**9, [], 0), (10**6, ["--quantize", "int8"], 0)):
        monkeypatch.setattr(loading, "SMALL_MODEL", size)
        main(["generate", "demo", "--prompt", "x", "--max-new-tokens", "1", "--accelerator", "cpu", *flags])
        assert capsys.readouterr().err.count(loading.BF16_HINT) == said


def test_layers_that_stay_are_noted(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "ALIGNED", 512)  # of the shipped model, only the MLPs' outputs have such inputs
    main(["generate", "demo", "--prompt", "x", "--max-new-tokens", "1", "--accelerator", "cpu", "--quantize", "int8"])
    note = "Not quantized, since their inputs are no multiple of 512: lm_head, qkv, proj, fc_1, fc_2.\n"
    assert capsys.readouterr().err.count(note) == 1


def test_the_benchmark_of_weights(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    flags = ["--accelerator", "cpu", "--steps", "2", "--repeats", "2", "--contexts", "[24]"]
    main(["benchmark_weights", "--checkpoint-dir", "demo", *flags, "--text-tokens", "40", "--out", str(tmp_path / "o")])
    out, report = capsys.readouterr().out, json.loads((tmp_path / "o").read_text())
    assert report["processor"].split(",")[0] in out and f"torch {torch.__version__}" in out
    rows = {row["weights"]: row for row in report["rows"]}
    assert (
        list(rows) == ["float32", "bfloat16", "int8", "int8+bfloat16"] == [r["weights"] for r in report["divergence"]]
    )
    bytes_of = {name: row["weight_bytes"] for name, row in rows.items()}
    assert bytes_of["float32"] == 2 * bytes_of["bfloat16"]
    assert 0.25 * bytes_of["float32"] < bytes_of["int8"] < 0.26 * bytes_of["float32"]
    for row in rows.values():
        assert row["decode_ms"][0] <= row["decode_ms"][1] and f"{row['decode_ms'][0]:.2f}" in out
        gain = rows["float32"]["decode_ms"][0] / row["decode_ms"][0]
        assert row["decode_gain"][0] == pytest.approx(gain)
    kl = [row["kl"] for row in report["divergence"]]
    assert kl[0] == 0 and 0 < kl[1] < 0.01 and 0 < kl[2] < 0.01
    main(["benchmark_weights", *flags, "--shape.n_layer", "1", "--shape.n_embd", "96", "--weights", "[int8]"])
    assert "mean KL" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["benchmark_weights", *flags, "--weights", "[int3]"])
    assert (
        "weights must be some of float32, bfloat16, int8, int8+bfloat16, float32 unpacked, " in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["benchmark_weights", *flags[:-1], "[1023]", "--checkpoint-dir", "demo"])
    assert "do not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "64-true"], "quantize 'int8' needs one of the precisions 16-true, bf16-true, 32-true"),
        (["--precision", "bf16-mixed"], "quantize 'int8' needs one of the precisions"),
        (["--devices", "2", "--generate-strategy", "tensor_parallel"], "Quantized weights are for one device"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", "demo", "--prompt", "x", "--accelerator", "cpu", "--quantize", "int8", *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err
