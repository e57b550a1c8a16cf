"""A cache on disk: read a long text once, ask about it in other runs.

The file is in safetensors' format: the cache's buffers, and in its metadata what the cache is, whose it is, and a
checksum of all of it. Nothing in a file is believed: `read` returns the cache that `write` was given, or raises
ValueError. It checks, in this order, the metadata, the shape and dtype of every buffer (before anything is allocated),
the checksum, and the positions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from litgpt_kv import registry
from litgpt_kv.cache.door import check_build, own_pools
from litgpt_kv.cache.rows import storages_of
from litgpt_kv.cache.storage.coded import Coded
from litgpt_kv.cache.table import Table
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.disk import replacing

FORMAT = "litgpt_kv cache 3"
DTYPES = {  # those that a buffer may have, by their names in safetensors' header
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MODEL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in list(DTYPES.values())[:4]}
SAMPLE = 64  # values of each weight that a fingerprint reads
MOST_TOKENS = 2**40  # more than any text has, and small enough to calculate with


def write(cache: Any, path: str | Path, model: Any) -> None:
    """Do the work of `KVCache.save`."""
    if model is not None and fingerprint(model) != cache.fingerprint:
        raise ValueError("This cache was built for another model than the one given.")
    cache.clock.check_whole("Saving")
    about = {"args": asdict(cache.args), "batch_size": cache.batch_size, "max_tokens": cache.max_tokens}
    about["dtype"] = str(cache.dtype).removeprefix("torch.")
    about["read_as"] = str(_read_as(cache)).removeprefix("torch.")
    metadata = {"format": FORMAT, "cache": json.dumps(about), "model": cache.fingerprint}
    buffers = {name: buffer.detach().cpu().contiguous() for name, buffer in cache.named_buffers()}
    metadata["checksum"] = checksum(metadata, buffers)
    try:
        with replacing(path) as beside:
            save_file(buffers, str(beside), metadata)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def read(cls: Any, path: str | Path, model: Any, args: KVCacheArgs | str | None) -> Any:
    """Do the work of `KVCache.load`."""
    args, path = None if args is None else check_build(args, 1, 1), os.fspath(path)
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("there is no such file")
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"it was not written by this version ({FORMAT!r})")
            if metadata.get("model") != fingerprint(model):
                raise ValueError(f"it was made with another model than this {model.config.name!r}")
            about = _about(metadata, args, os.path.getsize(path))
            _check_shapes(_on_meta(cls, model, about), file)
            buffers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (mapped, not copied)
            if metadata.get("checksum") != checksum(metadata, buffers):
                raise ValueError("its checksum is wrong: it is damaged, or was changed after it was written")
            cache = cls.build(model, about["args"], about["batch_size"], about["max_tokens"], about["dtype"])
            _check_content(cache, buffers)
            _cast(cache, about["read_as"])
            _fill(cache, buffers)
            for pair in storages_of(cache):
                for storage in pair:
                    storage.check()
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{path:.300} cannot be read as a cache: {error}") from error
    cache.recount()
    return cache


def checksum(metadata: Mapping[str, str], buffers: Mapping[str, Tensor]) -> str:
    """Return a digest of all that a file holds, whatever its order."""
    digest = hashlib.sha256(json.dumps([[k, v] for k, v in sorted(metadata.items()) if k != "checksum"]).encode())
    for name, buffer in sorted(buffers.items()):
        digest.update(json.dumps([name, str(buffer.dtype), list(buffer.shape)]).encode())
        digest.update(memoryview(buffer.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's config and of a sample of its weights, the same on every device."""
    digest = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True, default=str).encode())
    samples = []
    for name, weight in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(f"{name.removeprefix('_orig_mod.')} {tuple(weight.shape)}".encode())
        values = weight.first if weight.is_mkldnn else weight.detach().flatten()[:SAMPLE]  # of a `PackedLinear`
        samples.append(values.float())
    together = torch.cat([sample.to(samples[0].device) for sample in samples]).cpu()  # one copy from the device
    digest.update(together.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _about(metadata: Mapping[str, str], args: KVCacheArgs | None, size: int) -> dict[str, Any]:
    """Read what the cache is: its arguments, batch size, `max_tokens` and dtype.

    Raises:
        ValueError: If these cannot be those of a cache in a file of `size` bytes, or are not what `args` asks for.
    """
    try:
        about = json.loads(metadata.get("cache", ""))
        found = about["args"]
        asked = found if args is None else json.loads(json.dumps(asdict(args)))  # lists for tuples
        if differ := [f"{k} is {found[k]!r}, not {asked[k]!r}" for k in asked if asked[k] != found[k]]:
            raise ValueError(f"it holds a cache of other arguments: {', '.join(differ)}")
        if args is None:  # a name that is not registered may be that of a file with code
            for kind, names in (("strategy", found["strategy"]), ("storage", found["storage"])):
                for name in names if isinstance(names, list) else [names]:
                    if name not in registry.names(kind):
                        raise ValueError(f"there is no {kind} {name!r}")
        for name, most in (("batch_size", size), ("max_tokens", MOST_TOKENS)):
            if type(about[name]) is not int or not 1 <= about[name] <= most:
                raise ValueError(f"its {name} cannot be {about[name]!r:.40}")
        dtype, read_as = (MODEL_DTYPES[about.get(name, about["dtype"])] for name in ("dtype", "read_as"))
        return {**about, "args": KVCacheArgs(**found), "dtype": dtype, "read_as": read_as}
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its metadata are damaged: {type(error).__name__} {error}") from error


def _on_meta(cls: Any, model: Any, about: dict[str, Any]) -> Any:
    """Build the cache that a file describes without memory for its buffers."""
    devices = [torch.device("meta")] * model.config.n_layer
    size, dtype = (about["batch_size"], about["max_tokens"]), about["dtype"]
    try:
        sharing = model.sharing
        args = about["args"] if sharing is None else own_pools(about["args"], *sharing.groups_and_devices)
        return cls(model.config, args, *size, model.max_seq_length, dtype, devices)
    except (TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:  # of values that nobody checks
        raise ValueError(f"its arguments fit no cache: {error}") from error


def _check_shapes(cache: Any, file: Any) -> None:
    """Raise ValueError if the file's buffers are not those of `cache`."""
    expected = dict(cache.named_buffers())
    if missing := expected.keys() ^ set(file.keys()):
        raise ValueError(f"its buffers are not those of its cache: {min(missing)!r} is on one side only")
    stored = {id(buffer) for pair in storages_of(cache) for part in pair for buffer in part.buffers()}
    stored |= {id(layer.ring.data) for layer in cache.layers if layer.ring is not None}
    for name, buffer in expected.items():
        part = file.get_slice(name)
        shape, dtype = list(part.get_shape()), DTYPES.get(part.get_dtype())
        cast = id(buffer) in stored and buffer.is_floating_point()  # by `cache.to(dtype)`
        if shape != list(buffer.shape) or not (dtype == buffer.dtype or (cast and dtype in MODEL_DTYPES.values())):
            raise ValueError(
                f"{name} must be {list(buffer.shape)} of {buffer.dtype}, got {shape} of {part.get_dtype()}"
            )


def _check_content(cache: Any, buffers: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the buffers of a file hold what no cache of `cache`'s kind can hold."""
    for name, buffer in buffers.items():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise ValueError(f"{name} has values that are not numbers")
    seen = buffers["clock.pos"]  # (B,)
    most = MOST_TOKENS if cache.limit is None else cache.limit
    if seen.min() < 0 or seen.max() > most:
        raise ValueError(f"its rows have seen {seen.tolist()} tokens, where 0 to {most} are possible")
    prompts = buffers["clock.prompt_length"]
    if prompts.min() < 0 or prompts.max() > most:
        raise ValueError(f"its rows' prompts have {prompts.tolist()} tokens, where 0 to {most} are possible")
    for index, layer in enumerate(cache.layers):
        if layer.ring is not None:
            pos = buffers[f"layers.{index}.ring.pos"]  # (B, w)
            slot = torch.arange(pos.size(1))
            if (pos < -1).any() or (pos >= seen.unsqueeze(1)).any() or ((pos >= 0) & (pos % pos.size(1) != slot)).any():
                raise ValueError(f"positions of the queries of layer {index} are out of range")
    for index, slots in enumerate(cache.slots):
        pos = buffers[f"slots.{index}.pos"]  # (L, B, P, S)
        end = seen.view(1, -1, 1, 1)
        taken = pos >= 0
        number = pos
        if slots.owner is not None:  # heads of a pool may hold the same position
            owner, heads = buffers[f"slots.{index}.owner"], slots.heads
            if isinstance(slots, Table):  # owners are heads of the layer whose segment it is
                sizes, least = buffers[f"slots.{index}.sizes"], slots.layers[0].groups * slots.plan.sure
                heads = slots.layers[0].groups
                dealt = (sizes != torch.tensor(slots.equal_sizes)).any(-1)
                if (sizes < 1).any() or (sizes.sum(-1) != slots.size).any() or (sizes[dealt] < least).any():
                    raise ValueError(f"sizes of the layers of slots {index} are out of range")
            if (owner < 0).any() or (owner >= heads).any():
                raise ValueError(f"owners of slots {index} are out of range")
            if isinstance(slots, Table):
                ends = sizes[0].cumsum(-1)  # (B, L)
                place = torch.arange(slots.size)
                owner = owner + heads * (place >= ends.unsqueeze(-1)).sum(1)[None, :, None]  # (1, B, 1, N)
            number = torch.where(taken, pos * slots.heads + owner, -1)
        ordered = number.sort(dim=-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if (pos < -1).any() or (pos >= end).any() or twice.any():
            raise ValueError(f"positions of slots {index} are out of range, or two are the same")
        one_by_one = slots.plan.interval == 1 and slots.owner is None  # then slots fill in order until all are
        if one_by_one and (taken != (torch.arange(slots.size) < end)).any():
            raise ValueError(f"slots {index} are empty where they must be full, or full where they must be empty")
        for name, buffer in slots.named_buffers(recurse=False):
            if one_by_one and name != "pos" and ((buffers[f"slots.{index}.{name}"] != buffer.cpu()) & ~taken).any():
                raise ValueError(f"{name} of slots {index} has values where no token is")


def _read_as(cache: Any) -> torch.dtype:
    """The dtype that storages of codes read as: the cache's, or the one that it was cast to."""
    parts = (part for pair in storages_of(cache) for part in pair)
    return next((part.dtype for part in parts if isinstance(part, Coded)), cache.dtype)


def _cast(cache: Any, dtype: torch.dtype) -> None:
    """Let storages of codes read as a dtype, which their buffers do not say."""
    with torch.inference_mode(False):
        for pair in storages_of(cache):
            for part in pair:
                if isinstance(part, Coded) and part.dtype != dtype:
                    part.to(dtype)


def _fill(cache: Any, buffers: Mapping[str, Tensor]) -> None:
    """Copy the buffers of a file into a new cache, in the dtypes of the file."""
    modules = dict(cache.named_modules())
    with torch.inference_mode(False), torch.no_grad():
        for name, found in buffers.items():
            owner, _, leaf = name.rpartition(".")
            buffer = modules[owner].get_buffer(leaf)
            if found.dtype != buffer.dtype:
                buffer = torch.empty_like(buffer, dtype=found.dtype)
                setattr(modules[owner], leaf, buffer)
            buffer.copy_(found)
