"""A cache on disk: read a long text once, ask about it in other runs. Floor 3.

The file is in safetensors' format: the cache's buffers, and in its metadata what the cache is and whose it is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from litgpt_kv.config import KVCacheArgs

FORMAT = "litgpt_kv cache 2"


def write(cache: Any, path: str | Path) -> None:
    """`KVCache.save`."""
    about = {"args": asdict(cache.args), "batch_size": cache.batch_size, "max_tokens": cache.max_tokens}
    about["dtype"] = str(next(cache.layers[0].keys.buffers()).dtype).removeprefix("torch.")
    metadata = {"format": FORMAT, "cache": json.dumps(about), "model": cache.fingerprint}
    try:
        save_file({name: buffer.contiguous() for name, buffer in cache.named_buffers()}, str(path), metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The cache cannot be written to {path}: {error}") from error


def read(cls: Any, path: str | Path, model: Any, args: KVCacheArgs | str | None) -> Any:
    """`KVCache.load`."""
    args = KVCacheArgs(strategy=args) if isinstance(args, str) else args
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a cache written by this version ({FORMAT!r}).")
            if metadata["model"] != fingerprint(model):
                raise ValueError(f"{path} was made with another model than this {model.config.name!r}.")
            about = json.loads(metadata["cache"])
            found, dtype = KVCacheArgs(**about["args"]), getattr(torch, about["dtype"])
            mine, its = json.loads(json.dumps(asdict(args or found))), about["args"]  # lists for tuples
            if mine != its:
                differ = ", ".join(f"{k} is {its[k]!r}, not {mine[k]!r}" for k in mine if mine[k] != its[k])
                raise ValueError(f"{path} holds a cache of other arguments: {differ}.")
            cache = cls.build(model, found, about["batch_size"], about["max_tokens"], dtype)
            for name, buffer in cache.named_buffers():
                buffer.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a cache: {error}") from error
    cache.recount()
    return cache


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's config and of a sample of its weights, the same on every device."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True, default=str).encode())
    samples = []
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name.removeprefix('_orig_mod.')} {tuple(weight.shape)}".encode())
        samples.append(weight.detach().flatten()[:64].float())
    if samples:
        device = samples[0].device
        together = torch.cat([sample.to(device) for sample in samples]).cpu()  # one copy from the device
        digest.update(together.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
