"""Calibration files: what was measured of a model for a strategy, or for the budgets of its layers.

A file is in safetensors' format. Its metadata have "format" (`FORMAT`) and "for", a strategy's name or "budgets"; its
tensors are `layers.{i}.{name}`, float32, and their first dimension is the query heads H of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable

from safetensors import safe_open
from torch import Tensor

FORMAT = "litgpt_kv calibration 1"


def read_tensors(path: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a calibration file.

    Raises:
        ValueError: If it has another format, lacks a tensor, or has numbers that are not finite.
        OSError, SafetensorError: If it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it was not written by this version ({FORMAT!r})")
        found = {}
        for name in names:
            if name not in file.keys():  # noqa: SIM118
                raise ValueError(f"it has no {name}: it was made for {metadata.get('for')!r} or another model")
            found[name] = file.get_tensor(name)
            if not found[name].is_floating_point() or not found[name].isfinite().all():
                raise ValueError(f"{name} has values that are not finite")
        return found
