"""Replace litgpt's classes by ours in litgpt's own modules: for its commands, fine-tuning, LoRA and adapters."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import litgpt.adapter
import litgpt.adapter_v2
import litgpt.lora  # noqa: F401  (imported, so that `_swap` finds their classes)
import litgpt.model as base
from litgpt_kv.compat.litgpt_modules import GPT, Block, CausalSelfAttention, MultiheadLatentAttention

OURS = {
    base.GPT: GPT,
    base.Block: Block,
    base.CausalSelfAttention: CausalSelfAttention,
    base.MultiheadLatentAttention: MultiheadLatentAttention,
}
"""Maps each class of litgpt to the class that replaces it."""


def install() -> ExitStack:
    """Replace litgpt's `GPT` and its parts by ours, in all of litgpt's modules, for the whole process.

    `litgpt.LLM`, litgpt's commands and its fine-tuning then use our `GPT`. The models of LoRA and the adapters derive
    from ours, and can use all our caches. Call this first: other modules that have imported litgpt's classes before
    keep these.

    Returns:
        A context manager that undoes the replacement: `with install(): ...`, or `install().close()` later. Models that
        were built in between keep our classes, except those of LoRA and the adapters.
    """
    undo = ExitStack()
    if base.GPT is GPT:  # already installed: the first call undoes it
        return undo
    _swap(OURS)
    undo.callback(_swap, {ours: litgpts for litgpts, ours in OURS.items()})
    return undo


def _swap(classes: dict[type, type]) -> None:
    """Replace classes in all modules of litgpt, as names and as base classes."""
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "litgpt" and m is not None]:
        for name, value in list(vars(module).items()):
            if not isinstance(value, type):
                continue
            if value in classes:
                setattr(module, name, classes[value])
            elif value.__module__ == module.__name__ and not classes.keys().isdisjoint(value.__bases__):
                value.__bases__ = tuple(classes.get(cls, cls) for cls in value.__bases__)
