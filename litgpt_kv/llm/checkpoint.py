"""Load model, tokenizer and prompt style from a checkpoint folder in litgpt's layout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch

from litgpt import prompts
from litgpt.config import Config
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer
from litgpt.utils import extend_checkpoint_dir, fix_and_load_json
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import shown
from litgpt_kv.llm.check_config import read_config
from litgpt_kv.llm.check_weights import check_fit, check_memory, check_tables, read_weights
from litgpt_kv.llm.quantize import OWN, check_own, quantizer
from litgpt_kv.llm.safe_load import MAX_BYTES, one_line, read_json, read_text, read_yaml
from litgpt_kv.llm.turns import Turns
from litgpt_kv.model.quantized import head_inputs, to_int8
from litgpt_kv.registry import did_you_mean

DEMO = Path(__file__).parents[1] / "demo"
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
PRECISIONS = ("32-true", "bf16-true", "16-true", "64-true", "bf16-mixed", "16-mixed")

TURNS = f"{Turns.__module__}.{Turns.__name__}"
WEIGHTS = "lit_model.pth"
HUGGING_FACE = ("*.safetensors", "pytorch_model*.bin")  # weights that litgpt's converter reads
LONGEST_PATH = 250  # characters: every system accepts so many
MOST_TO_MEND = 10_000  # characters of broken JSON that litgpt may repair, in time that grows with their square
TOKENIZER_CONFIG: dict[str, tuple[type, ...]] = {  # what litgpt's tokenizer reads of tokenizer_config.json
    "tokenizer_class": (str,),
    "add_bos_token": (bool, type(None)),
    "bos_token": (str, type(None)),
    "eos_token": (str, type(None)),
}


def find(name: str | Path) -> Path:
    """Return the folder of a checkpoint: "demo" for the shipped one, else a path, or a path below `checkpoints/`.

    Raises:
        ValueError: If the folder or one of litgpt's files is missing; the message says which.
    """
    if str(name) == "demo":
        return DEMO
    where = f"There is no checkpoint folder {str(name)!r:.200} (nor checkpoints/{name!s:.200}); 'demo' is shipped."
    if not str(name).strip():
        raise ValueError(where)
    try:
        folder = extend_checkpoint_dir(Path(name))
        found, is_file = folder.is_dir(), folder.is_file()
    except (OSError, ValueError, IndexError) as error:  # too long, not a path, or ""
        raise ValueError(where) from error
    if is_file and folder.suffix.lower() == ".gguf":
        made = f"checkpoints/{folder.stem}"
        raise ValueError(f"{str(name)!r:.200} is a GGUF file; convert it: litgpt_kv convert_gguf {name} --out {made}")
    if not found:
        raise ValueError(f"{where}{did_you_mean(str(name), ['demo', *_folders_near(Path(name))])}")
    needed = {"lit_model.pth": ["lit_model.pth"], "model_config.yaml": ["model_config.yaml"]}
    needed["tokenizer.json or tokenizer.model"] = ["tokenizer.json", "tokenizer.model"]
    if missing := [label for label, files in needed.items() if not any((folder / f).is_file() for f in files)]:
        what = f"The folder {str(folder)!r} is not a litgpt checkpoint: it lacks {', '.join(missing)}."
        if not (folder / WEIGHTS).is_file() and any(any(folder.glob(pattern)) for pattern in HUGGING_FACE):
            what += f" It has weights as on the Hugging Face Hub; convert them: litgpt_kv convert_to_litgpt {folder}"
        raise ValueError(what)
    return folder


def _folders_near(path: Path) -> list[str]:
    """Return the names of checkpoint folders that a user may have meant, as the user would write them."""
    found: list[str] = []
    for parent, prefix in ((path.parent, path.parent), (Path("checkpoints") / path.parent, path.parent)):
        with contextlib.suppress(OSError, ValueError):
            found += [str(prefix / config.parent.name) for config in islice(parent.glob("*/model_config.yaml"), 1000)]
    with contextlib.suppress(OSError):
        nested = islice(Path("checkpoints").glob("*/*/model_config.yaml"), 1000)
        found += ["/".join(config.parts[-3:-1]) for config in nested]
    return found


def precision_for(precision: str | None, accelerator: str) -> str:
    """Check a precision; None becomes "32-true" on a CPU and "bf16-true" (or "16-true") on a GPU."""
    if precision is None:
        gpu = accelerator != "cpu" and torch.cuda.is_available()
        precision = "32-true" if not gpu else "bf16-true" if torch.cuda.is_bf16_supported() else "16-true"
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {shown(precision)}.")
    if not isinstance(accelerator, str) or accelerator not in ACCELERATORS:
        raise ValueError(f"accelerator must be one of {', '.join(ACCELERATORS)}, got {shown(accelerator)}.")
    return precision


def fabric_for(precision: str | None, accelerator: str = "auto", quantize: str | None = None) -> L.Fabric:
    """Build a Fabric for one device, in the precision of `precision_for` or with quantized weights."""
    if quantize in OWN:
        check_own(quantize, precision)
    elif quantize is not None:
        return L.Fabric(accelerator="cuda", devices=1, plugins=quantizer(quantize, precision, accelerator))
    precision = precision_for(precision, accelerator)
    try:
        return L.Fabric(accelerator=accelerator, devices=1, precision=precision)
    except Exception as error:  # Lightning raises different errors for different missing devices
        raise ValueError(f"accelerator {shown(accelerator)} cannot be used here: {one_line(error)}") from error


def load_config(folder: Path) -> Config:
    """Read and check the config of a checkpoint; see `check_config`."""
    return read_config(folder / "model_config.yaml")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's parameters by name; see `check_weights.read_weights`."""
    return read_weights(folder / WEIGHTS)


