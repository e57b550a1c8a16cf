"""A damaged checkpoint gives one line of error, or the right model; memory is allocated only after the checks."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from litgpt import Config
from litgpt_kv import GPT, LLM
from litgpt_kv.__main__ import main
from litgpt_kv.llm.check_config import LIMITS
from litgpt_kv.llm.checkpoint import DEMO, own_temperature

SIZES = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_query_groups": 1, "head_size": 8}
SIZES |= {"intermediate_size": 16, "block_size": 64}
VALUES = (0, -1, 10**9, 10**400, 1.5, "x", None, True, [1, 2], {"a": 1}, math.nan, "9" * 5000)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small checkpoint with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("sound")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)
    settings = yaml.safe_load((DEMO / "model_config.yaml").read_text()) | SIZES
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    torch.save(GPT(Config(**settings)).state_dict(), folder / "lit_model.pth")
    return folder


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "damaged"))


@pytest.fixture
def outcome(damaged: Path) -> Callable[[], str]:
    """Return a function that runs the checkpoint and returns the message of its ValueError, or ""."""

    def run() -> str:
        try:
            LLM.load(damaged, accelerator="cpu").generate("def f", max_new_tokens=1, temperature=0.0)
        except ValueError as error:  # which the command line prints on one line
            assert len(str(error)) < 1000
            return str(error)
        return ""

    return run


def settings_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "model_config.yaml").read_text())


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Config)])
def test_config_values(name: str, damaged: Path, outcome: Callable[[], str]) -> None:
    settings = settings_of(damaged)
    for value in VALUES:
        (damaged / "model_config.yaml").write_text(yaml.safe_dump({**settings, name: value}))
        line = outcome()
        if name in LIMITS and value == 10**9:
            assert line
        if line and "logits" not in line:
            assert "model_config.yaml" in line or "machine has" in line, (name, value)


def test_absurd_sizes_are_refused_before_memory_goes(damaged: Path, outcome: Callable[[], str]) -> None:
    settings = settings_of(damaged)
    for changed, says in (
        ({"n_layer": 10**9}, "n_layer is over the limit of 2,000: 1000000000"),
        ({"n_layer": 2000}, "they have 2 layers, n_layer is 2,000"),
        ({"n_expert": 10**4, "n_expert_per_token": 1, "mlp_class_name": "LLaMAMoE", "n_layer": 100}, "65,536 experts"),
        ({"padded_vocab_size": 2**24}, "has shape"),
        ({"block_size": 2**40}, "block_size is over the limit of 134,217,728"),
    ):
        (damaged / "model_config.yaml").write_text(yaml.safe_dump({**settings, **changed}))
        assert says in outcome()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_json_values(name: str, damaged: Path, outcome: Callable[[], str]) -> None:
    fields = json.loads((damaged / name).read_text())
    keys = {*fields, "tokenizer_class", "add_bos_token", "bos_token", "eos_token", "temperature", "eos_token_id"}
    for key in sorted(keys):
        for value in (*VALUES, {"content": 3}, {"content": "no such token"}, [2]):
            (damaged / name).write_text(json.dumps({**fields, key: value}))
            outcome()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "model_config.yaml"])
def test_no_settings_at_all(name: str, damaged: Path, outcome: Callable[[], str]) -> None:
    for text in ("", "[]", "null", "3", "x", "[" * 100_000, '{"a":' * 5000, "{a: " * 5000, "a: &a [*a]", "\0", "- 1"):
        (damaged / name).write_text(text)
        assert name in (line := outcome()) or "tokenizer" in line, text[:20]
    (damaged / name).write_bytes(b"\xff\xfe\x00")
    assert name in outcome()
    (damaged / name).unlink()
    (damaged / name).mkdir()
    assert outcome()


def test_broken_json_is_mended_as_litgpt_does_but_not_for_ever(damaged: Path, outcome: Callable[[], str]) -> None:
    path = damaged / "generation_config.json"
    path.write_text('{"temperature": 0.5,}')
    assert own_temperature(damaged) == 0.5
    path.write_text('"a' + "\n" * 900_000)  # litgpt's regular expressions take time with the square of this
    assert "generation_config.json cannot be read" in outcome()


@pytest.mark.parametrize(
    "name", ["lit_model.pth", "model_config.yaml", "tokenizer_config.json", "generation_config.json", "tokenizer.json"]
)
def test_flipped_bits(name: str, damaged: Path, outcome: Callable[[], str]) -> None:
    rng, data = random.Random(name), (damaged / name).read_bytes()
    for n in range(30 if name != "tokenizer.json" else 6):
        broken = bytearray(data)
        ends = (
            [0, len(data)] if n % 3 else [0, min(len(data), 3000)] if n % 2 else [max(0, len(data) - 3500), len(data)]
        )
        for _ in range(rng.choice((1, 1, 3))):  # in the head and the tail of a zip are its names and sizes
            broken[rng.randrange(*ends)] ^= 1 << rng.randrange(8)
        (damaged / name).write_bytes(bytes(broken))
        outcome()


def test_cut_weights(damaged: Path, outcome: Callable[[], str]) -> None:
    data = (damaged / "lit_model.pth").read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 100, len(data) - 1):
        (damaged / "lit_model.pth").write_bytes(data[:size])
        assert "lit_model.pth cannot be read, it may be corrupt" in outcome()


def test_weights_that_are_larger_than_their_file(damaged: Path, outcome: Callable[[], str]) -> None:
    path = damaged / "lit_model.pth"
    weights = torch.load(path, weights_only=True)
    name = next(iter(weights))
    cases = {
        "a stride of 0": torch.zeros(1).expand(10**6, 10**6),
        "no tensor": "text",
        "a sparse one": torch.zeros(3, 3).to_sparse(),
        "whole numbers": torch.zeros(weights[name].shape, dtype=torch.int64),
        "no storage": torch.zeros(10**6, 10**6, device="meta"),
        "a number": 3,
    }
    for value in cases.values():
        torch.save({**weights, name: value}, path)
        assert f"{name!r} is not a floating-point tensor" in outcome()
    shared = torch.zeros(10**6)
    torch.save({**weights, **{f"extra.{n}": shared for n in range(20)}}, path)
    assert "bytes of weights and has" in outcome()
    for whole in ([weights], {}, {"model": 3}, {3: torch.zeros(1)}):
        torch.save(whole, path)
        assert "lit_model.pth" in outcome()


def test_a_compressed_file_does_not_expand(damaged: Path, outcome: Callable[[], str]) -> None:
    with zipfile.ZipFile(damaged / "lit_model.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 200_000_000)
    assert "its parts are larger than the file" in outcome()


def test_rope_settings_that_give_no_positions(damaged: Path, outcome: Callable[[], str]) -> None:
    rope = {"factor": 0.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_seq_len": 64}
    (damaged / "model_config.yaml").write_text(yaml.safe_dump({**settings_of(damaged), "rope_adjustments": rope}))
    assert "model_config.yaml cannot be used" in outcome()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_told_on_request(value: float, damaged: Path) -> None:
    path = damaged / "lit_model.pth"
    weights = torch.load(path, weights_only=True)
    LLM.load(damaged, accelerator="cpu", check_weights=True)
    weights["transformer.h.1.mlp.proj.weight"][3, 2] = value
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"'transformer.h.1.mlp.proj.weight' has 1 of 256 values that are not finite"):
        LLM.load(damaged, accelerator="cpu", check_weights=True)
    weights["transformer.h.1.mlp.proj.weight"][:] = 3e38  # whose sum is not finite
    torch.save(weights, path)
    LLM.load(damaged, accelerator="cpu", check_weights=True)


def test_the_command_line_says_it_on_one_line(damaged: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("lit_model.pth", "model_config.yaml", "tokenizer_config.json", "generation_config.json"):
        before = (damaged / name).read_bytes()
        (damaged / name).write_bytes(b"{" * 3000)
        with pytest.raises(SystemExit) as end:
            main(["generate", str(damaged), "--accelerator", "cpu"])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("litgpt_kv: error: ") and name in line
        (damaged / name).write_bytes(before)


def test_the_check_of_weights_is_an_option(damaged: Path, capsys: pytest.CaptureFixture) -> None:
    path = damaged / "lit_model.pth"
    weights = torch.load(path, weights_only=True)
    weights["lm_head.weight"][0, 0] = math.nan
    torch.save(weights, path)
    with pytest.raises(SystemExit) as end:
        main(["generate", str(damaged), "--accelerator", "cpu", "--check-weights"])
    assert end.value.code == 2
    assert "'lm_head.weight' has 1 of " in capsys.readouterr().err
