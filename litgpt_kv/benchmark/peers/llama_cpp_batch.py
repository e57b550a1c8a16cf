"""llama.cpp, through llama-cpp-python's low-level calls: tokens are passed as numbers, rows as sequences of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from litgpt_kv.benchmark.peers.base import Job, Peer, Unable, Variant
from litgpt_kv.benchmark.peers.gguf_writer import gguf_files, types_of
from litgpt_kv.registry import register

PIECE = 2048  # tokens of a call: llama.cpp's default
PAD = 256  # llama.cpp has caches of a multiple of so many slots


class LlamaCpp(Variant):
    """A GGUF file in llama.cpp, with its default cache in float16.

    Args:
        job: What is run. file: The GGUF file. library: The module `llama_cpp`.

    Raises:
        Unable: If llama.cpp refuses the file, or it has another vocabulary than the model.
    """

    name = "F16 cache"

    def __init__(self, job: Job, file: Path, library: Any) -> None:
        self.library = library
        self.weights, self.weight_bytes = types_of(file)
        self.token_bytes = job.token_bytes // job.dtype.itemsize * 2
        self.batch = self.context = None
        self.model = library.llama_model_load_from_file(str(file).encode(), self._model_settings())
        if not self.model:
            raise Unable(f"it cannot load {file.name}")
        vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        if vocabulary != job.config.padded_vocab_size:
            self.close()
            raise Unable(f"{file.name} has {vocabulary:,} tokens, the model {job.config.padded_vocab_size:,}")
        self.vocabulary = vocabulary
        self.context = library.llama_init_from_model(self.model, self._context_settings(job))
        if not self.context:
            self.close()
            raise Unable(f"it has no memory for {job.rows} rows of {job.total:,} tokens")
        self.memory = library.llama_get_memory(self.context)
        self.batch = library.llama_batch_init(PIECE, 0, 1)
        self.tokens = np.ctypeslib.as_array(self.batch.token, (PIECE,))
        self.positions = np.ctypeslib.as_array(self.batch.pos, (PIECE,))
        self.wanted = np.ctypeslib.as_array(self.batch.logits, (PIECE,))
        self.counts = np.ctypeslib.as_array(self.batch.n_seq_id, (PIECE,))
        self.lengths = np.zeros(job.rows, dtype=np.int32)

    def _model_settings(self) -> Any:
        settings = self.library.llama_model_default_params()
        settings.n_gpu_layers = 0  # the others run on the CPU
        return settings

    def _context_settings(self, job: Job) -> Any:
        settings = self.library.llama_context_default_params()
        settings.n_ctx = job.rows * -(-job.total // PAD) * PAD
        settings.n_batch = PIECE
        settings.n_seq_max = job.rows
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        return settings

    def prefill(self, prompts: list[Tensor]) -> Tensor:
        self.library.llama_memory_clear(self.memory, True)
        found = []
        for row, prompt in enumerate(prompts):
            for start in range(0, len(prompt), PIECE):
                part = prompt[start : start + PIECE].numpy()
                size = len(part)
                self._fill(part, np.arange(start, start + size), [row] * size)
                self.wanted[:size] = 0
                self.wanted[size - 1] = 1
                self._decode()
            found.append(self._logits(size - 1))
        self.lengths[:] = [len(prompt) for prompt in prompts]
        return torch.stack(found)

    def step(self, tokens: Tensor) -> Tensor:
        rows = len(tokens)
        self._fill(tokens.numpy(), self.lengths, range(rows))
        self.wanted[:rows] = 1
        self._decode()
        self.lengths += 1
        return torch.stack([self._logits(row) for row in range(rows)])

    def _fill(self, tokens: np.ndarray, positions: np.ndarray, rows: Any) -> None:
        size = self.batch.n_tokens = len(tokens)
        self.tokens[:size], self.positions[:size], self.counts[:size] = tokens, positions, 1
        for i, row in enumerate(rows):
            self.batch.seq_id[i][0] = row

    def _decode(self) -> None:
        if status := self.library.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _logits(self, index: int) -> Tensor:
        pointer = self.library.llama_get_logits_ith(self.context, index)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self.vocabulary,)).copy())

    def close(self) -> None:
        if self.batch is not None:
            self.library.llama_batch_free(self.batch)
        if self.context:
            self.library.llama_free(self.context)
        if self.model:
            self.library.llama_model_free(self.model)
        self.batch = self.context = self.model = None


@register("peer", "llama.cpp")
class LlamaCppPeer(Peer):
    """llama.cpp with the same weights in a GGUF file, or with files of their own types."""

    title: ClassVar[str] = "llama.cpp"
    packages: ClassVar[dict[str, str]] = {"llama_cpp": "llama-cpp-python"}
    quiet: ClassVar[Any] = None  # llama.cpp's log goes here; it must live as long as the process

    def variants(self, job: Job) -> Iterator[Variant | Unable]:
        import llama_cpp

        if job.device.type != "cpu":
            raise Unable("it is measured on a CPU only")
        LlamaCppPeer.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(LlamaCppPeer.quiet, None)
        llama_cpp.llama_backend_init()
        for file in gguf_files(job):
            if isinstance(file, Unable):
                yield file
                continue
            try:
                yield LlamaCpp(job, file, llama_cpp)
            except Unable as error:
                yield error
