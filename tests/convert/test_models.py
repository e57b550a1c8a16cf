"""Converted models give transformers' logits, for every architecture; a model that litgpt knows has its config."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader

import litgpt.model
from litgpt.config import Config
from litgpt_kv import LLM
from litgpt_kv.convert.checkpoint import convert
from litgpt_kv.convert.configs import SAME, config_of
from litgpt_kv.convert.gguf_file import GGUFFile
from tests.convert.tiny import MODELS, make_model, write_gguf


@torch.no_grad()
def check_logits(folder: Path, model: torch.nn.Module) -> LLM:
    """Compare logits, over more tokens than a sliding window has; return the converted model."""
    llm = LLM.load(folder, accelerator="cpu", check_weights=True)
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(7))
    expected = model(ids).logits
    assert expected.std() > 0.1, "logits that are all alike would agree with anything"
    torch.testing.assert_close(llm.model(ids), expected, rtol=0, atol=1e-4)  # float32
    return llm


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    write_gguf(tmp_path / "m.gguf", kind, model)
    made = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert made.dtype == torch.float32 and made.style == "Default" and "no chat template" in made.note
    llm = check_logits(tmp_path / "out", model)
    tied = llm.model.transformer.wte.weight, llm.model.lm_head.weight
    assert torch.equal(*tied) == model.config.tie_word_embeddings
    assert ("Gemma" in llm.config.name) == kind.startswith("gemma")


@pytest.mark.parametrize("quant", [Kind.Q4_1, Kind.Q8_0, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_quantised_weights_are_what_they_stand_for(quant: Kind, tmp_path: Path) -> None:
    model = make_model("smollm")
    before = model.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    write_gguf(tmp_path / "m.gguf", "smollm", model, quant=quant)
    assert not torch.equal(before, model.state_dict()["model.layers.0.self_attn.q_proj.weight"])
    made = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert made.dtype == {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(quant, torch.float32)
    if made.dtype == torch.float32:
        check_logits(tmp_path / "out", model)
    weights = torch.load(tmp_path / "out" / "lit_model.pth", mmap=True)
    assert {weight.dtype for weight in weights.values()} == {made.dtype}
    proj = model.state_dict()["model.layers.1.self_attn.o_proj.weight"]
    assert torch.equal(weights["transformer.h.1.attn.proj.weight"].float(), proj)
    small = convert(tmp_path / "m.gguf", tmp_path / "small", dtype="bfloat16")
    assert small.dtype == torch.bfloat16
    assert small.weight_bytes < made.weight_bytes * (1.01 if made.dtype.itemsize == 2 else 0.75)


def test_the_file_is_read_as_gguf_reads_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "gemma2", make_model("gemma2"), quant=Kind.Q8_0, template="{{ 'é' }}")
    ours, theirs = GGUFFile(tmp_path / "m.gguf"), GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    for tensor in theirs.tensors:
        own = ours.tensors[tensor.name]
        assert (own.start, own.nbytes, own.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert own.shape == tuple(tensor.shape.tolist()[::-1])
    assert len(ours.tensors) == len(theirs.tensors) == 2 + 2 * 11


# -- named configs -----------------------------------------------------------------------------------------------------

NAMED = {
    "SmolLM2-135M-Instruct": "llama",
    "SmolLM2-1.7B": "llama",
    "Llama-2-7b-chat-hf": "llama",
    "Llama-3.2-1B-Instruct": "llama",
    "Llama-3.1-8B": "llama",
    "tiny-llama-1.1b-chat": "llama",
    "Qwen2.5-0.5B-Instruct": "qwen2",
    "Qwen2.5-7B": "qwen2",
    "Qwen3-0.6B": "qwen3",
    "Qwen3-8B": "qwen3",
    "Gemma-2b-it": "gemma",
    "Gemma-2-2b": "gemma2",
    "Gemma-2-27b-it": "gemma2",
    "Gemma-3-1b-it": "gemma3",
    "Gemma-3-27b-it": "gemma3",
    "phi-1_5": "phi2",
    "phi-2": "phi2",
    "Phi-3-mini-4k-instruct": "phi3",
    "phi-4": "phi3",
}


def described(config: Config, arch: str, name: str) -> SimpleNamespace:
    """A file's metadata for a config, as llama.cpp's converter would write them, without the tensors but one."""
    file = GGUFFile.__new__(GGUFFile)
    file.path = Path("described.gguf")
    sizes = {
        "block_count": config.n_layer,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.intermediate_size,
        "context_length": config.block_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_query_groups,
        "attention.key_length": config.head_size,
        "rope.dimension_count": config.rope_n_elem,
        "rope.freq_base": float(config.rope_base),
        f"attention.layer_norm_{'' if arch == 'phi2' else 'rms_'}epsilon": config.norm_eps,
    }
    if config.sliding_window_size:
        sizes["attention.sliding_window"] = config.sliding_window_size
    if config.rope_adjustments and len(config.rope_adjustments) == 1:
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_adjustments["factor"]}
    file.metadata = {f"{arch}.{key}": value for key, value in sizes.items()}
    file.metadata |= {"general.architecture": arch, "general.name": name.replace("-", " ")}
    file.metadata["tokenizer.ggml.tokens"] = ["x"] * config.vocab_size
    if any(part in name.lower() for part in ("instruct", "chat", "-it")):
        file.metadata["tokenizer.chat_template"] = "x"
    file.tensors = {"token_embd.weight": SimpleNamespace(shape=(config.padded_vocab_size, config.n_embd))}
    if config.rope_adjustments and len(config.rope_adjustments) > 1:
        own = dict(seq_len=2, n_elem=config.rope_n_elem, base=config.rope_base)
        plain, scaled = (
            torch.atan2(sin[1], cos[1])[: config.rope_n_elem // 2]  # the angle of one step, in (0, 1]
            for cos, sin in (
                litgpt.model.build_rope_cache(**own),
                litgpt.model.build_rope_cache(**own, extra_config=config.rope_adjustments),
            )
        )
        file.tensors["rope_freqs.weight"] = SimpleNamespace(shape=(config.rope_n_elem // 2,))
        file.blocks = lambda tensor: iter([(0, (plain / scaled)[None].numpy())])
    return file


@pytest.mark.parametrize("name", NAMED)
def test_a_model_that_litgpt_knows_has_its_config(name: str) -> None:
    known = Config.from_name(name)
    found = config_of(described(known, NAMED[name], name))
    assert found.name == name and found.hf_config == known.hf_config
    for field in [*SAME, "block_size", "norm_eps", "sliding_window_size", "sliding_window_indices", "rope_indices"]:
        assert getattr(found, field) == getattr(known, field), field
    scale = known.attention_scores_scalar or known.head_size
    assert (found.attention_scores_scalar or found.head_size) == scale
    assert found.mlp_class is known.mlp_class and found.gelu_approximate == known.gelu_approximate
    other = described(known, NAMED[name], name)
    other.metadata[f"{NAMED[name]}.feed_forward_length"] += 32
    assert config_of(other).name not in NAMED, "other sizes are another model"
