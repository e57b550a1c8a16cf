"""Read prompts once, and seed any number of caches with what was read.

A prefill attends to the whole prompt before anything is evicted, so the queries, keys and values of every layer are the
same whatever a cache keeps of them.

B rows · T tokens · V vocabulary · H query heads · G key/value heads · D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.reread import Rereading
from litgpt_kv.cache.views import LatentProjection, SequenceView, training_pass
from litgpt_kv.compat.input_pos import GPT


@dataclass(eq=False)
class RecordingView(SequenceView):
    """Attend as a prefill does, and note what the layer was given in `noted`."""

    noted: tuple[Tensor, Tensor, Tensor, LatentProjection | None] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: LatentProjection | None = None) -> Tensor:
        self.noted = q, k, v, latent
        return super().attend(q, k, v, latent)


@dataclass(eq=False)
class Recording:
    """What every layer was given while prompts were read.

    Attributes:
        model: That read them. tokens: (B, T) the prompts, padded on the right. length: (B,) their tokens.
        logits: (B, V) after the last token of each.
        layers: Of each layer the unrotated queries (B, H, T, D) and keys (B, G, T, D), the values (B, G, T, D), and
            what latent attention makes of them.
        reread: What second readings of these prompts found, for strategies that need one.
    """

    model: GPT
    tokens: Tensor
    length: Tensor
    logits: Tensor
    layers: list[tuple[Tensor, Tensor, Tensor, LatentProjection | None]] = field(repr=False)
    reread: dict[tuple, list[Tensor | None]] = field(default_factory=dict, repr=False)

    @torch.inference_mode()
    def seed(self, cache: KVCache, length: Tensor | None = None) -> None:
        """Seed an empty cache of B rows as `prefill(..., "full")` does, with the first `length` (B,) tokens of each."""
        length = self.length if length is None else length
        T = int(length.max())
        step = cache.begin_prefill(T, length, self.model.rope())
        for view, (q, k, v, latent) in zip(step.views, self.layers):
            if "mass" not in view.layer.want:  # nobody needs the output: compute as little of it as possible
                view.last = length.to(q.device) - 1
            view.attend(q[:, :, :T], k[:, :, :T], v[:, :, :T], latent)
        if step.rereading is not None:
            self._read_again(step.rereading, T)
        step.commit()

    def _read_again(self, rereading: Rereading, T: int) -> None:
        """Do the second reading, or reuse an earlier one: it depends on the prompt and the parts alone."""
        prompts, key = list(rereading.prompts), (*rereading.length.tolist(), rereading.chunk)
        known = self.reread.get(key, [None] * len(prompts))
        if any(held.reread is not None and found is None for held, found in zip(prompts, known)):
            for part, views in rereading.parts(self.tokens[:, :T]):
                read = self.model.embed(part)
                for block, view in zip(self.model.transformer.h, views):
                    read = block(read, view)
            self.reread[key] = [held.reread for held in prompts]
            return
        for layer, step, held, found in zip(rereading.layers, rereading.steps, prompts, known):
            if held.reread is not None:
                held.reread = found
                held.seed(layer, step, rereading.length.to(layer.device))


@torch.inference_mode()
def record(model: GPT, prompts: list[Tensor]) -> Recording:
    """Read prompts, 1-D token ids of any lengths up to the model's context, in one pass without a cache.

    Raises:
        ValueError: If a prompt is longer than the context.
    """
    device, longest = model.transformer.wte.weight.device, max(map(len, prompts))
    if longest > model.max_seq_length:
        raise ValueError(
            f"A prompt of {longest:,} tokens is over the limit of {model.max_seq_length:,}: the model's context."
        )
    length = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.stack([torch.cat((p, p[-1:].expand(longest - len(p)))) for p in prompts]).to(device)
    step = training_pass([block.attn.spec for block in model.transformer.h], longest, model.rope())
    views = [RecordingView(view.spec, view.angles) for view in step.views]
    views[-1].last = length - 1
    x = model.embed(tokens)
    for block, view in zip(model.transformer.h, views):
        x = block(x, view)
    logits = model.head(model.transformer.ln_f(x).squeeze(1))
    return Recording(model, tokens, length, logits, [view.noted for view in views])
