"""What a library gives to be measured: its ways to run a model, each with a prefill and a decode step.

B rows · T tokens of a prompt · V vocabulary.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import KVCacheArgs


class Unable(Exception):
    """A library cannot run a job. The message says why, in one line."""


@dataclass(frozen=True)
class Job:
    """What all libraries run.

    Attributes:
        model: Our model; the others get its weights.
        lengths: Tokens of each row's prompt.
        new_tokens: The most tokens that a row decodes after its prompt.
        compiled: Whether ways with a compiled step are measured as well.
        budget: Of ways that evict: tokens, or a percentage of the longest row.
        gguf: For libraries that read GGUF: paths of files, or types in which the model's weights are written.
        folder: For files that a library needs. Other jobs with the same model find them there.
    """

    model: GPT
    lengths: tuple[int, ...]
    new_tokens: int
    compiled: bool = False
    budget: int | str = "25%"
    gguf: tuple[str, ...] = ()
    folder: Path = Path()

    @property
    def config(self) -> Config:
        return self.model.config

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The parameters of the model by name; int8 weights become float ones of the same value."""
        return float_state(self.model)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def ragged(self) -> bool:
        """Whether the rows have different lengths."""
        return len(set(self.lengths)) > 1

    @property
    def total(self) -> int:
        """The tokens that the longest row has at the end."""
        return max(self.lengths) + self.new_tokens

    @property
    def kept(self) -> int:
        """The budget in tokens."""
        return KVCacheArgs("h2o", self.budget).resolved(self.total).budget

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's activations, and of its weights if these are not quantized."""
        return self.model.transformer.wte.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in all layers, in the model's dtype."""
        config = self.config
        return 2 * config.n_layer * config.n_query_groups * config.head_size * self.dtype.itemsize


class Variant(ABC):
    """One way of a library to run the model.

    Attributes:
        name: Shown after the name of the library: "static cache, compiled".
        weights: The type of its weights, such as "float32".
        weight_bytes: Of the weights that a decode step reads.
        token_bytes: Of the cache, for each token that a step reads.
        twin: A variant whose prompts this one goes on with, because both use one cache and write the same into it.
            None: it reads its own.
    """

    name: str
    weights: str
    weight_bytes: int
    token_bytes: int
    twin: Variant | None = None

    @abstractmethod
    def prefill(self, prompts: list[Tensor]) -> Tensor | None:
        """Forget everything, and read a prompt (T,) int64 for each row: logits (B, V) after its last token.

        A library that tells no logits gives the most probable tokens (B,) int64, or None if it tells nothing.
        """

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor | None:
        """Read the next token of each row, (B,) int64: logits (B, V) after it, or as in `prefill`."""

    def follow(self) -> None:
        """Go on after the prompts that the twin has just read."""
        raise NotImplementedError(f"{self.name} has no twin.")

    def read_bytes(self, lengths: list[int]) -> int:
        """The bytes that a step must read, weights and cache, with `lengths` tokens in the rows."""
        return self.weight_bytes + self.token_bytes * sum(lengths)

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Free memory that Python does not free by itself."""


class Peer(ABC):
    """A library; it is built without arguments.

    Attributes:
        title: Its name as it writes it.
        packages: Names of modules that it needs, and the packages that have them.
    """

    title: ClassVar[str]
    packages: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def variants(self, job: Job) -> Iterator[Variant | Unable]:
        """Give the ways in which it runs the job; `Unable` in the place of one that it cannot run.

        Raises:
            Unable: If it cannot run the job in any way.
        """

    def check_installed(self) -> None:
        """Raise Unable if a package is missing."""
        missing = [package for module, package in self.packages.items() if find_spec(module) is None]
        if missing:
            raise Unable(f"not installed: pip install {' '.join(dict.fromkeys(missing))}")

    def versions(self) -> list[str]:
        """Name the packages that are installed, with their versions."""
        found = []
        for package in dict.fromkeys(self.packages.values()):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.append(f"{package} {metadata.version(package)}")
        return found


def name_of(dtype: torch.dtype) -> str:
    """Write a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def float_state(model: GPT) -> dict[str, Tensor]:
    """Return the parameters of a model by name; int8 weights become float ones of the same value."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dtype = model.transformer.wte.weight.dtype
    for name, layer in model.named_modules():
        if hasattr(layer, "dequantized"):
            for parameter in dict(layer.named_parameters(recurse=False)):
                if parameter not in ("weight", "bias"):
                    del state[f"{name}.{parameter}"]
            state[f"{name}.weight"] = layer.dequantized().to(dtype)
    return state


def step_bytes(model: torch.nn.Module, embedding: str = "wte") -> int:
    """The bytes of the parameters that a decode step reads: all but the table of embeddings."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if embedding not in name)
