"""From a Hugging Face folder through litgpt's converter to `litgpt_kv generate`; LoRA, merged.

The folders are made here with transformers, small and random, sharded with an index, each with its own tokenizer.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import litgpt.lora
from litgpt.config import name_to_config
from litgpt.utils import save_config
from litgpt_kv import LLM
from litgpt_kv.__main__ import COMMANDS, main
from litgpt_kv.llm.checkpoint import DEMO, load_config
from tests.oracle.shrink import fill

PROMPTS = ["def area(width, height):", "import"]
NEW = 14
SIZES = dict(n_layer=2, n_head=4, n_embd=32, head_size=8, intermediate_size=48, block_size=64)
SIZES |= dict(padded_vocab_size=320, vocab_size=320)


def tokenizer_in(folder: Path) -> Tokenizer:
    """Save a byte-level tokenizer of 320 tokens as in a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict(bos_token="<s>", eos_token="</s>", add_bos_token=False, tokenizer_class="PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return tokenizer


def hugging_face(kind: str) -> tuple[str, dict[str, Any], nn.Module]:
    """Return a name that litgpt's converter knows, litgpt's config, and transformers' model."""
    transformers = pytest.importorskip("transformers", minversion="4.51.3")
    given = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    given |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=1, attn_implementation="eager")
    grouped = dict(num_key_value_heads=2, head_dim=8)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**given, **grouped, rope_theta=500000, rms_norm_eps=1e-5)
        )
        return (
            "Llama-3.2-small",
            {**name_to_config["Llama-3.2-1B"], "n_query_groups": 2, "rope_adjustments": None},
            model,
        )
    if kind == "gemma":
        own = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8)
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**given, **grouped, **own))
        own = dict(sliding_window_size=5, sliding_window_indices=[1, 0], attention_scores_scalar=8, n_query_groups=2)
        return "Gemma-2-small", {**name_to_config["Gemma-2-2b"], **own}, model
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**given, rotary_pct=0.25))
    return "pythia-small", {**name_to_config["pythia-14m"], "n_query_groups": 4}, model


def generated(capsys: pytest.CaptureFixture, folder: Path, *flags: str) -> str:
    capsys.readouterr()
    prompts = [part for p in PROMPTS for part in ("--prompt", p)]
    main(["generate", str(folder), "--accelerator", "cpu", *prompts, "--max-new-tokens", str(NEW), *flags])
    return capsys.readouterr().out


@torch.no_grad()
def continued(model: nn.Module, tokenizer: Tokenizer, prompt: str, start: list[int]) -> str:
    """Return transformers' greedy continuation of a prompt, without a cache."""
    ids = start + tokenizer.encode(prompt, add_special_tokens=False).ids
    for _ in range(NEW):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["llama", "gemma", "pythia"])
def test_a_hugging_face_folder_converts_and_generates(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name, config, model = hugging_face(kind)
    fill(model).eval()
    folder = tmp_path / name
    folder.mkdir()
    tokenizer = tokenizer_in(folder)
    model.save_pretrained(folder, max_shard_size="30KB", safe_serialization=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()

    monkeypatch.setitem(name_to_config, name, {**config, **SIZES, "name": name})  # litgpt knows no such small model
    main(["convert_to_litgpt", str(folder)])
    start = [0] if kind == "llama" else []  # litgpt begins a text with <s> where a folder's name says Llama-3
    expected = "".join(continued(model, tokenizer, p, start) + "\n" for p in PROMPTS)
    greedy = ["--temperature", "0", "--ignore-eos"]
    assert generated(capsys, folder, *greedy) == expected
    assert generated(capsys, folder, *greedy, "--prefill", "full") == expected
    assert generated(capsys, folder, *greedy, "--kv-cache", "h2o", "--kv-cache.budget", "50") == expected
    assert generated(capsys, folder, *greedy, "--kv-cache", "sink", "--kv-cache.budget", "6") != expected

    back = tmp_path / "back"
    main(["convert_from_litgpt", str(folder), str(back)])
    weights, expected = torch.load(back / "model.pth"), model.state_dict()
    assert set(expected) - set(weights) <= {"lm_head.weight"}  # which Gemma ties
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


@torch.no_grad()
def test_a_merged_lora_checkpoint_generates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = dict(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_query=True, lora_value=True, lora_mlp=True)
    config = litgpt.lora.Config.from_file(DEMO / "model_config.yaml", **settings)
    tuned = litgpt.lora.GPT(config).eval()
    tuned.load_state_dict(torch.load(DEMO / "lit_model.pth"), strict=False)
    adapters = {k: torch.randn_like(v) * 0.1 for k, v in tuned.state_dict().items() if litgpt.lora.lora_filter(k, v)}
    tuned.load_state_dict(adapters, strict=False)
    folder = tmp_path / "tuned"
    folder.mkdir()
    for file in DEMO.glob("*token*.json"):
        shutil.copy(file, folder)
    save_config(load_config(DEMO), folder)
    torch.save({"model": adapters}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({**settings, "checkpoint_dir": str(DEMO)}))

    main(["merge_lora", str(folder)])
    llm = LLM.load(folder, accelerator="cpu")
    ids = llm.encode(PROMPTS[0])
    logits = llm.model(ids[None])
    torch.testing.assert_close(logits, tuned(ids[None]), rtol=0, atol=1e-4)  # float32: the sum is the weights' or not
    assert (logits - LLM.load("demo", accelerator="cpu").model(ids[None])).abs().max() > 0.1
    text = generated(capsys, folder, "--temperature", "0", "--kv-cache", "dense")
    assert text == generated(capsys, folder, "--temperature", "0", "--kv-cache", "none")
    assert text != generated(capsys, DEMO, "--temperature", "0")


def test_litgpts_commands_are_litgpts(capsys: pytest.CaptureFixture) -> None:
    from litgpt.__main__ import PARSER_DATA

    litgpt_commands = {name: command for name, command in COMMANDS.items() if command.__module__.startswith("litgpt.")}
    assert litgpt_commands == {n: PARSER_DATA[n] for n in ("download", "convert_from_litgpt", "merge_lora")}
    own, its = (inspect.signature(table["convert_to_litgpt"]) for table in (COMMANDS, PARSER_DATA))
    assert {p.name: p.default for p in own.parameters.values()} == {p.name: p.default for p in its.parameters.values()}
    for name in litgpt_commands:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert re.search(r"checkpoint.dir", capsys.readouterr().out)
    main(["download", "list"])
    assert "EleutherAI/pythia-14m" in capsys.readouterr().out


def test_what_a_conversion_cannot_do_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["convert_to_litgpt", str(tmp_path / "unknown-model")], "'unknown-model' is not a supported config name"),
        (["convert_to_litgpt", str(tmp_path), "--model_name", "pythia-14m"], "to contain .bin or .safetensors files"),
        (["convert_from_litgpt", str(tmp_path / "nothing"), str(tmp_path / "out")], "nothing/model_config.yaml"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        error = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2
        assert len(error) == 1 and error[0].startswith("litgpt_kv: error: ") and message in error[0]
