"""Our classes in the place of litgpt's, in litgpt itself: its commands, fine-tuning, LoRA and adapters."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import litgpt.adapter
import litgpt.adapter_v2
import litgpt.lora  # noqa: F401  (loaded, so that their classes are found)
import litgpt.model as base
from litgpt_kv.compat.litgpt_modules import GPT, Block, CausalSelfAttention, MultiheadLatentAttention

OURS = {
    base.GPT: GPT,
    base.Block: Block,
    base.CausalSelfAttention: CausalSelfAttention,
    base.MultiheadLatentAttention: MultiheadLatentAttention,
}
"""Which class of litgpt gives way to which of ours."""


def install() -> ExitStack:
    """Puts our `GPT` and its parts wherever litgpt has its own, for the whole process.

    Every name in litgpt's modules then means ours, so `litgpt.LLM`, its commands and its fine-tuning use `GPT` of this
    package unchanged; LoRA's and the adapters' models derive from ours, with any of our caches. Names that other
    modules took from litgpt before stay what they are: call this first.

    Returns:
        What undoes it: `with install(): ...`, or `install().close()` later; ignored, it lasts. Models made in between
        stay ours, LoRA's and the adapters' do not.
    """
    undo = ExitStack()
    if base.GPT is GPT:  # it was done before, and whoever did it undoes it
        return undo
    _swap(OURS)
    undo.callback(_swap, {ours: theirs for theirs, ours in OURS.items()})
    return undo


def _swap(classes: dict[type, type]) -> None:
    """Replaces classes by name and as bases in all modules of litgpt."""
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "litgpt" and m is not None]:
        for name, value in list(vars(module).items()):
            if not isinstance(value, type):
                continue
            if value in classes:
                setattr(module, name, classes[value])
            elif value.__module__ == module.__name__ and not classes.keys().isdisjoint(value.__bases__):
                value.__bases__ = tuple(classes.get(one, one) for one in value.__bases__)
