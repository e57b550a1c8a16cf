"""Which strategies a test runs, and with which options; nothing is listed by name.

Every registered strategy is in `NAMES`. `FEW` has one of each sort, for tests of what strategies hardly touch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from litgpt.config import Config
from litgpt_kv import Strategy, registry
from litgpt_kv.cache.calibration import FORMAT
from litgpt_kv.cache.spec import layer_spec

SMALL = 3  # instead of counts that are larger than tests' caches
FOLDER = tempfile.TemporaryDirectory(prefix="litgpt_kv_calibrations_")


def plain(name: str) -> Strategy:
    """A strategy with its default options."""
    return registry.build("strategy", name)


def first_of_each(names: list[str], sort: Any) -> list[str]:
    """The first name of each sort, in order."""
    found: dict[Any, str] = {}
    for name in names:
        found.setdefault(sort(plain(name)), name)
    return sorted(found.values())


NAMES = registry.names("strategy")
READY = [name for name in NAMES if "calibration" not in plain(name).needs]
FEW = first_of_each(READY, lambda s: (s.evicts, s.recency, s.positions, "keys" in s.needs, "queries" in s.needs))
ONE_OF_NEEDS = first_of_each(NAMES, lambda s: (s.evicts, s.recency, s.needs))
THREE = first_of_each(  # one that goes by position, one by statistics, one that reads keys
    [n for n in READY if plain(n).evicts and plain(n).needs <= {"keys"}],
    lambda s: (s.recency, bool(s.needs)),
)


def options_of(name: str, config: Config) -> dict[str, Any]:
    """Options with which a strategy has something to do in a small cache; a random calibration where it needs one."""
    found = {}
    for f in dataclasses.fields(registry.get("strategy", name)):
        if isinstance(f.default, int) and not isinstance(f.default, bool) and f.default > SMALL:
            found[f.name] = SMALL
    if "calibration" in plain(name).needs:
        found["calibration"] = calibration_of(name, config)
    return found


def calibration_of(name: str, config: Config) -> str:
    """A file of random numbers for a model of this config."""
    path = Path(FOLDER.name) / f"{name}-{hashlib.sha256(repr(config).encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        generator, tensors = torch.Generator().manual_seed(3), {}
        for index in range(config.n_layer):
            spec = layer_spec(config, index)
            for leaf, shape in registry.get("strategy", name).calibration_shapes(spec).items():
                tensors[f"layers.{index}.{leaf}"] = torch.rand(spec.heads, *shape, generator=generator)
        save_file(tensors, path, {"format": FORMAT, "for": name})
    return str(path)
