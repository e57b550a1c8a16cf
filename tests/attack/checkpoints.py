"""Checkpoint folders that are damaged or hostile: weights, configs, tokenizers, prompt styles."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from litgpt_kv.llm.checkpoint import DEMO
from tests.attack.configs import BOMB, TAGS
from tests.attack.harness import CANARY, Case, command, flipped

FILES = ("lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
STYLE = "prompt_style.yaml"
ABSURD: list[Any] = [None, True, -1, 0, 1, 2.5, 10**9, 10**400, "x", [], [1], {}, float("nan"), float("inf"), "1e9"]
STYLES = [
    "class_path: os.abort",
    "class_path: os.system\ninit_args: {command: touch canary}",
    "class_path: canary_module.Canary",
    "class_path: litgpt.prompts.os.abort",
    "class_path: litgpt.prompts.Alpaca\ninit_args: {x: 1}",
    "class_path: litgpt.prompts.Nope",
    "class_path: litgpt.prompts.PromptStyle",
    "class_path: litgpt.prompts.save_prompt_style",
    "class_path: .Canary",
    "class_path: [litgpt.prompts.Alpaca]",
    "class_path: 7",
    "class_path: ''",
    "class_path: litgpt",
    "class_path: builtins.print",
    "[1, 2]",
    "7",
    "",
    "\0",
    BOMB + "class_path: *k",
    *TAGS,
    *(f"class_path: {tag}" for tag in TAGS),
]


class Runs:
    """Runs something when it is unpickled."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def checkpoint(folder: Path, changed: dict[str, bytes | None]) -> Path:
    """The demo model with some files changed; None leaves one out."""
    copy = folder / "checkpoint"
    copy.mkdir()
    for name in FILES:
        if name not in changed:
            (copy / name).symlink_to(DEMO / name)
    for name, data in changed.items():
        if data is not None:
            (copy / name).write_bytes(data)
    (folder / "canary_module.py").write_text(f"open({str(folder / CANARY)!r}, 'w')\nclass Canary: pass\n")
    return copy


def case(what: str, changed: dict[str, Any]) -> Case:
    """Generates with a checkpoint; contents are bytes, or make bytes in a folder."""

    def act(folder: Path) -> None:
        made = {name: data(folder) if callable(data) else data for name, data in changed.items()}
        words = ["--max-new-tokens", "2", "--accelerator", "cpu", "--threads", "1"]
        command("generate", checkpoint(folder, made), *words)(folder)

    return Case(what, act)


def saved(content: Any) -> Callable[[Path], bytes]:
    """The bytes of `torch.save`; what it holds is made in the case's folder."""

    def make(folder: Path) -> bytes:
        torch.save(content(folder) if callable(content) else content, folder / "made")
        return (folder / "made").read_bytes()

    return make


def _weights() -> dict[str, torch.Tensor]:
    return torch.load(DEMO / "lit_model.pth", weights_only=True, map_location="cpu")


def _with(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Path], dict]:
    def make(_: Path) -> dict:
        weights = _weights()
        weights = weights.get("model", weights)
        return {**weights, name: change(weights[name])}

    return make


def _zip_bomb(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "bomb", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 300_000_000)
    return (folder / "bomb").read_bytes()


HEAD, NORM = "lm_head.weight", "transformer.ln_f.weight"
WEIGHTS: dict[str, Any] = {
    "nothing": b"",
    "a byte": b"\x80",
    "text": b"weights",
    "an endless pickle": b"\x80\x02" + b"(" * 1_000_000,
    "os.system": pickle.dumps(Runs(os.system, f"touch {CANARY}")),
    "eval": pickle.dumps(Runs(eval, f"open({CANARY!r}, 'w')")),
    "os.system, as torch saves it": saved(lambda folder: {HEAD: Runs(os.system, f"touch {folder / CANARY}")}),
    "open, as torch saves it": saved(lambda folder: Runs(open, str(folder / CANARY), "w")),
    "a class": saved(lambda folder: Path),
    "a list": saved([1, 2]),
    "no weights": saved({}),
    "words": saved({HEAD: "weight"}),
    "numbers": saved({HEAD: 1}),
    "one tensor": saved(torch.zeros(3)),
    "keys that are numbers": saved({1: torch.zeros(3)}),
    "a model in a model": saved({"model": {"model": {}}}),
    "a model that is a list": saved({"model": [1]}),
    "a huge tensor": saved(_with(HEAD, lambda w: torch.zeros(1).expand(10**12))),
    "a tensor of no size": saved(_with(HEAD, lambda w: w[:0])),
    "a tensor more": saved(lambda folder: {**_weights(), "more": torch.zeros(1)}),
    "integers": saved(_with(HEAD, lambda w: w.to(torch.int8))),
    "complex numbers": saved(_with(HEAD, lambda w: w.to(torch.complex64))),
    "sparse": saved(_with(HEAD, lambda w: w.to_sparse())),
    "a meta tensor": saved(_with(HEAD, lambda w: w.to("meta"))),
    "not numbers": saved(_with(NORM, lambda w: w * float("nan"))),
    "infinities": saved(_with(NORM, lambda w: w * float("inf"))),
    "a zip bomb": _zip_bomb,
}
TEXTS = [b"", b"\0" * 50, b"[" * 20_000, b"{", b"7", b"[]", b'"x"', b"\xff\xfe", b"{" + b'"a": {' * 2000, b"null"]


def _json_values(name: str, rng: random.Random) -> Iterator[Case]:
    content = json.loads((DEMO / name).read_text())
    for key in content:
        for value in rng.sample(ABSURD, 4):
            text = json.dumps({**content, key: value})
            yield case(f"{name} {key}: {value!r:.30}", {name: text.encode()})


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for what, data in WEIGHTS.items():
        yield case(f"weights: {what}", {"lit_model.pth": data})
    whole = {name: (DEMO / name).read_bytes() for name in FILES}
    for name in FILES:
        yield case(f"no {name}", {name: None})
        for text in TEXTS:
            yield case(f"{name}: {text[:20]!r}", {name: text})
        for _ in range(12):
            cut = rng.randrange(len(whole[name]))
            yield case(f"{name} cut at {cut}", {name: whole[name][:cut]})
    for _ in range(60):  # in what describes the weights, and anywhere
        yield case("a bit of the weights", {"lit_model.pth": flipped(whole["lit_model.pth"], rng)})
        yield case("a bit before the weights", {"lit_model.pth": flipped(whole["lit_model.pth"], rng, 0, 4000)})
        yield case("a bit after the weights", {"lit_model.pth": flipped(whole["lit_model.pth"], rng, -8000)})
    for name in FILES[1:]:
        for _ in range(40):
            yield case(f"a bit of {name}", {name: flipped(whole[name], rng)})
    config = yaml.safe_load(whole["model_config.yaml"])
    for key in config:
        for value in rng.sample(ABSURD, 4):
            text = yaml.safe_dump({**config, key: value})
            yield case(f"{key}: {value!r:.30}", {"model_config.yaml": text.encode()})
    for name in ("tokenizer_config.json", "generation_config.json"):
        yield from _json_values(name, rng)
    for tag in TAGS:
        yield case(f"model_config.yaml {tag}", {"model_config.yaml": whole["model_config.yaml"] + f"x: {tag}".encode()})
    for text in STYLES:
        yield case(f"style {text[:60]!r}", {STYLE: text.encode()})
