"""From a name or a folder to a model, a tokenizer and a prompt style: litgpt's checkpoint layout. Floor 6."""

from __future__ import annotations

import json
import pickle
import textwrap
from pathlib import Path

import lightning as L
import torch
import yaml

from litgpt import prompts
from litgpt.config import Config
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from litgpt.utils import extend_checkpoint_dir
from litgpt_kv.llm.quantize import quantizer
from litgpt_kv.llm.safe_load import read_yaml, shorten
from litgpt_kv.model.gpt import GPT

DEMO = Path(__file__).parents[1] / "demo"
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
PRECISIONS = ("32-true", "bf16-true", "16-true", "64-true", "bf16-mixed", "16-mixed")


def find(name: str | Path) -> Path:
    """The folder of a checkpoint: "demo" is the shipped one; otherwise a path, or a path below `checkpoints/`.

    Raises:
        ValueError: If the folder or one of litgpt's files is missing; the message says which.
    """
    if str(name) == "demo":
        return DEMO
    folder = extend_checkpoint_dir(Path(name))
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint folder {str(name)!r} (nor checkpoints/{name}); 'demo' is shipped.")
    needed = {"lit_model.pth": ["lit_model.pth"], "model_config.yaml": ["model_config.yaml"]}
    needed["tokenizer.json or tokenizer.model"] = ["tokenizer.json", "tokenizer.model"]
    if missing := [what for what, files in needed.items() if not any((folder / f).is_file() for f in files)]:
        raise ValueError(f"The folder {str(folder)!r} is no litgpt checkpoint: it lacks {', '.join(missing)}.")
    return folder


def precision_for(precision: str | None, accelerator: str) -> str:
    """None is "32-true" on a CPU, else what the device does best: "bf16-true" or "16-true"; other names are checked."""
    if precision is None:
        gpu = accelerator != "cpu" and torch.cuda.is_available()
        precision = "32-true" if not gpu else "bf16-true" if torch.cuda.is_bf16_supported() else "16-true"
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if accelerator not in ACCELERATORS:
        raise ValueError(f"accelerator must be one of {', '.join(ACCELERATORS)}, got {accelerator!r}.")
    return precision


def fabric_for(precision: str | None, accelerator: str = "auto", quantize: str | None = None) -> L.Fabric:
    """One device, in the precision that `precision_for` gives or with quantized weights."""
    if quantize is not None:
        return L.Fabric(accelerator="cuda", devices=1, plugins=quantizer(quantize, precision, accelerator))
    precision = precision_for(precision, accelerator)
    try:
        return L.Fabric(accelerator=accelerator, devices=1, precision=precision)
    except Exception as error:  # Lightning's error for a device that is not there differs by device
        raise ValueError(f"accelerator {accelerator!r} cannot be used here: {first_line(error)}") from error


def load_config(folder: Path) -> Config:
    try:
        return Config.from_file(folder / "model_config.yaml")
    except (yaml.YAMLError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'model_config.yaml'} cannot be read: {first_line(error)}") from error


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's parameters by name, mapped from the file: only what is used of them is read."""
    path = folder / "lit_model.pth"
    try:
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read, it may be corrupt: {first_line(error)}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{path} cannot be read, it may be corrupt: it holds no weights by name.")
    return weights.get("model", weights)


def load_model(folder: Path, config: Config, fabric: L.Fabric) -> GPT:
    """The model with a checkpoint's weights, on the fabric's device in its precision, ready for inference."""
    weights = read_weights(folder)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"The weights in {folder / 'lit_model.pth'} do not fit its model_config.yaml: {first_line(error)}"
        ) from error
    return model.eval()


def own_temperature(folder: Path) -> float:
    """The temperature that a checkpoint's generation_config.json recommends, else litgpt's 0.8."""
    try:
        value = json.loads((folder / "generation_config.json").read_text()).get("temperature")
    except (OSError, ValueError, AttributeError):  # litgpt's tokenizer reads the file, too, and mends what it can
        value = None
    return float(value) if isinstance(value, (int, float)) else 0.8


def load_tokenizer(folder: Path) -> Tokenizer:
    try:
        return Tokenizer(folder)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise ValueError(f"The tokenizer in {str(folder)!r} cannot be read: {first_line(error)}") from error


def load_prompt(folder: Path, config: Config) -> PromptStyle:
    """The prompt style that a checkpoint's `prompt_style.yaml` names, else the one that its config's name implies.

    litgpt's loader imports any module and calls any name in it; this one knows litgpt's own style classes only.

    Raises:
        ValueError: If the file names no style of litgpt.
    """
    path = folder / "prompt_style.yaml"
    if not path.exists():
        return PromptStyle.from_config(config)
    data = read_yaml(path)
    module, _, name = str(data.get("class_path") if isinstance(data, dict) else data).rpartition(".")
    found = vars(prompts).get(name) if module == prompts.__name__ else None
    if not (isinstance(found, type) and issubclass(found, PromptStyle) and found is not PromptStyle):
        raise ValueError(
            f"{path} must name a prompt style of litgpt, as 'class_path: litgpt.prompts.Alpaca' does, got "
            f"{shorten(data)}; other styles are code: set them in Python, as llm.prompt_style."
        )
    return found()


def first_line(error: BaseException) -> str:
    """The first sentence of an error's message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(text.partition(". ")[0], 200)
