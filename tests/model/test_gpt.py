"""The model is litgpt's: its state-dict keys, and training to the bit, for every named config and every feature."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import litgpt.model as base
from litgpt.config import Config, name_to_config
from litgpt_kv import GPT, KVCache
from tests.oracle.shrink import SYNTHETIC, WINDOW, shrink, twins

NAMES = sorted(name_to_config)
# one name for each combination of features that a name has (LITGPT's table of features)
FAMILIES = ["pythia-14m", "falcon-7b", "phi-2", "Llama-2-7b-hf", "Llama-3.2-1B", "LLaMA-2-7B-32K", "Mistral-7B-v0.1"]
FAMILIES += ["Gemma-2b", "Gemma-7b", "Gemma-2-2b", "Gemma-2-27b", "Gemma-3-1b-it", "Gemma-3-27b-it", "OLMo-1B-hf"]
FAMILIES += [
    "OLMo-2-1124-7B",
    "Qwen2.5-0.5B",
    "Qwen3-0.6B",
    "Qwen3-30B-A3B",
    "Mixtral-8x7B-v0.1",
    "Phi-4-mini-instruct",
]
TOKENS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(1))  # more than any window
assert TOKENS.size(1) > 2 * WINDOW


def config_of(name: str) -> Config:
    return SYNTHETIC[name] if name in SYNTHETIC else shrink(name)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_keys_and_shapes_are_litgpts(name: str) -> None:
    config = Config.from_name(name, n_layer=2)  # full widths
    with torch.device("meta"):
        ours, theirs = GPT(config).state_dict(), base.GPT(config).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert list(ours) == list(theirs)  # in the same order, as optimizers' states go by order


@pytest.mark.parametrize("name", [*NAMES, *SYNTHETIC])
@torch.no_grad()
def test_training_forward_is_litgpts_to_the_bit(name: str) -> None:
    ours, theirs = twins(config_of(name))
    logits = ours(TOKENS)
    assert logits.isfinite().all()
    assert logits.std(dim=-1).min() > 1e-3  # weights that matter
    assert torch.equal(logits, theirs(TOKENS))


@pytest.mark.parametrize("name", [*FAMILIES, *SYNTHETIC])
@torch.no_grad()
def test_training_forward_in_bfloat16_is_litgpts_to_the_bit(name: str) -> None:
    ours, theirs = twins(config_of(name), torch.bfloat16)
    assert torch.equal(ours(TOKENS), theirs(TOKENS))


@pytest.mark.parametrize("name", [*FAMILIES, *SYNTHETIC])
def test_gradients_are_litgpts(name: str) -> None:
    models = twins(config_of(name))
    for model in models:
        model.train()
        cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    ours, theirs = ({k: p.grad for k, p in model.named_parameters()} for model in models)
    assert any(g is not None and g.abs().max() > 0 for g in theirs.values())
    for key, grad in theirs.items():
        if grad is None:
            assert ours[key] is None, key
        else:
            assert torch.equal(ours[key], grad), key


@pytest.mark.parametrize("name", ["Gemma-2-2b", "pythia-14m"])  # with and without softcapped logits
@pytest.mark.parametrize("chunk", [1, 7, 24, 100])
@torch.no_grad()
def test_head_in_chunks_is_litgpts(name: str, chunk: int) -> None:
    ours, theirs = twins(config_of(name))
    parts = ours(TOKENS, lm_head_chunk_size=chunk)
    expected = theirs(TOKENS, lm_head_chunk_size=chunk)
    assert isinstance(parts, list)
    assert len(parts) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(parts, expected))


def test_features_are_really_there() -> None:
    """The small configs keep what makes their families different; a helper that drops a flag would hide a bug."""
    for name in NAMES:
        big, small = Config.from_name(name), shrink(name)
        for flag in (
            *(
                "parallel_residual",
                "shared_attention_norm",
                "norm_class_name",
                "norm_qk",
                "norm_qk_type",
                "bias",
                "attn_bias",
            ),
            *(
                "mlp_class_name",
                "post_attention_norm",
                "post_mlp_norm",
                "norm_1",
                "norm_2",
                "scale_embeddings",
                "lm_head_bias",
            ),
            *("attention_logit_softcapping", "final_logit_softcapping", "rope_base", "rope_local_base_freq", "name"),
            *(
                "rotary_percentage",
                "rope_condense_ratio",
                "attention_scores_scalar",
                "gelu_approximate",
                "rope_interleave",
            ),
        ):
            assert getattr(big, flag) == getattr(small, flag), (name, flag)
        for field in ("sliding_window_indices", "rope_indices"):
            assert set(getattr(big, field) or []) == set(getattr(small, field) or []), (name, field)
        assert (big.rope_adjustments or {}).keys() == (small.rope_adjustments or {}).keys()
        assert (big.n_head == big.n_query_groups) == (small.n_head == small.n_query_groups)
        assert (big.n_query_groups == 1) == (small.n_query_groups == 1)
        assert (big.n_head * big.head_size == big.n_embd) == (small.n_head * small.head_size == small.n_embd)
        assert bool(big.n_expert) == bool(small.n_expert)


def test_weights_load_from_litgpts_legacy_layout() -> None:
    """litgpt's old checkpoints have `attn.attn.*` for the projection, interleaved by group."""
    ours, theirs = twins(config_of("Llama-3.2-1B"))
    legacy = {k.replace("attn.qkv.", "attn.attn."): v for k, v in theirs.state_dict().items()}
    for model in (ours, theirs):
        model.load_state_dict(legacy)
    with torch.no_grad():
        assert torch.equal(ours(TOKENS), theirs(TOKENS))


def test_a_wrong_call_says_what_is_wrong() -> None:
    model = GPT(config_of("pythia-14m"))
    with pytest.raises(ValueError, match="context is 48"):
        model(torch.zeros(1, 49, dtype=torch.int64))
    with pytest.raises(ValueError, match="length without a cache"):
        model(TOKENS, None, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=r"3 rows.*2"):
        model(TOKENS, KVCache.build(model, batch_size=3))


@pytest.mark.parametrize("name", ["pythia-14m", "latent"])
def test_a_seed_gives_litgpts_weights(name: str) -> None:
    config = SYNTHETIC[name] if name in SYNTHETIC else shrink(name)
    models = []
    for cls in (base.GPT, GPT):
        torch.manual_seed(3)
        models.append(cls(config).state_dict())
    assert all(torch.equal(models[0][key], value) for key, value in models[1].items())
