"""Read a checkpoint's weights, and check names, shapes and sizes before memory is allocated; on request the values."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt_kv.config import shown
from litgpt_kv.llm.safe_load import one_line
from litgpt_kv.model.gpt import GPT
from litgpt_kv.parallel.weights import full_shapes, names_in

SLACK = 1_000_000  # bytes of tolerance for small files


def read_weights(path: Path) -> dict[str, Tensor]:
    """Map a checkpoint's file into memory, and return its parameters by name.

    Raises:
        ValueError: If the file is damaged, or has anything else than weights by name.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:  # torch does not compress, so a file that expands is malicious
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError("its parts are larger than the file")
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except MemoryError as error:
        raise ValueError(f"{path} cannot be read, it may be corrupt: it needs too much memory.") from error
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise ValueError(f"{path} cannot be read, it may be corrupt: {one_line(error)}") from error
    weights = weights.get("model", weights) if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} cannot be read, it may be corrupt: it is not a mapping of weights by name.")
    total = 0
    for name, weight in weights.items():
        if not isinstance(name, str) or not _is_plain(weight):
            raise ValueError(f"{path} cannot be used: {shown(name)} is not a floating-point tensor.")
        total += weight.nbytes
    if total > 2 * size + SLACK:  # tied weights have two names and are stored once
        raise ValueError(f"{path} cannot be used: it declares {total:,} bytes of weights and has {size:,}.")
    return weights


def _is_plain(weight: object) -> bool:
    """Return whether a value is a dense floating-point tensor whose elements are all in the file."""
    if not isinstance(weight, Tensor) or weight.layout is not torch.strided or weight.is_meta:
        return False
    stored = weight.untyped_storage().nbytes() - weight.storage_offset() * weight.element_size()
    return weight.is_floating_point() and weight.nbytes <= stored


def check_fit(path: Path, config: Config, weights: Mapping[str, Tensor]) -> int:
    """Check that the weights have the names and shapes of the config.

    Returns:
        The number of parameters.

    Raises:
        ValueError: If a weight is missing, unknown or of another shape, or the config's sizes contradict each other.
    """
    where = f"The weights in {path} do not fit its model_config.yaml"
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    if len(layers) != config.n_layer:  # checked first, before n_layer layers are built
        raise ValueError(f"{where}: they have {len(layers):,} layers, n_layer is {config.n_layer:,}.")
    try:
        shapes = full_shapes(config)
    except Exception as error:  # which error it is depends on litgpt's module
        raise ValueError(f"{path.parent / 'model_config.yaml'} cannot be used: {one_line(error)}") from error
    try:
        names_in(shapes, weights)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return sum(shape.numel() for shape in shapes.values())


def check_memory(config: Config, weight_bytes: int) -> None:
    """Refuse a model that is larger than this machine's memory; the system would kill the process.

    Raises:
        ValueError: With both sizes.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tables = 2 * 4 * config.block_size * config.rope_n_elem  # cosines and sines in float32
    if weight_bytes + tables > memory:
        need = f"{weight_bytes / 1e9:,.1f} GB of weights and {tables / 1e9:,.1f} GB of rotary tables (block_size "
        raise ValueError(f"The model needs {need}{config.block_size:,}); this machine has {memory / 1e9:,.1f} GB.")


def check_finite(named: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Check that all weights are finite, in one pass over them.

    Raises:
        ValueError: With the name of the first weight that is not, and the number of NaN and infinite values.
    """
    for name, weight in named:
        # a sum is fast, and not finite if an element is not; but it may overflow, so then the elements are counted
        if not weight.is_floating_point() or weight.sum(dtype=torch.float32).isfinite():
            continue
        if bad := int((~weight.isfinite()).sum()):
            raise ValueError(f"{where}: {name!r} has {bad:,} of {weight.numel():,} values that are not finite.")


def check_tables(model: GPT, path: Path) -> None:
    """Refuse rotary tables with NaN or infinity, which come from wrong rope settings.

    Raises:
        ValueError: With the path of the config.
    """
    if not (model.cos.sum() + model.sin.sum()).isfinite():
        raise ValueError(f"{path} cannot be used: its rope settings give positions that are not finite.")
