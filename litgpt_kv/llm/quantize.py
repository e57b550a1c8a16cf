"""How weights can be quantized while they are loaded: by torch's own operators, or by bitsandbytes, as litgpt does."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from lightning.fabric.plugins import BitsandbytesPrecision

from litgpt_kv.config import shown

QUANTIZERS = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8")
OWN = ("int8",)  # see `litgpt_kv.model.quantized`
DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "32-true": torch.float32}


def check_own(name: str, precision: str | None) -> None:
    """Check the precision of a model whose weights are quantized by one of `OWN`.

    Raises:
        ValueError: If it is a mixed or a float64 precision: products with such weights are in bfloat16.
    """
    if precision is not None and (not isinstance(precision, str) or precision not in DTYPES):
        raise ValueError(f"quantize {name!r} needs one of the precisions {', '.join(DTYPES)}, got {shown(precision)}.")


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
        raise ValueError(f"quantize must be one of {', '.join((*OWN, *QUANTIZERS))}, got {shown(name)}.")
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
