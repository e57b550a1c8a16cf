"""Quantize weights while they are loaded, as litgpt does, with Lightning's plugin for bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from lightning.fabric.plugins import BitsandbytesPrecision

from litgpt_kv.config import shown

QUANTIZERS = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8")
DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "32-true": torch.float32}


def quantizer(name: str, precision: str | None, accelerator: str) -> BitsandbytesPrecision:
    """Build the plugin for one of `QUANTIZERS`.

    Args:
        name: "bnb." and the format of the quantized weights.
        precision: The precision of the computation; None: the plugin's default, float16 for int8, else bfloat16 if the
            GPU supports it.
        accelerator: Must be an NVIDIA GPU.

    Raises:
        ValueError: If the plugin cannot run; the message says what is missing.
    """
    if not isinstance(name, str) or name not in QUANTIZERS:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZERS)}, got {shown(name)}.")
    if precision is not None and (not isinstance(precision, str) or precision not in DTYPES):
        raise ValueError(f"quantize {name!r} needs one of the precisions {', '.join(DTYPES)}, got {shown(precision)}.")
    if name == "bnb.int8" and precision not in (None, "16-true"):
        raise ValueError(f"quantize 'bnb.int8' needs precision 16-true, got {shown(precision)}.")
    wants_gpu = accelerator in ("auto", "cuda", "gpu")
    if not wants_gpu or not torch.cuda.is_available():
        problem = "this machine has none" if wants_gpu else f"accelerator is {accelerator!r:.60}"
        raise ValueError(f"quantize {name!r} needs an NVIDIA GPU; {problem}.")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize {name!r} needs the package bitsandbytes: pip install 'litgpt-kv[quantize]'.")
    return BitsandbytesPrecision(name.removeprefix("bnb."), DTYPES.get(precision or ""))
