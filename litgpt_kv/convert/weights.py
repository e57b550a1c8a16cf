"""`lit_model.pth` from the tensors of a GGUF file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from tqdm import tqdm

from litgpt.config import Config
from litgpt.utils import incremental_save
from litgpt_kv.config import shown
from litgpt_kv.convert.gguf_file import GGUFFile
from litgpt_kv.parallel.weights import full_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIXTEEN = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
UNUSED = {"rope_freqs.weight"}  # `configs` reads it
OUTER = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
    "lm_head.bias": "output.bias",
}
INNER = {  # of a layer, without .weight and .bias
    "norm_1": "attn_norm",
    "norm_2": "ffn_norm",
    "attn.proj": "attn_output",
    "attn.norm_q": "attn_q_norm",
    "attn.norm_k": "attn_k_norm",
    "post_attention_norm": "post_attention_norm",
    "post_mlp_norm": "post_ffw_norm",
    "mlp.fc": "ffn_up",
    "mlp.fc_1": "ffn_gate",
    "mlp.fc_2": "ffn_up",
    "mlp.proj": "ffn_down",
}


@dataclass(frozen=True)
class Source:
    """Rows of a tensor in the file that become rows of a weight.

    Attributes:
        name: The tensor's. first, rows: Which of its rows; None: all. heads: Of how many heads the two halves of each
            rotated pair stand side by side (GGUF's order for Llama) and are taken apart again; 0: none.
    """

    name: str
    first: int = 0
    rows: int | None = None
    heads: int = 0


def sources(file: GGUFFile, arch: str, config: Config, weight: str) -> list[Source]:
    """Where the rows of one of litgpt's weights come from, in order."""
    if weight == "lm_head.weight" and "output.weight" not in file.tensors:
        return [Source("token_embd.weight")]
    if weight in OUTER:
        return [Source(OUTER[weight])]
    _, _, layer, *inner, kind = weight.split(".")
    module, prefix = ".".join(inner), f"blk.{layer}"
    if module == "attn.qkv":
        if f"{prefix}.attn_qkv.{kind}" in file.tensors:
            return [Source(f"{prefix}.attn_qkv.{kind}")]
        heads = {"q": config.n_head, "k": config.n_query_groups, "v": 0}
        return [Source(f"{prefix}.attn_{x}.{kind}", heads=n if arch == "llama" else 0) for x, n in heads.items()]
    if module in ("mlp.fc_1", "mlp.fc_2") and f"{prefix}.ffn_gate.{kind}" not in file.tensors:
        half = config.intermediate_size  # Phi 3 has both in one
        return [Source(f"{prefix}.ffn_up.{kind}", 0 if module == "mlp.fc_1" else half, half)]
    return [Source(f"{prefix}.{INNER[module]}.{kind}")]


def plan_weights(file: GGUFFile, arch: str, config: Config) -> dict[str, list[Source]]:
    """The sources of all of litgpt's weights.

    Raises:
        ValueError: If the file lacks a tensor, has one of another shape, or has one that litgpt's model does not have.
    """
    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if len(layers) != config.n_layer:  # before so many layers are made
        raise ValueError(f"it has tensors of {len(layers):,} layers, and its metadata say {config.n_layer:,}")
    plan, used = {}, set(UNUSED)
    shapes = full_shapes(config)
    for weight, parameter in shapes.items():
        shape = tuple(parameter.shape)
        plan[weight] = sources(file, arch, config, weight)
        rows = 0
        for source in plan[weight]:
            tensor = file.tensors.get(source.name)
            if tensor is None:
                raise ValueError(f"it lacks the tensor {source.name!r}")
            count = tensor.shape[0] if source.rows is None else source.rows
            if source.first + count > tensor.shape[0] or tensor.shape[1:] != shape[1:]:
                raise ValueError(f"{source.name!r} has the shape {tensor.shape}, which does not fit its metadata")
            rows += count
            used.add(source.name)
        if rows != shape[0]:
            names = ", ".join(repr(source.name) for source in plan[weight])
            raise ValueError(f"{names} have {rows:,} rows, and its metadata say {shape[0]:,}")
    if more := sorted(file.tensors.keys() - used):
        raise ValueError(f"it has the tensor {shown(more[0])}, which litgpt's model lacks")
    return plan


def read_weight(file: GGUFFile, arch: str, parts: list[Source], dtype: torch.dtype) -> Tensor:
    """One of litgpt's weights, on the CPU.

    Raises:
        ValueError: If a tensor cannot be dequantised or is not finite.
    """
    pieces = []
    for source in parts:
        tensor = file.tensors[source.name]
        flat = len(tensor.shape) == 1
        out = torch.empty(tensor.shape, dtype=dtype)
        for first, rows in file.blocks(tensor):
            block = torch.from_numpy(rows.reshape(-1) if flat else rows)
            if flat and arch.startswith("gemma"):  # norms alone are 1-D there
                block = block - 1.0  # GGUF has 1 + weight
            (out if flat else out[first : first + len(block)]).copy_(block)
        out = out[source.first :][: source.rows] if source.rows is not None else out
        if source.heads:  # (heads, pairs, 2, ...) -> (heads, 2, pairs, ...)
            size = out.shape[0] // source.heads
            out = out.view(source.heads, size // 2, 2, -1).transpose(1, 2).reshape(out.shape)
        pieces.append(out)
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)


def choose_dtype(file: GGUFFile, name: str | None) -> torch.dtype:
    """The type of the weights to write; None: 16 bits where the file's matrices all are of one such type, else float32.

    Raises:
        ValueError: For another name.
    """
    if name is None:
        kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
        return SIXTEEN.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(name)}.")
    return DTYPES[name]


def write_weights(
    file: GGUFFile, arch: str, config: Config, plan: Mapping[str, list[Source]], path: Path, dtype: torch.dtype
) -> int:
    """Write the weights, one at a time; a tied head is stored once. Returns the bytes written.

    Raises:
        ValueError: If the disk lacks room, or for what `read_weight` refuses.
    """
    tied = "output.weight" not in file.tensors
    shapes = full_shapes(config)
    need = sum(shape.numel() for name, shape in shapes.items() if not (tied and name == "lm_head.weight"))
    need *= dtype.itemsize
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise ValueError(f"{need / 1e9:,.1f} GB of weights do not fit the {free / 1e9:,.1f} GB that the disk has free")
    state = {}
    with incremental_save(path) as saver:
        names = [name for name in plan if not (tied and name == "lm_head.weight")]
        for name in tqdm(names, desc="Weights", unit="", disable=None, leave=False):
            state[name] = saver.store_early(read_weight(file, arch, plan[name], dtype))
        if tied:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        saver.save(state)
    return path.stat().st_size
