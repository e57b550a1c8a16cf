"""`convert_to_litgpt`: configs that do not fit are refused, and sizes that litgpt does not name are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from litgpt.config import name_to_config
from litgpt_kv import LLM
from litgpt_kv.__main__ import main
from litgpt_kv.convert.hugging_face import config_of, same_sizes
from tests.llm.test_road import tokenizer_in
from tests.oracle.shrink import fill

SIZES = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
PYTHIA = dict(model_type="gpt_neox", hidden_size=128, num_hidden_layers=6, num_attention_heads=4, vocab_size=50304)
PYTHIA |= dict(intermediate_size=512, rotary_emb_base=10000)


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([*map(str, args)])
    assert end.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("litgpt_kv: error: ") and "Traceback" not in line
    return line


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_sizes_that_litgpt_does_not_name_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers", minversion="4.51.3")
    own = dict(head_dim=8) if kind == "Qwen3" else {}
    tied = kind == "Llama"
    config = getattr(transformers, f"{kind}Config")(**SIZES, **own, rope_theta=5000.0, tie_word_embeddings=tied)
    model = fill(getattr(transformers, f"{kind}ForCausalLM")(config)).eval()
    folder = tmp_path / "my-model"
    folder.mkdir()
    tokenizer_in(folder)
    model.save_pretrained(folder)
    assert f"convert them: litgpt_kv convert_to_litgpt {folder}" in refused(capsys, "generate", folder)
    before = set(name_to_config)
    main(["convert_to_litgpt", str(folder)])
    assert "config.json" in capsys.readouterr().err and set(name_to_config) == before
    llm = LLM.load(folder, accelerator="cpu")
    ids = torch.arange(5, 45)[None]
    torch.testing.assert_close(llm.model(ids), model(ids).logits, rtol=0, atol=2e-4)
    assert llm.config.block_size == 64 and llm.config.rope_base == 5000


def test_a_name_of_other_sizes_is_refused_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "pythia-14m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PYTHIA))
    line = refused(capsys, "convert_to_litgpt", folder, "--model-name", "pythia-70m")
    assert "config.json has num" not in line and "has hidden_size 128, the config 'pythia-70m' has 512" in line
    assert "Configs of these sizes: pythia-14m." in line
    assert "to contain .bin or .safetensors files" in refused(capsys, "convert_to_litgpt", folder)
    assert "Did you mean 'pythia-14m'?" in refused(capsys, "convert_to_litgpt", folder, "--model-name", "pythia-14n")
    assert "dtype must be one of" in refused(capsys, "convert_to_litgpt", folder, "--dtype", "int3")
    (folder / "config.json").write_text("[1]")
    assert "it is not a mapping" in refused(capsys, "convert_to_litgpt", folder)


def test_what_no_config_can_be_made_of() -> None:
    assert same_sizes(PYTHIA) == ["pythia-14m"] and config_of(PYTHIA, "x") == ("pythia-14m", None)
    llama = {"model_type": "llama", **SIZES, "rms_norm_eps": 1e-5}
    name, values = config_of(llama, "small")
    assert name == "small" and values is not None and values["head_size"] == 8
    for change, says in (
        ({"model_type": "rwkv"}, "model_type is 'rwkv'"),
        ({"hidden_size": "x"}, "no number 'hidden_size'"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scales positions by 'yarn'"),
        ({"num_key_value_heads": 3}, "contradict"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_hidden_layers": 10**9}, "n_layer is over the limit"),
    ):
        with pytest.raises(ValueError, match=says):
            config_of({**llama, **change}, "small")
