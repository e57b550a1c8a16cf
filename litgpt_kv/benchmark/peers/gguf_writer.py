"""Write a model of Llama's architecture as a GGUF file, with `gguf`'s own writer and names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from litgpt.config import Config
from litgpt_kv.benchmark.peers import llama
from litgpt_kv.benchmark.peers.base import Job, Unable, name_of

KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
BY_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def gguf_files(job: Job) -> Iterator[Path | Unable]:
    """Give the GGUF files of a job: those that it names, and those of the types that it names, written once.

    By default it is one, in the type of the model's weights.
    """
    for named in job.gguf or (BY_DTYPE.get(name_of(job.dtype), "f32"),):
        if named.lower() not in KINDS:
            file = Path(named)
            yield file if file.is_file() else Unable(f"there is no file {named!r:.200}, nor a type of this name")
            continue
        file = job.folder / f"{named.lower()}.gguf"
        try:
            if not file.is_file():
                write_gguf(job.config, job.state, named.lower(), file)
            yield file
        except Unable as error:
            yield error


def write_gguf(config: Config, state: dict[str, Tensor], kind: str, path: Path) -> None:
    """Write the weights without a vocabulary: tokens are passed as numbers.

    Args:
        config: Of the model. state: Its parameters, by litgpt's names.
        kind: One of `KINDS`, the type of all matrices; vectors are float32.
        path: The file.

    Raises:
        Unable: If the model is not of Llama's architecture, or its rows do not fit the blocks of the type.
    """
    sizes = llama.settings(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_query_groups)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(sizes["rope_theta"])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layer)
    heads = {"q_proj": config.n_head, "k_proj": config.n_query_groups}
    for name, weight in llama.renamed(config, state).items():
        values = weight.detach().float().cpu().numpy()
        for part, count in heads.items():
            if f".{part}." in name:
                values = _interleaved(values, count)
        _add(writer, names.get_name(name, try_suffixes=(".weight",)), values, KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    kind = Kind.F32 if values.ndim == 1 else kind
    try:
        data = gguf.quants.quantize(values, kind)
    except gguf.quants.QuantError as error:
        raise Unable(f"{name} cannot be written as {kind.name}: {error}") from error
    writer.add_tensor(name, data, raw_dtype=kind)


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Put the two numbers of each rotated pair side by side, as GGUF has them for Llama."""
    rows, columns = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def types_of(path: Path) -> tuple[str, int]:
    """Read which types the matrices of a file have, and the bytes that a decode step reads.

    Returns:
        Their names, the one with the most bytes first, "Q4_1+Q6_K"; and the bytes of all tensors but the table of
        embeddings, unless that is the head as well.

    Raises:
        Unable: If it cannot be read.
    """
    try:
        tensors = gguf.GGUFReader(path).tensors
    except Exception as error:  # the reader raises many kinds of errors for damaged files
        raise Unable(f"{path} cannot be read: {error!r:.100}") from error
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    sizes: dict[str, int] = {}
    total = 0
    for tensor in tensors:
        if tensor.name == "token_embd.weight" and not tied:
            continue
        total += int(tensor.n_bytes)
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return "+".join(sorted(sizes, key=lambda name: -sizes[name])), total
