"""Our classes in the place of litgpt's: its LLM, LoRA and adapters train and generate on our GPT, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

import litgpt
import litgpt.adapter
import litgpt.adapter_v2
import litgpt.api
import litgpt.finetune.lora
import litgpt.lora
import litgpt.model as base
import litgpt_kv
from litgpt.generate.base import generate
from litgpt.scripts.merge_lora import merge_lora
from litgpt.utils import save_config
from litgpt_kv import KVCache, KVCacheArgs
from litgpt_kv.compat.install import OURS, install
from litgpt_kv.compat.litgpt_modules import GPT
from litgpt_kv.llm.checkpoint import DEMO
from tests.oracle.reference import lift
from tests.oracle.shrink import fill, shrink

TOKENS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(3))
LORA = dict(lora_r=4, lora_alpha=8, lora_query=True, lora_key=True, lora_value=True, lora_projection=True)
LORA |= dict(lora_mlp=True, lora_head=True)
KINDS = {
    "lora": (litgpt.lora, LORA, litgpt.lora.mark_only_lora_as_trainable),
    "adapter": (litgpt.adapter, dict(adapter_start_layer=1), litgpt.adapter.mark_only_adapter_as_trainable),
    "adapter_v2": (
        litgpt.adapter_v2,
        dict(adapter_start_layer=0),
        litgpt.adapter_v2.mark_only_adapter_v2_as_trainable,
    ),
}
NAMES = ["pythia-14m", "Llama-3.2-1B", "Gemma-2-2b", "Gemma-3-1b-it", "Qwen3-0.6B"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def installed() -> Iterator[None]:
    with install():
        yield


def tuned(kind: str, name: str) -> base.GPT:
    """A model of litgpt.lora or of the adapters with random weights everywhere, of the classes installed now."""
    module, options, mark = KINDS[kind]
    small = {k: v for k, v in vars(shrink(name)).items() if k in module.Config.__dataclass_fields__}
    model = fill(module.GPT(module.Config(**small, **options)))
    mark(model)
    return model


def step(model: base.GPT) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """One training step: the loss, all gradients and the weights after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return loss.detach(), grads, {k: v.clone() for k, v in model.state_dict().items()}


LITGPTS = base.CausalSelfAttention.scaled_dot_product_attention


