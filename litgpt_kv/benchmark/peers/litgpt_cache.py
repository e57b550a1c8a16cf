"""litgpt: its own model and cache, called as its `generate` calls them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

import litgpt
from litgpt_kv.benchmark.peers.base import Job, Peer, Unable, Variant, name_of, step_bytes
from litgpt_kv.registry import register


class LitgptCache(Variant):
    """litgpt's cache.

    Args:
        job: What is run. model: litgpt's model with a cache attached.
        twin: The eager variant, if this one has a compiled step.
    """

    def __init__(self, job: Job, model: litgpt.GPT, twin: LitgptCache | None = None) -> None:
        self.name = "own cache" if twin is None else "own cache, compiled"
        self.model, self.twin = model, twin
        self.decoder = model if twin is None else torch.compile(model, dynamic=False)
        self.weights, self.weight_bytes, self.token_bytes = name_of(job.dtype), step_bytes(model), job.token_bytes
        self.position = 0

    def prefill(self, prompts: list[Tensor]) -> Tensor:
        self.position = len(prompts[0])
        positions = torch.arange(self.position, device=prompts[0].device)
        return self.model(torch.stack(prompts), positions, input_pos_maxp1=self.position)[:, -1]

    def follow(self) -> None:
        self.position = self.twin.position

    def step(self, tokens: Tensor) -> Tensor:
        position = torch.tensor([self.position], device=tokens.device)
        self.position += 1
        end = self.position if self.twin is None else None  # a compiled step reads all slots: it has one shape
        return self.decoder(tokens.unsqueeze(1), position, input_pos_maxp1=end)[:, -1]


@register("peer", "litgpt")
class Litgpt(Peer):
    """litgpt, with the same weights."""

    title: ClassVar[str] = "litgpt"
    packages: ClassVar[dict[str, str]] = {"litgpt": "litgpt"}

    def variants(self, job: Job) -> Iterator[Variant | Unable]:
        if job.ragged:
            raise Unable("its cache has rows of one length only")
        eager = LitgptCache(job, self._model(job))
        yield eager
        if job.compiled:
            yield LitgptCache(job, eager.model, eager)

    def _model(self, job: Job) -> litgpt.GPT:
        with torch.device("meta"):
            model = litgpt.GPT(job.config).eval()
        model.load_state_dict(job.state, assign=True)
        model.cos, model.sin = job.model.cos, job.model.sin
        model.max_seq_length = job.total
        model.set_kv_cache(job.rows, device=job.device, dtype=job.dtype)
        return model
