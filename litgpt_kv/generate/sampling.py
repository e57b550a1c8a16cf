"""Choosing the next token of every row at once, with litgpt's meaning of temperature, top-k and top-p. Floor 5.

B rows · V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litgpt_kv.config import SamplingArgs, per_row


class Sampler:
    """Draws a token a row, on the device.

    With a seed, a row's noise depends on its own seed and on how many tokens it has made, on nothing else: a row of a
    batch draws what its prompt draws alone. Without one, torch's global generator draws for all rows.

    Args:
        args: What to draw; values for all rows or one a row.
        batch_size: Rows, B.
        device: Of the logits.
    """

    def __init__(self, args: SamplingArgs, batch_size: int, device: torch.device) -> None:
        values = {name: per_row(name, getattr(args, name), batch_size) for name in ("temperature", "top_k", "top_p")}
        seeds = per_row("seed", args.seed, batch_size)
        if any(s is None for s in seeds) != all(s is None for s in seeds):
            raise ValueError(f"seed must be given for every row or for none, got {seeds}.")
        self.seeds = None if seeds[0] is None else torch.tensor(seeds, dtype=torch.int64, device=device)
        rows = list(zip(*values.values()))
        greedy = [t == 0 or p == 0 for t, _, p in rows]
        self.greedy = None if not any(greedy) else torch.tensor(greedy, device=device)
        self.all_greedy = all(greedy)
        self.top_k = None if all(k is None for _, k, _ in rows) else [k for _, k, _ in rows]
        self.top_p = None if all(p == 1.0 for _, _, p in rows) else torch.tensor([p for *_, p in rows], device=device)
        self.temperature = torch.tensor([t or 1.0 for t, *_ in rows], device=device)
        self.made = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, drawing: Tensor) -> Tensor:
        """Tokens (B,) int64 from logits (B, V); `drawing` (B,) bool marks the rows whose token will be used."""
        best = logits.argmax(dim=-1)
        if self.all_greedy:
            return best
        probs = self.probabilities(logits)
        if self.seeds is None:
            token = torch.multinomial(probs, 1).squeeze(-1)
        else:  # the most probable of probs / exponential noise is a draw from probs
            token = (probs / exponential(self.seeds, self.made, logits.size(-1))).argmax(dim=-1)
        self.made += drawing
        return token if self.greedy is None else torch.where(self.greedy, best, token)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, (B, V) float32: the logits after top-k, temperature and top-p, in this order."""
        logits = logits.float()
        if self.top_k is not None:
            logits = self._crop(logits)
        probs = (logits / self.temperature.unsqueeze(-1)).softmax(dim=-1)
        if self.top_p is not None:
            ascending, index = probs.sort(dim=-1, stable=True)
            drop = ascending.cumsum(dim=-1) <= (1 - self.top_p).unsqueeze(-1)
            drop[:, -1] = False  # the most probable token always stays
            drop &= (self.top_p < 1).unsqueeze(-1)
            probs = probs.masked_fill(drop.gather(-1, index.argsort(dim=-1)), 0.0)
        return probs

    def _crop(self, logits: Tensor) -> Tensor:
        V = logits.size(-1)
        counts = [V if k is None else min(k, V) for k in self.top_k]
        best, index = logits.topk(max(counts), dim=-1)
        rank = torch.arange(max(counts), device=logits.device)
        outside = rank >= torch.tensor(counts, device=logits.device).unsqueeze(-1)
        best = best.masked_fill(outside, float("-inf"))
        return torch.full_like(logits, float("-inf")).scatter(-1, index, best)


def exponential(seed: Tensor, step: Tensor, size: int) -> Tensor:
    """Exponential noise (B, size) float32 that is a pure function of seed (B,), step (B,) and the index.

    The mixing is that of splitmix64 (Steele, Lea, Flood 2014) on wrapping int64; the upper 53 bits give the uniform.
    """
    index = torch.arange(size, device=seed.device)
    state = _mix(_mix(seed).add(step * _GOLDEN).unsqueeze(-1)) + index * _GOLDEN  # (B, size)
    uniform = ((_mix(state) >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().float()


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor  # a logical shift: the sign is a bit like others
    return x