def without_the_ones(attn: base.CausalSelfAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.dtype == torch.bool:
        assert mask.all()
        mask = torch.zeros_like(mask, dtype=q.dtype)
    return LITGPTS(attn, q, k, v, mask)


@every_kind
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_litgpts(kind: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if kind != "lora":  # litgpt adds the adaption prompt's mask, all ones, to softcapped scores: rounding
            patch.setattr(base.CausalSelfAttention, "scaled_dot_product_attention", without_the_ones)
        loss, grads, weights = step(tuned(kind, name))
    with install():
        model = tuned(kind, name)
        assert isinstance(model, GPT)
        assert isinstance(model.transformer.h[0].attn, litgpt_kv.model.gpt.CausalSelfAttention)
        ours = step(model)
    assert any(grad.abs().max() > 0 for grad in grads.values())
    assert grads.keys() == ours[1].keys()
    assert weights.keys() == ours[2].keys()
    assert torch.equal(ours[0], loss)
    for key, grad in grads.items():
        assert torch.equal(ours[1][key], grad), key
    for key, weight in weights.items():
        assert torch.equal(ours[2][key], weight), key


@every_kind
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tuned_models_generate_with_litgpts_cache_and_ours(kind: str, name: str, installed: None) -> None:
    model = lift(tuned(kind, name)).eval()
    expected = model(TOKENS)
    model.set_kv_cache(2)
    got = [model(TOKENS[:, :11], torch.arange(11))]
    got += [model(TOKENS[:, at : at + 1], torch.tensor([at]), at + 1) for at in range(11, 24)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=0, atol=1e-8)
    for strategy in ("dense", "h2o", "sink"):
        cache = KVCache.build(model, KVCacheArgs(strategy, budget=None if strategy == "dense" else 24), 2, 24)
        lengths = torch.tensor([11, 6])
        got = model(TOKENS[:, :11], cache, lengths)
        for at in range(13):
            for row, length in enumerate(lengths):
                torch.testing.assert_close(got[row].view(-1), expected[row, length - 1 + at], rtol=0, atol=1e-8)
            got = model(torch.stack([TOKENS[row, n + at] for row, n in enumerate(lengths)]).view(2, 1), cache)


def test_merged_lora_weights_load_in_our_gpt(tmp_path: Path) -> None:
    config = dict(n_layer=2, n_embd=32, n_head=4, n_query_groups=2, padded_vocab_size=64, block_size=32)
    with install():
        base_dir, lora_dir = tmp_path / "base", tmp_path / "lora"
        tuned_model = fill(litgpt.lora.GPT.from_name("Llama-3.2-1B", intermediate_size=48, **config, **LORA))
        plain = fill(litgpt.GPT.from_name("Llama-3.2-1B", intermediate_size=48, **config))
        assert type(plain) is GPT
        missing, unexpected = tuned_model.load_state_dict(plain.state_dict(), strict=False)
        assert all("lora" in key for key in missing)
        assert not unexpected
        for folder in (base_dir, lora_dir):
            folder.mkdir()
            save_config(plain.config, folder)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / file).touch()
        torch.save(plain.state_dict(), base_dir / "lit_model.pth")
        lora = {k: v for k, v in tuned_model.state_dict().items() if litgpt.lora.lora_filter(k, v)}
        torch.save(lora, lora_dir / "lit_model.pth.lora")
        (lora_dir / "hyperparameters.yaml").write_text(yaml.dump({"checkpoint_dir": str(base_dir), **LORA}))
        merge_lora(lora_dir)
    merged = GPT(litgpt.Config.from_file(lora_dir / "model_config.yaml"))
    merged.load_state_dict(torch.load(lora_dir / "lit_model.pth"))
    tokens = TOKENS % 64
    with torch.no_grad():
        expected = tuned_model.eval()(tokens)
        torch.testing.assert_close(merged(tokens), expected, rtol=1e-4, atol=1e-4)
        assert (plain(tokens) - expected).abs().max() > 0.1


def test_llm_of_litgpt_gives_the_same_text_on_our_gpt() -> None:
    def texts() -> tuple[type, list[str]]:
        llm = litgpt.api.LLM.load(str(DEMO))
        options = dict(temperature=0.8, top_k=20)
        torch.manual_seed(7)
        out = [llm.generate("def fib(", max_new_tokens=20, **options)]
        out.append(llm.generate("class Parser:\n", max_new_tokens=30, **options))  # a longer cache
        out.append(llm.generate("import", max_new_tokens=4, **options))  # and a shorter one
        out.append("".join(llm.generate("import os\n", max_new_tokens=12, stream=True, **options)))
        llm = litgpt.api.LLM.load(str(DEMO), distribute=None)
        llm.distribute(accelerator="cpu", devices=1, fixed_kv_cache_size=64)
        torch.manual_seed(7)  # after the model was made
        out.append(llm.generate("x = ", max_new_tokens=20, **options))
        llm.trainer_setup()
        return type(llm.model), out

    theirs = texts()
    with install():
        ours = texts()
    assert (theirs[0], ours[0]) == (base.GPT, GPT)
    assert ours[1] == theirs[1]
    assert len(set(ours[1])) == 5


def test_one_validation_of_litgpts_fine_tuning(installed: None, capsys: pytest.CaptureFixture[str]) -> None:
    """It sets a cache on a model in training, generates, and clears it."""
    fine = litgpt.finetune.lora
    assert fine.GPT is litgpt.lora.GPT
    model = tuned("lora", "Gemma-2-2b")
    model.set_kv_cache(batch_size=1)
    model.eval()
    tokens = generate(model, TOKENS[0, :13], 20, temperature=0.0)
    model.clear_kv_cache()
    model.train()
    assert tokens.size(0) == 20
    model(TOKENS).sum().backward()


def names_of(module: ModuleType, classes: set[type]) -> set[str]:
    return {name for name, value in vars(module).items() if isinstance(value, type) and value in classes}


def test_install_is_everywhere_and_is_undone() -> None:
    modules = [litgpt, litgpt.api, litgpt.finetune.lora, litgpt.model, litgpt.lora, litgpt.adapter, litgpt.adapter_v2]
    before = {m.__name__: names_of(m, set(OURS)) for m in modules}
    assert "GPT" in before["litgpt"] & before["litgpt.api"] & before["litgpt.model"]
    old = base.GPT  # taken before
    bases = litgpt.lora.GPT.__bases__
    with install():
        with install():  # twice changes nothing
            assert {m.__name__: names_of(m, set(OURS.values())) for m in modules} == before
        install()
        assert litgpt.GPT is GPT
        assert litgpt.lora.GPT.__bases__ == (GPT,)
        assert issubclass(litgpt.adapter_v2.Block, litgpt_kv.model.block.Block)
        model = fill(old(shrink("Gemma-3-1b-it")))  # litgpt's model over our blocks
        expected = model(TOKENS)
    assert {m.__name__: names_of(m, set(OURS)) for m in modules} == before
    assert litgpt.GPT is old
    assert litgpt.lora.GPT.__bases__ == bases
    assert not isinstance(tuned("lora", "pythia-14m"), GPT)
    assert torch.equal(fill(old(shrink("Gemma-3-1b-it")))(TOKENS), expected)


def test_an_inner_install_leaves_the_outer_one() -> None:
    theirs = litgpt.model.GPT
    with install():
        with install():
            pass
        assert litgpt.model.GPT is GPT
    assert litgpt.model.GPT is theirs is not GPT
