"""What litgpt's test files expect of their `conftest.py`, for copies of them that came without it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer

import litgpt.scripts.download
from litgpt.utils import save_config


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("flaky(reruns): needs pytest-rerunfailures; ignored here", "timeout(seconds): ignored here"):
        config.addinivalue_line("markers", marker)
    if os.environ.get("LITGPT_SUITE") != "theirs":
        from litgpt_kv.compat.install import install

        install()
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        litgpt.scripts.download.download_from_hub = _make


def _make(repo_id: str, tokenizer_only: bool = False, checkpoint_dir: Path = Path("checkpoints"), **_: Any) -> None:
    """In the place of a download: a folder of that name with random weights and a tokenizer of its own."""
    folder = Path(checkpoint_dir) / repo_id
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([Path(__file__).read_text()], vocab_size=500, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", tokenizer_class="GPTNeoXTokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    if not tokenizer_only:
        model = litgpt.GPT.from_name(repo_id.split("/")[-1])
        for name in ("config.json", "generation_config.json"):
            (folder / name).write_text("{}")
        model.lm_head.weight.data[tokenizer.get_vocab_size() :] = 0  # no likely token without text, and no end
        model.lm_head.weight.data[0] = 0
        save_config(model.config, folder)
        torch.save(model.state_dict(), folder / "lit_model.pth")


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed, the default dtype, and a working folder of its own for each test."""
    torch.manual_seed(42)
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake_checkpoint_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "tmp"
    folder.mkdir(parents=True)
    for name in ("lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).touch()
    return folder


class _Like:
    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, self.kind)


@pytest.fixture
def tensor_like() -> _Like:
    return _Like(torch.Tensor)


@pytest.fixture
def float_like() -> _Like:
    return _Like(float)


class _Letters:
    """A tokenizer whose tokens are characters."""

    bos_id, eos_id = 0, 1

    def encode(self, text: str, bos: bool = False, eos: bool = False, max_length: int = -1, **_: Any) -> torch.Tensor:
        tokens = [self.bos_id] * bool(bos) + [ord(c) for c in text] + [self.eos_id] * bool(eos)
        return torch.tensor(tokens[: max_length if max_length > 0 else None])

    def decode(self, tokens: torch.Tensor) -> str:
        return "".join(chr(int(t)) for t in tokens)


@pytest.fixture
def mock_tokenizer() -> _Letters:
    return _Letters()


@pytest.fixture
def alpaca_path(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca" / "alpaca_data_cleaned_archive.json"
    path.parent.mkdir()
    path.write_text(json.dumps([dict(instruction=f"Say {i}.", input="", output=f"{i}") for i in range(24)]))
    return path
