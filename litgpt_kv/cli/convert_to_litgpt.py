"""`litgpt_kv convert_to_litgpt`: litgpt's converter, with the config checked against the folder before and after."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litgpt.config import name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.utils import extend_checkpoint_dir
from litgpt_kv.config import shown
from litgpt_kv.convert.hugging_face import check_sizes, config_of, same_sizes
from litgpt_kv.llm.check_weights import check_fit, read_weights
from litgpt_kv.llm.checkpoint import WEIGHTS, load_config
from litgpt_kv.llm.safe_load import read_json
from litgpt_kv.registry import did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


def convert_to_litgpt(
    checkpoint_dir: Path, *, model_name: str | None = None, dtype: str | None = None, debug_mode: bool | None = False
) -> None:
    """Convert a folder from the Hugging Face Hub to a litgpt checkpoint, in the same folder.

    The folder has config.json, weights (.safetensors or .bin) and a tokenizer. If litgpt names no config of these
    sizes, the config is made of config.json's numbers (llama, mistral, qwen2 and qwen3).

    Args:
        checkpoint_dir: The folder; a path below `checkpoints/` is found, too.
        model_name: The name of the config. By default the folder's name, else the config whose sizes are those of
            config.json.
        dtype: The dtype of the weights: float32, bfloat16 or float16. By default the file's own.
        debug_mode: Print each layer instead of a progress bar.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(dtype)}.")
    folder = extend_checkpoint_dir(Path(checkpoint_dir))
    name, named = model_name or folder.name, None
    if not folder.is_dir():
        unknown = "" if name in name_to_config else f", and {name!r} is not a supported config name"
        raise ValueError(f"There is no folder {str(checkpoint_dir)!r:.200} to convert{unknown}.")
    config_file = folder / "config.json"
    data = read_json(config_file) if config_file.is_file() else None
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"{config_file} cannot be used: it is not a mapping of settings.")
    if name not in name_to_config:
        if model_name is not None or data is None:
            hint = did_you_mean(name, name_to_config)
            raise ValueError(f"{name!r} is not a supported config name.{hint} --model-name takes a name of litgpt's.")
        name, named = config_of(data, folder.name)
    elif data is not None:
        check_sizes(data, name_to_config[name], str(config_file), name)
    new = [path for path in (folder / WEIGHTS, folder / "model_config.yaml") if not path.exists()]
    try:
        with _known(name, named):
            convert_hf_checkpoint(folder, model_name=name, dtype=dtype, debug_mode=debug_mode)
        _check(folder, name, data)
    except BaseException:  # half a checkpoint would look like one
        for path in new:
            path.unlink(missing_ok=True)
        raise
    source = f"litgpt's {name}" if named is None else f"made of {config_file}"
    print(f"The config is {source}. Try: litgpt_kv chat {folder}", file=sys.stderr)


def _check(folder: Path, name: str, data: dict[str, Any] | None) -> None:
    """Check the weights that were written against the config.

    Raises:
        ValueError: If they do not fit; the message has the names of configs of the right sizes.
    """
    try:
        check_fit(folder / WEIGHTS, load_config(folder), read_weights(folder / WEIGHTS))
    except ValueError as error:
        others = [] if data is None else same_sizes(data)
        hint = f" Configs of these sizes: {', '.join(others[:5])}." if others else ""
        raise ValueError(f"{error} The config {name!r} is another model's.{hint}") from error


@contextlib.contextmanager
def _known(name: str, config: dict[str, object] | None) -> Iterator[None]:
    """Let litgpt's converter find a config by its name, which is all that it takes."""
    if config is None:
        yield
        return
    name_to_config[name] = config
    try:
        yield
    finally:
        del name_to_config[name]
