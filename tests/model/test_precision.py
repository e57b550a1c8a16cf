"""Every precision and quantization that litgpt's `generate` takes, on the shipped model."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from litgpt_kv import GPT, LLM
from litgpt_kv.__main__ import main
from litgpt_kv.llm import quantize
from litgpt_kv.llm.quantize import QUANTIZERS, quantizer
from litgpt_kv.model.linear import Linear
from tests.oracle.shrink import shrink

PROMPTS = ["def fib(", "import os\nimport sys\n\n\nclass Parser:\n    def __init__(self"]
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
DTYPES |= {"bf16-mixed": torch.bfloat16, "64-true": torch.float64}
HAS_GPU = torch.cuda.is_available() and find_spec("bitsandbytes") is not None


@pytest.mark.parametrize("precision", DTYPES)
def test_the_command_takes_every_precision(capsys: pytest.CaptureFixture, precision: str) -> None:
    flags = [part for p in PROMPTS for part in ("--prompt", p)]
    common = ["generate", "demo", "--accelerator", "cpu", *flags, "--max-new-tokens", "12", "--temperature", "0"]
    common += ["--ignore-eos", "--precision", precision]
    texts = []
    for cache in ("dense", "none"):
        main([*common, "--kv-cache", cache])
        texts.append(capsys.readouterr().out)
        assert all(p in texts[-1] for p in PROMPTS)
    main([*common, "--kv-cache", "h2o", "--kv-cache.budget", "8"])
    assert capsys.readouterr().out.count("def fib(") >= 1
    if DTYPES[precision].itemsize > 2:  # in two bytes a rounding may decide between two tokens
        assert texts[0] == texts[1]


@pytest.mark.parametrize("precision", DTYPES)
@torch.no_grad()
def test_weights_and_cache_have_the_precisions_type(precision: str) -> None:
    llm, dtype = LLM.load("demo", accelerator="cpu", precision=precision), DTYPES[precision]
    llm.generate(PROMPTS, max_new_tokens=4, temperature=0.0)
    weight = llm.model.transformer.h[0].attn.qkv.weight
    assert weight.dtype == (torch.float32 if "mixed" in precision else dtype)
    assert {layer.keys.data.dtype for layer in llm.cache.layers} == {dtype}
    assert llm.model.cos.dtype == torch.float32  # angles are never rounded to two bytes
    exact = LLM.load("demo", accelerator="cpu", precision="64-true")
    ids = llm.encode(PROMPTS[1]).unsqueeze(0)
    error = (llm.model(ids).double() - exact.model(ids)).abs().max()
    assert error < {2: 0.5, 4: 1e-4, 8: 1e-12}[dtype.itemsize]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_without_a_gpu_one_line_says_what_is_missing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(["generate", "demo", "--prompt", "x", "--quantize", name])
    out = capsys.readouterr()
    assert end.value.code == 2 and out.out == ""
    assert out.err == f"litgpt_kv: error: quantize {name!r} needs an NVIDIA GPU; this machine has none.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4", None, "auto"), "quantize must be one of int8, bnb.nf4, .*, got 'int4'"),
        (("bnb.nf4", "bf16-mixed", "auto"), "precisions 16-true, bf16-true, 32-true, got 'bf16-mixed'"),
        (("bnb.int8", "bf16-true", "auto"), "needs precision 16-true, got 'bf16-true'"),
        (("bnb.nf4", None, "cpu"), "needs an NVIDIA GPU; accelerator is 'cpu'"),
    ],
)
def test_what_cannot_be_quantized(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantizer(*arguments)


def test_without_the_package_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'litgpt-kv\[quantize\]'"):
        quantizer("bnb.nf4", None, "auto")


def test_layers_of_a_quantizing_plugin_keep_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin puts its own class in the place of nn.Linear while a model is made; ours must not replace it."""
    config = shrink("Llama-3.2-1B", n_embd=512, intermediate_size=512)
    large = GPT(config).transformer.h[0].mlp.proj
    assert type(large) is Linear

    class Quantized(nn.Linear):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(nn, "Linear", Quantized)
        model = GPT(config)
    assert {type(m) for m in model.modules() if hasattr(m, "in_features")} == {Quantized}


@pytest.mark.skipif(not HAS_GPU, reason="bitsandbytes quantizes on an NVIDIA GPU only")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantized_models_generate(name: str) -> None:
    llm = LLM.load("demo", quantize=name)
    assert type(llm.model.transformer.h[0].attn.qkv).__name__ != "Linear"
    texts = llm.generate(PROMPTS, max_new_tokens=16, temperature=0.0)
    assert all(texts) and texts == llm.generate(PROMPTS, max_new_tokens=16, temperature=0.0)