def load_model(
    folder: Path,
    config: Config,
    fabric: L.Fabric,
    quantize: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> GPT:
    """Load the model of a checkpoint onto the fabric's device, in its precision and in inference mode.

    Args:
        folder: The checkpoint. config: Its config. fabric: The device and the precision; see `fabric_for`.
        quantize: One of `quantize.OWN`: each layer is quantized when its weight is read from the file, so the float
            weights of no more than one layer are in memory. Other names are the fabric's business.
        on_progress: Called with the bytes of the weights that are loaded, and of all.

    Raises:
        ValueError: If the weights are damaged, do not fit the config, or are larger than a CPU's memory.
    """
    weights = load_weights(folder)
    parameters = check_fit(folder / WEIGHTS, config, weights)
    if fabric.device.type == "cpu":
        with fabric.init_tensor():
            size = 1 if quantize in OWN else torch.get_default_dtype().itemsize
            check_memory(config, parameters * size)
    with fabric.init_module(empty_init=True):
        model = GPT(config)  # on a CPU, memory that is never written is never taken
    if quantize in OWN:
        model.unquantized = to_int8(model, head_inputs(config, weights), empty=True)
    check_tables(model, folder / "model_config.yaml")
    try:
        with _reporting(model, weights, on_progress):
            model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"The weights in {folder / WEIGHTS} do not fit its model_config.yaml: {one_line(error)}"
        ) from error
    return model.eval()


@contextlib.contextmanager
def _reporting(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], on_progress: Callable[[int, int], None] | None
) -> Iterator[None]:
    """Report the bytes of weights while a state dict is loaded, module by module."""
    if on_progress is None:
        yield
        return
    total, done = sum(weight.nbytes for weight in weights.values()), 0

    def note(module: torch.nn.Module, state: Mapping[str, torch.Tensor], prefix: str, *_: Any) -> None:
        nonlocal done
        on_progress(done, total)  # before the weights of this module are copied
        done += sum(state[prefix + name].nbytes for name in module._parameters if prefix + name in state)

    handles = [module.register_load_state_dict_pre_hook(note) for module in model.modules()]
    try:
        yield
        on_progress(total, total)
    finally:
        for handle in handles:
            handle.remove()


