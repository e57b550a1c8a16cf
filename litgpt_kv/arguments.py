"""What a user chooses beside a cache and sampling: when a text ends, how a run is batched, and where it runs.

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
MOST_DEVICES = 1024  # of one machine


@dataclass(frozen=True)
class StoppingArgs:
    """When a text ends.

    Args:
        max_new_tokens: The most new tokens of a text.
        min_new_tokens: The end of the model's text and `stop` count only after so many.
        stop: A text that ends the output and is not part of it; on the command line, give the option several times for
            several.
        ignore_eos: Go on when the model ends its text.
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
        batch_size: Prompts at a time; one that ends makes room for the next. None: 8 for a file of prompts, else all.
        prefill: How prompts are read: "min-length", each in one pass as far as the budget allows and then in blocks or
            token by token; or "full", each in one pass and then compressed to the budget.
        prefill_chunk: Read what prompts have beyond the first pass in blocks of so many tokens; None: in blocks for
            strategies whose results do not depend on it (dense, window, sink), one at a time for others. With prefill
            "full": read prompts in passes of so many tokens, which give what one pass gives and need less memory.
        logprobs: Also give each new token and its log-probability.
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
        precision: Lightning Fabric's name; None: 32-true on a CPU and bf16-true on a GPU.
        accelerator: cpu, cuda, mps, or auto.
        devices: How many devices on each machine, or "auto" for all; more than one needs generate_strategy.
        num_nodes: How many machines; each runs this command, under torchrun, SLURM or with Fabric's MASTER_ADDR and
            NODE_RANK.
        generate_strategy: How devices share the work: tensor_parallel (every layer over all), sequential (layers over
            the devices of one machine) or data_parallel (the whole model on each, and some of the prompts).
        threads: CPU threads; None: one for a small model, whose steps are over before a second one has begun, and
            torch's own choice for others.
        quantize: Quantize the weights with bitsandbytes, which needs an NVIDIA GPU: bnb.nf4, bnb.nf4-dq, bnb.fp4,
            bnb.fp4-dq or bnb.int8.
        compile: Compile the decode step: slow to start, fast to run.
        check_weights: Refuse weights that are NaN or infinite: one more pass over them.
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
        """Whether more than one process or device is asked for."""
        return self.devices != 1 or self.num_nodes != 1 or self.generate_strategy is not None


class Without:
    """In `Annotated[RunArgs, Without("logprobs")]`: fields of the class that a command does not offer."""

    def __init__(self, *names: str) -> None:
        self.names = names


def grouped(caller: str, settings: Mapping[str, Any], *groups: type) -> list[Any]:
    """Settings by name, divided among classes of arguments that have them as fields.

    Args:
        caller: The function that was given them, for the message.
        settings: Values by name; what is not given keeps its class' default.
        groups: Dataclasses whose fields have different names.

    Raises:
        TypeError: If no class has a setting.
    """
    names = [[f.name for f in fields(group)] for group in groups]
    if unknown := [name for name in settings if not any(name in own for own in names)]:
        known = ", ".join(sorted(name for own in names for name in own))
        raise TypeError(f"{caller}() has no argument {unknown[0]!r}; it takes {known}.")
    return [group(**{k: v for k, v in settings.items() if k in own}) for group, own in zip(groups, names)]


def cores() -> int:
    """The CPU cores of this machine."""
    return os.cpu_count() or 1


def check_threads(value: Any) -> None:
    """Refuse more CPU threads than a machine can use: OpenMP ends the process when it cannot start them.

    Raises:
        ValueError: With the value and the limit.
    """
    check_count("threads", value, 1, max(64, 4 * cores()))


def check_count(name: str, value: Any, least: int, most: int, other: str = "") -> None:
    """Refuse what is no whole number from `least` to `most`.

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
    """Refuse what is no `max_new_tokens` with a `min_new_tokens` up to it.

    Raises:
        ValueError: With the name, the value and the limit.
    """
    check_count("max_new_tokens", most, 1, MOST_NEW_TOKENS)
    if isinstance(least, bool) or not isinstance(least, int) or not 0 <= least <= most:
        raise ValueError(f"min_new_tokens must be 0 to {most} (max_new_tokens), got {shown(least)}.")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: With the name and the value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}.")
