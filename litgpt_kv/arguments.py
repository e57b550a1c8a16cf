"""Settings of a run, besides cache and sampling: when a text ends, how prompts are batched, and on which devices.

Each class is a group of command-line options and of YAML keys: a new field is a new option everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from litgpt_kv.config import shown

PREFILLS = ("min-length", "full")
MOST_NEW_TOKENS = 2**31 - 1
MOST_NODES = 4096
MOST_DEVICES = 1024  # on one machine


@dataclass(frozen=True)
class StoppingArgs:
    """When a text ends.

    Args:
        max_new_tokens: The most new tokens of a text.
        min_new_tokens: The fewest new tokens: before that, neither `stop` nor the end-of-text token counts.
        stop: A text that ends the output and is not part of it; for several, a list, or the option several times.
        ignore_eos: Continue after the end-of-text token.
    """

    max_new_tokens: int = 50
    min_new_tokens: int = 0
    stop: str | Sequence[str] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check_new_tokens(self.max_new_tokens, self.min_new_tokens)
        check_flag("ignore_eos", self.ignore_eos)
        texts = [self.stop] if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"stop must be a text of at least one character, or several, got {shown(self.stop)}.")

    @property
    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


@dataclass(frozen=True)
class RunArgs:
    """How prompts are read and batched.

    Args:
        batch_size: How many prompts run at a time; when one ends, the next starts. None: 8 for a file of prompts, else
            all.
        prefill: How prompts are read. "min-length": one pass over as many tokens as the budget allows, the rest in
            blocks or token by token. "full": one pass over the whole prompt, then eviction down to the budget.
        prefill_chunk: The tokens of a block, for the rest of a prompt after the first pass. None: blocks of a fixed
            size for strategies whose results do not depend on it (dense, window, sink), one token for others. With
            prefill "full": read prompts in passes of so many tokens; results are the same, with less memory.
        logprobs: Also return each new token and its log-probability.
    """

    batch_size: int | None = None
    prefill: str = "min-length"
    prefill_chunk: int | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "prefill_chunk"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, 2**31 - 1)
        if not isinstance(self.prefill, str) or self.prefill not in PREFILLS:
            raise ValueError(f"prefill must be one of {', '.join(PREFILLS)}, got {shown(self.prefill)}.")
        check_flag("logprobs", self.logprobs)


@dataclass(frozen=True)
class DeviceArgs:
    """Where a model runs, and in which precision.

    Args:
        precision: A precision of Lightning Fabric. None: 32-true on a CPU and bf16-true on a GPU.
        accelerator: cpu, cuda, mps, or auto.
        devices: Number of devices on each machine, or "auto" for all; more than one needs generate_strategy.
        num_nodes: Number of machines; each runs this command, under torchrun, SLURM or with Fabric's MASTER_ADDR and
            NODE_RANK.
        generate_strategy: How devices share the work: tensor_parallel (every layer split over all), sequential (layers
            split over the devices of one machine) or data_parallel (each has the whole model and some of the prompts).
        threads: Number of CPU threads. None: one for a small model, which more threads slow down; torch's
            default for others.
        quantize: Quantize the weights. int8: by torch's own operators, a scale an output channel. bnb.nf4, bnb.nf4-dq,
            bnb.fp4, bnb.fp4-dq or bnb.int8: with bitsandbytes, which needs an NVIDIA GPU.
        compile: Compile the decode step: it starts slower and runs faster. A note says when a step is compiled, and
            where compiled code is kept for later runs. On a CUDA device, steps are recorded as CUDA graphs, too.
        check_weights: Refuse weights that are NaN or infinite; this reads all weights once more.
    """

    precision: str | None = None
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    generate_strategy: str | None = None
    threads: int | None = None
    quantize: str | None = None
    compile: bool = False
    check_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("precision", "accelerator", "generate_strategy", "quantize"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "accelerator"):
                raise TypeError(f"{name} must be a name, got {shown(value)}.")
        if not (isinstance(self.devices, str) and self.devices == "auto"):
            most = max(16, 4 * cores()) if self.accelerator == "cpu" else MOST_DEVICES
            check_count("devices", self.devices, 1, most, "or auto")
        check_count("num_nodes", self.num_nodes, 1, MOST_NODES)
        if self.threads is not None:
            check_threads(self.threads)
        check_flag("compile", self.compile)
        check_flag("check_weights", self.check_weights)
        if self.many and self.quantize is not None:
            raise ValueError(
                "Quantized weights are for one device: leave out --devices, --num-nodes, --generate-strategy."
            )

    @property
    def many(self) -> bool:
        """Return whether the settings ask for several devices or processes."""
        return self.devices != 1 or self.num_nodes != 1 or self.generate_strategy is not None


class Without:
    """Mark fields that a command does not offer: `Annotated[RunArgs, Without("logprobs")]`."""

    def __init__(self, *names: str) -> None:
        self.names = names


def grouped(caller: str, settings: Mapping[str, Any], *groups: type) -> list[Any]:
    """Build several classes of arguments from one mapping of settings.

    Args:
        caller: The name of the calling function, for the message.
        settings: Values by name; other fields keep their defaults.
        groups: Dataclasses whose fields have different names.

    Raises:
        TypeError: If a setting is not a field of any class.
    """
    names = [[f.name for f in fields(group)] for group in groups]
    if unknown := [name for name in settings if not any(name in group_names for group_names in names)]:
        known = ", ".join(sorted(name for group_names in names for name in group_names))
        raise TypeError(f"{caller}() has no argument {unknown[0]!r}; it takes {known}.")
    return [
        group(**{k: settings[k] for k in settings if k in group_names}) for group, group_names in zip(groups, names)
    ]


def cores() -> int:
    """Return the number of CPU cores of this machine."""
    return os.cpu_count() or 1


def check_threads(value: Any) -> None:
    """Refuse more CPU threads than a machine can use; OpenMP kills the process if it cannot start them.

    Raises:
        ValueError: With the value and the limit.
    """
    check_count("threads", value, 1, max(64, 4 * cores()))


def check_count(name: str, value: Any, least: int, most: int, other: str = "") -> None:
    """Check that a value is a whole number from `least` to `most`.

    Raises:
        ValueError: With the name, the value and the limit.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number{' ' + other if other else ''}, got {shown(value)}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {shown(value)}.")


def check_new_tokens(most: Any, least: Any) -> None:
    """Check `max_new_tokens`, and that `min_new_tokens` is not greater.

    Raises:
        ValueError: With the name, the value and the limit.
    """
    check_count("max_new_tokens", most, 1, MOST_NEW_TOKENS)
    if isinstance(least, bool) or not isinstance(least, int) or not 0 <= least <= most:
        raise ValueError(f"min_new_tokens must be 0 to {most} (max_new_tokens), got {shown(least)}.")


def check_flag(name: str, value: Any) -> None:
    """Check that a value is True or False.

    Raises:
        ValueError: With the name and the value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}.")