def own_temperature(folder: Path) -> float:
    """Return the temperature in a checkpoint's generation_config.json, else litgpt's default, 0.8.

    Raises:
        ValueError: If the file is damaged.
    """
    value = generation_config(folder).get("temperature")
    return 0.8 if value is None else float(value)


def generation_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's generation_config.json; return {} if there is none.

    Raises:
        ValueError: If it is not JSON, even after litgpt has repaired its commas, or a value has the wrong type.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    text = read_text(path, MAX_BYTES)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            if len(text) > MOST_TO_MEND:
                raise error
            data = fix_and_load_json(text)
        except (ValueError, RecursionError) as unmended:
            raise ValueError(f"{path} cannot be read: {one_line(unmended)}.") from unmended
    if not isinstance(data, dict):
        raise ValueError(f"{path} cannot be read: it is not a mapping of settings.")
    value = data.get("temperature")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6):
        raise ValueError(f"{path} cannot be used: temperature must be a number of 0 or more, got {shown(value)}.")
    for name in ("bos_token_id", "eos_token_id"):
        ids = data.get(name)
        if not all(_is_token(i) for i in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
            raise ValueError(f"{path} cannot be used: {name} must be a token id, got {shown(ids)}.")
    return data


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def load_tokenizer(folder: Path) -> Tokenizer:
    """Check the files of the tokenizer, and load it with litgpt.

    Raises:
        ValueError: If a file is damaged; the message names it.
    """
    if len(str(folder)) > LONGEST_PATH or "\0" in str(folder):
        raise ValueError(f"There is no folder {shown(str(folder))} with a tokenizer.")
    generation_config(folder)
    path = folder / "tokenizer_config.json"
    if path.exists():
        data = read_json(path)
        if not isinstance(data, dict):
            raise ValueError(f"{path} cannot be read: it is not a mapping of settings.")
        for name, kinds in TOKENIZER_CONFIG.items():
            value = data.get(name)
            value = value.get("content") if isinstance(value, dict) and name.endswith("_token") else value
            if not isinstance(value, kinds):
                raise ValueError(f"{path} cannot be used: {name} cannot be {shown(value)}.")
    try:
        tokenizer = Tokenizer(folder)
    except BaseException as error:  # a panic in the Rust library is a BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"The tokenizer in {str(folder)!r} cannot be read: {one_line(error)}") from error
    for name in ("bos_id", "eos_id"):  # may be a list; in Llama 3's, the base model's token is first
        value = getattr(tokenizer, name)
        if isinstance(value, list):
            setattr(tokenizer, name, value[0] if value else None)
    return tokenizer


def load_prompt(folder: Path, config: Config) -> PromptStyle:
    """Return the prompt style in a checkpoint's `prompt_style.yaml`, else the one for the name of its config.

    litgpt's loader imports any module and calls any name in it; this one knows litgpt's own style classes, and `Turns`
    with its texts beside it.

    Raises:
        ValueError: If the file names another style, or its texts are not texts.
    """
    path = folder / "prompt_style.yaml"
    if not path.exists():
        return PromptStyle.from_config(config)
    data = read_yaml(path)
    if isinstance(data, dict) and data.get("class_path") == TURNS:
        try:
            return Turns.of(data.get("turns"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}.") from error
    module, _, name = str(data.get("class_path") if isinstance(data, dict) else data).rpartition(".")
    found = vars(prompts).get(name) if module == prompts.__name__ else None
    if not (isinstance(found, type) and issubclass(found, PromptStyle) and found is not PromptStyle):
        raise ValueError(
            f"{path} must name a prompt style of litgpt, as 'class_path: litgpt.prompts.Alpaca' does, got "
            f"{shown(data)}; other styles are code: set them in Python, as llm.prompt_style."
        )
    return found()
