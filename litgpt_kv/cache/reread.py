"""A second reading of prompts, for strategies that score a token by the attention that reading the text again pays.

The prompt's keys and values are held, whole, while its tokens are read again after it, some at a time: each part sees
the prompt and itself, and is forgotten.

B rows · T tokens of a prompt · c tokens of a part · H query heads · G key/value heads · R = H / G · D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt.model import do_softcapping
from litgpt_kv.attention.causal import BLOCK
from litgpt_kv.attention.masks import visible
from litgpt_kv.attention.rope import Angles, RopeTables, rotate, rows_at
from litgpt_kv.cache.layer import LayerCache, PrefillMetadata
from litgpt_kv.cache.readers import FreshTokens
from litgpt_kv.cache.spec import LayerSpec


@dataclass(eq=False)
class HeldPrompt:
    """What one layer holds of prompts between the two readings.

    Attributes:
        keys, values: (B, G or H, T, .) as the prompt's own queries met them.
        fresh: What the layer's cache is seeded with, and `received`, the attention that each token received.
        reread: (B, G, T) the largest attention so far that a query of the second reading paid; None: nobody asks.
    """

    keys: Tensor
    values: Tensor
    fresh: FreshTokens
    received: Mapping[str, Tensor]
    reread: Tensor | None = None

    def seed(self, layer: LayerCache, step: PrefillMetadata, length: Tensor) -> None:
        """Seed a layer whose second reading is complete, for prompts of `length` (B,) tokens."""
        if self.reread is None:
            return
        slots = step.slots
        reread = self.reread if slots.sharing is None else slots.sharing.largest(self.reread)
        fits = length <= slots.plan.slots  # a row that fits is as it is alone: not read again
        reread = reread.clamp(min=torch.finfo(torch.float32).tiny).masked_fill(fits.view(-1, 1, 1), 0.0)
        layer.seed(step, self.fresh, {**self.received, "reread": reread})


@dataclass(eq=False)
class RereadView:
    """A part of the prompts is read again.

    Attributes:
        layer: The layer's cache. held: Its prompt. step: What its group shares; the last part seeds the cache.
        angles: Of the part's tokens. pos: (B, c) their positions. real: (B, c) False for pads.
        length: (B,) of the prompts. final: Whether this is the last part.
        last: (B,) of the last layer, whose output nobody needs.
    """

    layer: LayerCache
    held: HeldPrompt
    step: PrefillMetadata
    angles: Angles
    pos: Tensor
    real: Tensor
    length: Tensor
    final: bool
    last: Tensor | None = None
    observer: Callable[[Tensor], None] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: object = None) -> Tensor:
        spec, held, T = self.layer.spec, self.held, self.held.keys.size(2)
        q, k = (rotate(x, self.angles, spec.rope_size) for x in (q, k))
        if latent is not None:
            q, k, v = latent.expand(q, k, v)  # type: ignore[attr-defined]
        keys, values = torch.cat((held.keys, k), dim=2), torch.cat((held.values, v), dim=2)  # (B, G, T + c, .)
        prompt = torch.arange(T, device=q.device).expand(q.size(0), T)
        key_pos = torch.cat((prompt.masked_fill(prompt >= self.length.unsqueeze(1), -1), self.pos), dim=1)
        y, largest = attend_again(q, keys, values, self.pos, key_pos, self.real, spec)
        if held.reread is not None:
            largest = largest[..., :T].amax(dim=1, keepdim=True) if spec.latent else largest[..., :T]  # (B, G, T)
            held.reread = torch.maximum(held.reread, largest)
        if self.final:  # the prompt is not held any longer than it needs to be
            held.seed(self.layer, self.step, self.length)
        y = y if self.last is None else y[:, :, :1]
        return y.transpose(1, 2)  # (B, c, H, Dv)


def attend_again(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor, key_pos: Tensor, real: Tensor, spec: LayerSpec
) -> tuple[Tensor, Tensor]:
    """Attention of a part of the second reading, and the largest that each key receives, in blocks of queries.

    Args:
        q: (B, H, c, D). k, v: (B, G, N, D) and (B, G, N, Dv).
        pos: (B, c) positions of the queries. key_pos: (B, N) of the keys, -1 where there is none.
        real: (B, c) queries whose attention counts.

    Returns:
        (B, H, c, Dv), and (B, G, N) over queries and the query heads of a group; float32 (float64 for a float64 model).
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    (B, H, c, _), (G, N) = q.shape, k.shape[1:3]
    keys, best = k.to(exact).mT, torch.zeros(B, G, N, dtype=exact, device=q.device)
    y = q.new_empty(B, G, H // G, c, v.size(-1))
    q = q.unflatten(1, (G, H // G))  # (B, G, R, c, D)
    with torch.autocast(q.device.type, enabled=False):
        for first in range(0, c, BLOCK):
            rows = slice(first, first + BLOCK)
            part = q[:, :, :, rows].flatten(2, 3).to(exact) * spec.scale
            scores = (part @ keys).unflatten(2, (H // G, -1))  # (B, G, R, b, N)
            if spec.softcap is not None:
                scores = do_softcapping(scores, spec.softcap)
            hidden = ~visible(pos[:, rows], key_pos, spec.window)[:, None, None]
            probs = scores.masked_fill_(hidden, torch.finfo(exact).min).softmax(dim=-1)
            y[:, :, :, rows] = (probs.to(v.dtype).flatten(2, 3) @ v).unflatten(2, (H // G, -1))
            probs.masked_fill_(hidden | ~real[:, None, None, rows, None], 0.0)
            best = torch.maximum(best, probs.amax(dim=(2, 3)))
    return y.flatten(1, 2), best


@dataclass(eq=False)
class Rereading:
    """The second reading of a prefill.

    Attributes:
        layers: Of the model. steps: Of each layer. prompts: What each layer holds, filled by the first reading.
        rope: The model's tables. length: (B,), and on the host `longest`. chunk: Tokens of a part.
    """

    layers: Sequence[LayerCache]
    steps: Sequence[PrefillMetadata]
    rope: RopeTables
    length: Tensor
    longest: int
    chunk: int
    prompts: list[HeldPrompt] = field(default_factory=list)

    def hold(self, layer: LayerCache, step: PrefillMetadata, held: HeldPrompt) -> None:
        """Keep what a layer has of the prompts; its cache is seeded now, or after the second reading if it asks."""
        held.fresh = held.fresh.held(layer.needs_unrotated)
        if not layer.spec.latent:  # one copy of both
            held.keys, held.values = held.fresh.rotated, held.fresh.v
        if step.slots.strategy.rereads and self.longest > step.slots.plan.slots:
            B, groups, T = held.fresh.v.shape[:3]
            exact = torch.promote_types(held.keys.dtype, torch.float32)
            held.reread = torch.zeros(B, groups, T, dtype=exact, device=held.keys.device)
        else:
            layer.seed(step, held.fresh, held.received)
        self.prompts.append(held)

    def parts(self, idx: Tensor) -> Iterator[tuple[Tensor, list[RereadView]]]:
        """For each part of the prompts idx (B, T): its tokens (B, c), and the layers' views."""
        for first in range(0, self.longest, self.chunk):
            tokens = idx[:, first : min(first + self.chunk, self.longest)]
            steps = torch.arange(tokens.size(1), device=idx.device)
            views = []
            for layer, step, held, t in zip(self.layers, self.steps, self.prompts, self.rope.which):
                device = layer.device
                length = self.length.to(device)
                pos = length.unsqueeze(1) + steps.to(device)  # (B, c): right after each row's prompt
                real = first + steps.to(device) < length.unsqueeze(1)
                angles = rows_at(self.rope.tables[t], pos)  # (B, c, E)
                final = first + self.chunk >= self.longest
                views.append(RereadView(layer, held, step, angles, pos, real, length, final))
            views[-1].last = torch.zeros_like(self.length, device=views[-1].layer.device)
            yield tokens, views
        self.prompts.clear()
