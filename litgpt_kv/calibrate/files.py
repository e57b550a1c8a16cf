"""Calibration files: see `litgpt_kv.cache.calibration` for the format and for how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from litgpt_kv.cache.calibration import FORMAT
from litgpt_kv.disk import replacing


def write_calibration(path: str | Path, strategy: str, tensors: Mapping[str, Tensor], model: str = "") -> None:
    """Write what a strategy needs to know of a model.

    Args:
        path: The file.
        strategy: The strategy's name.
        tensors: `layers.{i}.{name}`, whose first dimension is the query heads.
        model: The model's name, for people.

    Raises:
        ValueError: If the file cannot be written.
    """
    try:
        with replacing(path) as beside:
            save_file(dict(tensors), str(beside), {"format": FORMAT, "for": strategy, "model": model})
    except SafetensorError as error:  # a full disk
        raise ValueError(f"{path} cannot be written: {error}") from error
