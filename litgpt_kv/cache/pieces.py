"""A prompt read in pieces: the result of one pass, with the memory of one piece for all but keys and values.

Until the last piece the row keeps every key and value of its prompt; attention received adds up piece by piece; only
the end chooses what stays.

N tokens read so far · t tokens of a piece · H query heads · G key/value heads · D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litgpt_kv.attention.causal import causal_attention
from litgpt_kv.attention.rope import Angles, RopeTables, rotate
from litgpt_kv.cache.door import check_prompt
from litgpt_kv.cache.layer import LayerCache, PrefillMetadata, prompt_statistics
from litgpt_kv.cache.readers import FreshTokens
from litgpt_kv.cache.views import LatentProjection, Pass, end_prefill


@dataclass(eq=False)
class LayerPrompt:
    """What one layer remembers of a prompt while it is read.

    Attributes:
        length: Tokens of the whole prompt.
        rotated, unrotated: (1, G, N, D) keys, the second only where needed.
        v: (1, G, N, Dv) values. All are the beginnings
            of tensors that hold the whole prompt.
        q, raw_q: The last queries, (1, H, n, D), for strategies that read them.
        received: Attention received so far by name, (1, G, N).
    """

    length: int
    rotated: Tensor | None = None
    unrotated: Tensor | None = None
    v: Tensor | None = None
    q: Tensor | None = None
    raw_q: Tensor | None = None
    received: dict[str, Tensor] = field(default_factory=dict)
    _whole: dict[str, Tensor] = field(default_factory=dict)  # by name, (1, G, length, .)

    def append(self, name: str, x: Tensor) -> Tensor:
        """Add tokens x (1, G, t, .) to `rotated`, `unrotated` or `v`; all of them so far."""
        before = getattr(self, name)
        read = 0 if before is None else before.size(2)
        if before is None:
            with torch.inference_mode(False):  # later pieces may be read outside of it
                self._whole[name] = x.new_empty(*x.shape[:2], self.length, x.size(3))
        whole = self._whole[name]
        whole[:, :, read : read + x.size(2)] = x
        setattr(self, name, whole[:, :, : read + x.size(2)])
        return getattr(self, name)


class PromptReader:
    """The prompt of one row, on its way into the cache. `model(piece, reader)` reads the next tokens (1, t).

    Attributes:
        length: The tokens of the whole prompt.
        read: How many of them were read.
        batch_size: 1.
    """

    batch_size = 1

    def __init__(self, view: Any, length: int) -> None:
        check_prompt(view, length, torch.tensor([length], device=view.pos.device))
        self.clock, self.groups, self.layers, self.group_of = view.clock, view.slots, view.layers, view.group_of
        self.length, self.read = length, 0
        self._prompts = [LayerPrompt(length) for _ in view.layers]
        self._failed = False

    @property
    def remaining(self) -> int:
        """Tokens still to be read."""
        return self.length - self.read

    def begin_decode(self, T: int, rope: RopeTables) -> PiecePass:
        """Prepare to read the next T tokens.

        Raises:
            ValueError: If so many do not remain, or a piece before failed.
        """
        if self._failed:
            raise ValueError("A piece of this prompt failed or was interrupted: reset() the row and read it anew.")
        if T > self.remaining:
            raise ValueError(f"A piece of {T} tokens is longer than the {self.remaining} that remain of the prompt.")
        self._failed = True  # until `commit`
        end = self.read + T
        angles = rope.slice(self.read, end)
        length = torch.tensor([self.length], device=self.clock.pos.device)
        final = end == self.length
        steps: list[PrefillMetadata | None] = [None] * len(self.groups)
        if final:
            self.clock.set_prompt_lengths({0: max(self.length, self.clock.prompt(0))})
            self.clock.begin([0])
            steps = [PrefillMetadata.of(slots, length, self.length) for slots in self.groups]
        views = [
            PieceView(layer, prompt, self.read, self.length, angles[t], steps[g])
            for layer, prompt, g, t in zip(self.layers, self._prompts, self.group_of, rope.which)
        ]
        views[-1].last = torch.tensor([T - 1], device=views[-1].layer.device)  # of the piece
        own = [step for step in steps if step is not None]
        return PiecePass(views, True, self, end, own, length if final else None)


@dataclass(eq=False)
class PiecePass(Pass):
    """One piece between `begin` and `commit`."""

    reader: PromptReader
    end: int
    steps: list[PrefillMetadata]  # of each group of layers, if this piece is the last one
    length: Tensor | None  # (1,) of the whole prompt, if this piece is the last one

    def commit(self) -> None:
        """Note that the piece was read; after the last one the row counts its prompt."""
        reader = self.reader
        reader.read, reader._failed = self.end, False
        if self.length is not None:
            reader._prompts = []
            end_prefill(reader.clock, self.steps, self.length, [reader.length])


@dataclass(eq=False)
class PieceView:
    """A piece of a prompt attends to itself and to all that was read before."""

    layer: LayerCache
    prompt: LayerPrompt
    start: int
    length: int
    angles: Angles
    step: PrefillMetadata | None  # at the last piece
    last: Tensor | None = None
    observer: Callable[[Tensor], None] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, latent: LatentProjection | None = None) -> Tensor:
        layer, spec, prompt = self.layer, self.layer.spec, self.prompt
        rotated_q, rotated_k = (rotate(x, self.angles, spec.rope_size) for x in (q, k))
        keys, values = prompt.append("rotated", rotated_k.detach()), prompt.append("v", v.detach())
        if layer.stores_unrotated or layer.reads_tokens:
            prompt.append("unrotated", k.detach())
        queries = rotated_q
        if latent is not None:
            queries, keys, values = latent.expand(rotated_q, keys, values)
        wanted = queries if self.last is None else queries[:, :, -1:]
        if self.observer is not None:
            self.observer(wanted)
        math = {"scale": spec.scale, "softcap": spec.softcap, "window": spec.window}
        last = None if self.last is None else self.last + self.start
        sums = "mass" in layer.want
        y, lse = causal_attention(wanted, keys, values, **math, start=self.start, last=last, with_lse=sums)
        self._observe(queries.detach(), keys.detach(), lse)
        if layer.window:
            both = (rotated_q, q) if latent is None else (latent.absorb(rotated_q), latent.absorb(q))
            prompt.q, prompt.raw_q = (
                (new if old is None else torch.cat((old, new), dim=2)).detach()[:, :, -layer.window :]
                for old, new in zip((prompt.q, prompt.raw_q), both)
            )
        if self.step is not None:
            self._seed(self.step)
        return y.transpose(1, 2)  # (1, t, H, Dv)

    def _observe(self, q: Tensor, k: Tensor, lse: Tensor | None) -> None:
        """Add up the attention that this piece's queries pay to all tokens so far."""
        final = self.start + q.size(2) == self.length
        length = torch.tensor([self.start + q.size(2)], device=q.device)
        for name, mass in prompt_statistics(self.layer, q, k, length, lse, self.start, final).items():
            before = self.prompt.received.get(name)
            if before is not None and name == "mass":
                mass = mass + torch.nn.functional.pad(before, (0, mass.size(-1) - before.size(-1)))
            self.prompt.received[name] = mass

    def _seed(self, step: PrefillMetadata) -> None:
        layer, prompt, length = self.layer, self.prompt, step.length
        none = prompt.v[:, :, :0]
        q, raw_q = (none if x is None else x for x in (prompt.q, prompt.raw_q))
        unrotated = prompt.rotated if prompt.unrotated is None else prompt.unrotated
        first = self.length - q.size(2)
        tensors = prompt.rotated, unrotated, prompt.v, q, raw_q
        fresh = FreshTokens(layer.spec, *tensors, length, layer.window, first, layer.constants)
        layer.seed(step, fresh, prompt.received)
