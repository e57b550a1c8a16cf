"""What heads attend to, measured over texts: which of them retrieve, and the budget that each layer and head deserves.

Both read texts forwards only, without a cache and without training, one text at a time.

T tokens · n queries that count · H query heads · G key/value heads · R = H / G · D head size · C embedding size · L
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litgpt_kv.attention.causal import received_attention
from litgpt_kv.attention.eager import slot_attention
from litgpt_kv.attention.masks import visible
from litgpt_kv.attention.rope import rotate
from litgpt_kv.cache.constants import weight_of
from litgpt_kv.model import GPT


@torch.no_grad()
def retrieval_gates(
    model: GPT, texts: Iterable[tuple[Sequence[int], int]], sinks: int = 16, recent: int = 64
) -> dict[str, Tensor]:
    """How much each head's output changes when it sees only the first and the last tokens: high for heads that
    retrieve.

    DuoAttention (Xiao et al. 2024, arXiv 2410.10819) tells retrieval heads from streaming heads by training a gate for
    each key/value head, on texts with passkeys, so that the last hidden state stays while few gates are open. This is
    forward only: each head is restricted alone, with all others whole, and what counts is the change of the layer's
    output (L2, after the output projection) relative to the output of all its heads, averaged over the queries that
    recall passkeys. It knows nothing of heads that stand in for each other, which training does. The gates are ranks:
    from 0 for the head that changes least to just below 1.

    Args:
        model: A model whose attention is not latent, whole on one device.
        texts: Token ids of texts, and how many of their last tokens recall something.
        sinks, recent: First and last tokens that a restricted head sees.

    Returns:
        By layer, as a calibration file has them: `layers.{i}.gate` (H,) float32, the same for all heads of a group.

    Raises:
        ValueError: If there is no text, a text is too short or too long, or the model's attention is latent.
    """
    G, changes = _groups(model), torch.zeros(len(model.transformer.h), model.config.n_head, dtype=torch.float64)
    count = 0
    projections = [weight_of(block.attn.proj).unflatten(1, (model.config.n_head, -1)) for block in model.transformer.h]

    def note(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        pos = torch.arange(k.size(2), device=k.device)
        own = pos[-n:].unsqueeze(0)
        spec = model.transformer.h[layer].attn.spec
        outputs = []
        for window, first in ((spec.window, 0), (min(recent, spec.window or recent), sinks)):
            mask = visible(own, pos.unsqueeze(0), window, first).unsqueeze(1)  # (1, 1, n, T)
            y, _ = slot_attention(q[:, :, -n:], k, v, mask, scale=spec.scale, softcap=spec.softcap)
            outputs.append(torch.einsum("htd,chd->htc", y[0].float(), projections[layer].float()))
        whole = outputs[0].sum(dim=0).norm(dim=-1)  # (n,)
        changes[layer] += ((outputs[1] - outputs[0]).norm(dim=-1) / whole.clamp(min=1e-9)).double().sum(dim=1).cpu()

    for row, n in texts:
        if not sinks + recent < n + sinks + recent < len(row):
            raise ValueError(
                f"A text must recall something in its last tokens and be longer than those, sinks {sinks} and recent "
                f"{recent}, got {len(row)} tokens that recall in the last {n}."
            )
        _read(model, row, note)
        count += n
    if not count:
        raise ValueError("Calibration needs at least one text.")
    grouped = changes.unflatten(1, (G, -1)).mean(dim=2)  # (L, G): one key/value head is whole or not
    rank = grouped.flatten().argsort().argsort().view_as(grouped) / grouped.numel()
    gates = rank.float().repeat_interleave(model.config.n_head // G, dim=1)
    return {f"layers.{i}.gate": gate.clone() for i, gate in enumerate(gates)}


@torch.no_grad()
def deserved_budgets(model: GPT, rows: Iterable[Sequence[int]], keep: float = 0.25) -> dict[str, Tensor]:
    """The share of one budget that each layer and head deserves: its part of the tokens that will be attended to most.

    Of each text the second half's queries say how much attention each token of the first half receives; among the
    tokens of all layers and heads the best `keep` are marked, as a budget over all layers would keep them if it knew
    what comes. A head's share is how many of its own are marked, relative to the mean.

    Args:
        model: A model whose attention is not latent, whole on one device.
        rows: Token ids of texts, each of at least 8 tokens and at most the model's context.
        keep: The part of the tokens that is kept, over 0 and below 1.

    Returns:
        By layer, as a calibration file has them: `layers.{i}.share` (H,) float32, the same for all heads of a group;
        their mean over layers and heads is 1.

    Raises:
        ValueError: If there is no text, a text is too short or too long, or the model's attention is latent.
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep must be over 0 and below 1, got {keep}.")
    G, L = _groups(model), len(model.transformer.h)
    shares, count, received = torch.zeros(L, G, dtype=torch.float64), 0, {}

    def note(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        spec, T = model.transformer.h[layer].attn.spec, k.size(2)
        length = torch.tensor([T], device=k.device)
        math: dict[str, Any] = {"scale": spec.scale, "softcap": spec.softcap, "window": spec.window}
        received[layer] = received_attention(q, k, length, T - T // 2, **math)[0, :, : T // 2].cpu()  # (G, T / 2)

    for row in rows:
        if len(row) < 8:
            raise ValueError(f"A text must have at least 8 tokens, got {len(row)}.")
        _read(model, row, note)
        mass = torch.stack([received[i] for i in range(L)])  # (L, G, T / 2)
        best = mass.flatten().argsort(descending=True)[: max(1, round(keep * mass.numel()))]
        marked = torch.zeros(mass.numel(), dtype=torch.float64)
        marked[best] = 1.0
        shares += marked.view_as(mass).sum(dim=-1) / len(best) * (L * G)
        count += 1
    if not count:
        raise ValueError("Calibration needs at least one text.")
    shares = (shares / count).float().repeat_interleave(model.config.n_head // G, dim=1)
    return {f"layers.{i}.share": share.clone() for i, share in enumerate(shares)}


def _groups(model: GPT) -> int:
    """Key/value heads, G; ValueError for latent attention, whose heads share one cached token."""
    spec = model.transformer.h[0].attn.spec
    if spec.latent:
        raise ValueError(
            "What heads attend to is measured where heads have keys of their own, not for latent attention."
        )
    return spec.groups


def _read(model: GPT, row: Sequence[int], note: Callable[[int, Tensor, Tensor, Tensor], None]) -> None:
    """Read one text; `note(layer, q, k, v)` gets the rotated queries and keys, and the values, of every layer."""
    if len(row) > model.max_seq_length:
        raise ValueError(f"A text must have at most {model.max_seq_length} tokens (the context), got {len(row)}.")
    rope = model.rope()
    angles = rope.slice(0, len(row))

    def before(layer: int, attn: Any) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            q, k, v = attn.project(args[0])
            q, k = (rotate(x, angles[rope.which[layer]], attn.spec.rope_size) for x in (q, k))
            note(layer, q, k, v)

        return hook

    hooks = [b.attn.register_forward_pre_hook(before(i, b.attn)) for i, b in enumerate(model.transformer.h)]
    try:
        model(torch.tensor([list(row)], device=model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
