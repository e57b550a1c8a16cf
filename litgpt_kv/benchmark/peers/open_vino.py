"""OpenVINO: its runtime with the cache as state of the model, and GenAI's paged cache with and without eviction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from litgpt_kv.benchmark.peers import openvino_model
from litgpt_kv.benchmark.peers.base import Job, Peer, Unable, Variant, name_of
from litgpt_kv.registry import register

BLOCK = 32  # tokens of a block of GenAI's cache on a CPU; it evicts whole blocks
MODEL = "openvino_model.xml"


def device_settings() -> dict[str, Any]:
    """The plugin's settings: products and cache in float32 as in the other libraries, as many threads as torch has."""
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    return {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", **threads}


class OpenVinoVariant(Variant):
    """What both ways have in common: float32 weights and cache."""

    def __init__(self, job: Job) -> None:
        self.weights = "float32"
        self.weight_bytes = sum(4 * weight.numel() for name, weight in job.state.items() if "wte" not in name)
        self.token_bytes = job.token_bytes // job.dtype.itemsize * 4


class StatefulCache(OpenVinoVariant):
    """OpenVINO's runtime; the model keeps its cache. Ragged rows are padded on the left.

    Args:
        job: What is run. folder: Where the model is.
    """

    name = "stateful cache"

    def __init__(self, job: Job, folder: Path) -> None:
        import openvino

        super().__init__(job)
        compiled = openvino.Core().compile_model(folder / MODEL, "CPU", device_settings())
        self.request = compiled.create_infer_request()
        self.positions = np.zeros((job.rows, 1), dtype=np.int64)  # the next one of each row
        self.mask = np.ones((job.rows, job.total), dtype=np.int64)
        self.rows = np.arange(job.rows, dtype=np.int32)
        self.end = 0

    def prefill(self, prompts: list[Tensor]) -> Tensor:
        self.request.reset_state()
        lengths = np.array([len(prompt) for prompt in prompts])
        self.end = T = int(lengths.max())
        tokens, padding = np.zeros((len(prompts), T), dtype=np.int64), (T - lengths)[:, None]
        for row, prompt in zip(tokens, prompts):
            row[T - len(prompt) :] = prompt.numpy()
        self.mask = (np.arange(self.mask.shape[1]) >= padding).astype(np.int64)
        self.positions = lengths[:, None].astype(np.int64)
        return self._run(tokens, np.maximum(np.arange(T) - padding, 0))

    def step(self, tokens: Tensor) -> Tensor:
        self.end += 1
        logits = self._run(tokens[:, None].numpy(), self.positions)
        self.positions = self.positions + 1
        return logits

    def _run(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        inputs = {"input_ids": tokens, "attention_mask": np.ascontiguousarray(self.mask[:, : self.end])}
        self.request.infer({**inputs, "position_ids": positions, "beam_idx": self.rows})
        return torch.from_numpy(self.request.get_tensor("logits").data[:, -1].copy())


class PagedCache(OpenVinoVariant):
    """GenAI's continuous batching. It tells no logits, and goes on with its own tokens after the prompt.

    Args:
        job: What is run. folder: Where the model and a tokenizer are.
        keep: The most tokens that a row keeps, by GenAI's eviction; None: all.
    """

    def __init__(self, job: Job, folder: Path, keep: int | None) -> None:
        import openvino_genai as genai

        super().__init__(job)
        self.name = "paged cache" if keep is None else "paged cache, evicting"
        self.genai, self.keep = genai, keep
        settings = genai.SchedulerConfig()
        settings.enable_prefix_caching = False  # prompts are read again and again
        settings.dynamic_split_fuse = False
        settings.max_num_batched_tokens = sum(job.lengths)  # all prompts in one pass
        settings.max_num_seqs = job.rows
        if keep is not None:
            settings.use_cache_eviction = True
            recent = max(BLOCK, keep // 2 // BLOCK * BLOCK)
            mode = genai.AggregationMode.NORM_SUM
            settings.cache_eviction_config = genai.CacheEvictionConfig(BLOCK, recent, keep, mode)
        self.pipeline = genai.ContinuousBatchingPipeline(folder, settings, "CPU", device_settings())
        self.new_tokens, self.requests, self.handles = job.new_tokens + 1, 0, []

    def prefill(self, prompts: list[Tensor]) -> Tensor:
        import openvino

        for handle in self.handles:
            handle.cancel()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        settings = self.genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = self.new_tokens, True, False
        self.handles = []
        for prompt in prompts:
            tokens = openvino.Tensor(prompt.unsqueeze(0).numpy())
            self.handles.append(self.pipeline.add_request(self.requests, tokens, settings))
            self.requests += 1
        while not all(handle.can_read() for handle in self.handles):
            self.pipeline.step()
        outputs = [next(iter(handle.read().values())) for handle in self.handles]
        return torch.tensor([output.generated_ids[0] for output in outputs])

    def step(self, tokens: Tensor) -> None:
        self.pipeline.step()

    def read_bytes(self, lengths: list[int]) -> int:
        return super().read_bytes([length if self.keep is None else min(length, self.keep) for length in lengths])

    def close(self) -> None:
        self.handles, self.pipeline = [], None


@register("peer", "openvino")
class OpenVino(Peer):
    """OpenVINO, with the same weights in a model that is converted for it."""

    title: ClassVar[str] = "openvino"
    packages: ClassVar[dict[str, str]] = {
        "openvino": "openvino",
        "openvino_genai": "openvino-genai",
        "openvino_tokenizers": "openvino-tokenizers",
        "transformers": "transformers",
    }

    def variants(self, job: Job) -> Iterator[Variant | Unable]:
        if job.dtype != torch.float32:
            raise Unable(f"its model is converted in float32; the weights here are {name_of(job.dtype)}")
        if job.device.type != "cpu":
            raise Unable("it is measured on a CPU only")
        folder = job.folder / "openvino"
        if not (folder / MODEL).is_file():
            folder.mkdir()
            openvino_model.save_folder(job.config, job.state, folder)
        yield StatefulCache(job, folder)
        yield PagedCache(job, folder, None)
        keep = job.kept // BLOCK * BLOCK
        if keep < 3 * BLOCK:
            yield Unable(f"its eviction keeps at least {3 * BLOCK} tokens; the budget here is {job.kept:,}")
        else:
            yield PagedCache(job, folder, keep)
