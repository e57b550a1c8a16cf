"""transformers: its dynamic cache, and its static cache, eager and compiled. Ragged rows are padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from litgpt_kv.benchmark.peers import llama
from litgpt_kv.benchmark.peers.base import Job, Peer, Unable, Variant, name_of, step_bytes
from litgpt_kv.registry import register


class TransformersCache(Variant):
    """One of transformers' caches.

    Args:
        job: What is run. model: transformers' model.
        name: See `Variant`.
        empty: Gives an empty cache.
        whole_mask: Whether padding is described for all slots of the cache, instead of those that have tokens.
        twin: The eager variant, if this one has a compiled step.
    """

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        name: str,
        empty: Callable[[], Any],
        whole_mask: bool,
        twin: TransformersCache | None = None,
    ) -> None:
        self.name, self.model, self.empty, self.whole_mask, self.twin = name, model, empty, whole_mask, twin
        self.decoder = model if twin is None else torch.compile(model.forward, dynamic=False)
        self.weights, self.token_bytes = name_of(job.dtype), job.token_bytes
        self.weight_bytes = step_bytes(model, "embed_tokens")
        self.total = job.total
        self.end = 0  # tokens of the longest row so far
        self.position = torch.zeros(0)  # (B, 1) the next position of each row
        self.mask: Tensor | None = None  # (B, total) int64, 0 where a row is padded; None: rows of one length

    def prefill(self, prompts: list[Tensor]) -> Tensor:
        self.cache = self.empty()
        device = prompts[0].device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.end = T = int(lengths.max())
        tokens = torch.zeros(len(prompts), T, dtype=torch.int64, device=device)
        for row, prompt in zip(tokens, prompts):
            row[T - len(prompt) :] = prompt
        padding = (T - lengths).unsqueeze(1)
        ragged = int(lengths.min()) < T
        self.mask = (torch.arange(self.total, device=device) >= padding).long() if ragged else None
        self.position = lengths.unsqueeze(1)
        positions = (torch.arange(T, device=device) - padding).clamp(min=0)
        return self._run(self.model, tokens, positions, 0)

    def _run(self, model: Callable, tokens: Tensor, positions: Tensor, start: int) -> Tensor:
        device = tokens.device
        output = model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self.mask if self.mask is None or self.whole_mask else self.mask[:, : self.end],
            past_key_values=self.cache,
            cache_position=torch.arange(start, start + tokens.size(1), device=device),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def follow(self) -> None:
        self.cache, self.end = self.twin.cache, self.twin.end
        self.position, self.mask = self.twin.position, self.twin.mask

    def step(self, tokens: Tensor) -> Tensor:
        self.end += 1
        logits = self._run(self.decoder, tokens.unsqueeze(1), self.position, self.end - 1)
        self.position = self.position + 1
        return logits


@register("peer", "transformers")
class Transformers(Peer):
    """Hugging Face's transformers, with the same weights and its default attention."""

    title: ClassVar[str] = "transformers"
    packages: ClassVar[dict[str, str]] = {"transformers": "transformers"}

    def variants(self, job: Job) -> Iterator[Variant | Unable]:
        import transformers

        model = self._model(job)

        static = transformers.StaticCache(config=model.config, max_cache_len=job.total)

        def emptied() -> Any:
            static.reset()
            return static

        yield TransformersCache(job, model, "dynamic cache", transformers.DynamicCache, False)
        eager = TransformersCache(job, model, "static cache", emptied, True)
        yield eager
        if job.compiled:
            yield TransformersCache(job, model, "static cache, compiled", emptied, True, eager)

    def _model(self, job: Job) -> nn.Module:
        import transformers

        config = transformers.LlamaConfig(**llama.settings(job.config))
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).eval()
        state = llama.renamed(job.config, job.state)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        if missing or unexpected:
            raise Unable(f"its model has other weights: {', '.join([*missing, *unexpected])[:100]}")
        model.model.rotary_emb = type(model.model.rotary_emb)(config, device=job.device)  # angles are not in the state
        return model
