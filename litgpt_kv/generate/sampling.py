"""Choose the next token of all rows at once; temperature, top-k and top-p mean the same as in litgpt.

B rows · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from litgpt_kv.config import SamplingArgs
from litgpt_kv.generate.request import Request

MIN_TEMPERATURE = 1e-5  # below it a row is greedy: dividing by the temperature would overflow


class Sampler:
    """Draw a token for each row, on the device. Each row has the settings of its current request.

    With a seed, the random numbers of a row depend only on the seed and the number of tokens it has made, so a row of a
    batch draws the same tokens as its prompt alone. Without a seed, torch's global generator is used; if other rows
    have seeds, it draws a seed for this row.

    Args:
        batch_size: The number of rows, B.
        vocabulary: The size of the vocabulary, V.
        device: The device of the logits.
    """

    def __init__(self, batch_size: int, vocabulary: int, device: torch.device) -> None:
        self.size, self.device = (batch_size, vocabulary), device
        self.args = [SamplingArgs()] * batch_size
        self._drawn_seeds = [0] * batch_size  # for rows without a seed, among rows with one; -1: not drawn yet
        self.made = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.min_new_tokens = [0] * batch_size
        self.seen: Tensor | None = None  # (B, V) bool, the tokens in a row's text, for repetition penalties
        self.banned: Tensor | None = None  # (B, V) bool, tokens that end a row, banned before min_new_tokens
        self.counts: Tensor | None = None  # (B, V) int32, occurrences in the new text, for the other penalties

    def assign(self, requests: Mapping[int, Request]) -> None:
        """Set the settings of rows to those of new requests, given by row."""
        for b, request in requests.items():
            self.args[b], self.min_new_tokens[b] = request.sampling, request.min_new_tokens
            if request.sampling.seed is None:
                self._drawn_seeds[b] = -1  # drawn only if needed, so that a run without seeds equals litgpt's
            stops = [stop[0] for stop in request.stop if len(stop) == 1 and 0 <= stop[0] < self.size[1]]
            if request.min_new_tokens and stops:
                self.banned = self._marks(self.banned, b, torch.tensor(stops, device=self.device))
            elif self.banned is not None:
                self.banned[b] = False
            if request.sampling.repetition_penalty != 1.0:
                text = torch.cat(
                    [torch.as_tensor(t).to(self.device, torch.int64) for t in (request.past, request.prompt)]
                )
                self.seen = self._marks(self.seen, b, text)
            if self.counts is None and (request.sampling.frequency_penalty or request.sampling.presence_penalty):
                self.counts = torch.zeros(self.size, dtype=torch.int32, device=self.device)
            if self.counts is not None:
                self.counts[b] = 0
        self.made[list(requests)] = 0
        self._resolve()

    def _marks(self, marks: Tensor | None, row: int, tokens: Tensor) -> Tensor:
        """Mark tokens of a row in marks (B, V) bool, and clear its other marks."""
        marks = torch.zeros(self.size, dtype=torch.bool, device=self.device) if marks is None else marks
        marks[row] = False
        marks[row, tokens] = True
        return marks

    def _resolve(self) -> None:
        """Copy the rows' settings to the device; a setting that no row uses becomes None."""
        rows, put = self.args, lambda values: torch.tensor(values, device=self.device)
        greedy = [is_cold(a) or a.top_p == 0 for a in rows]
        self.greedy, self.all_greedy = put(greedy) if any(greedy) else None, all(greedy)
        V = self.size[1]
        counts = [V if a.top_k is None else min(a.top_k, V) for a in rows]
        self.top_k = put(counts).unsqueeze(-1) if min(counts) < V else None
        self.max_top_k = max((n for n in counts if n < V), default=V)
        self.top_p = None if all(a.top_p == 1.0 for a in rows) else put([a.top_p for a in rows])
        self.min_p = None if all(a.min_p == 0 for a in rows) else put([float(a.min_p) for a in rows])
        self.temperature = put([1.0 if is_cold(a) or a.temperature is None else float(a.temperature) for a in rows])
        penalties = [float(a.repetition_penalty) for a in rows]
        self.penalty = put(penalties).unsqueeze(-1) if any(p != 1.0 for p in penalties) else None
        self.frequency, self.presence = (
            put([float(getattr(a, name)) for a in rows]).unsqueeze(-1) if any(getattr(a, name) for a in rows) else None
            for name in ("frequency_penalty", "presence_penalty")
        )
        self.minimum = put(self.min_new_tokens) if any(self.min_new_tokens) else None
        self.seeds = None
        if any(a.seed is not None for a in rows):
            for b, args in enumerate(rows):
                if args.seed is None and self._drawn_seeds[b] < 0:
                    self._drawn_seeds[b] = int(torch.randint(2**62, ()))
            self.seeds = put([self._drawn_seeds[b] if a.seed is None else a.seed for b, a in enumerate(rows)])

    def __call__(self, logits: Tensor, drawing: Tensor | None = None) -> Tensor:
        """Draw one token for each row, on the device.

        Args:
            logits: (B, V). -inf bans a token.
            drawing: (B,) bool, the rows whose tokens are used; None: all.

        Returns:
            (B,) int64; -1 for a row that has no distribution, because a logit is NaN or +inf, or all are -inf.
        """
        logits = self._adjusted(logits)
        token = logits.argmax(dim=-1)
        greatest = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1).float()  # NaN if the row has one
        if not self.all_greedy:
            greatest = greatest / self.temperature  # overflows if the division in `probabilities` does
            drawn = self._draw(self.probabilities(logits))
            token = drawn if self.greedy is None else torch.where(self.greedy, token, drawn)
        if self.seen is not None or self.counts is not None:
            where = token.unsqueeze(-1)
            used = torch.ones_like(where, dtype=torch.bool) if drawing is None else drawing.unsqueeze(-1)
            if self.seen is not None:
                self.seen.scatter_(-1, where, used | self.seen.gather(-1, where))
            if self.counts is not None:
                self.counts.scatter_add_(-1, where, used.int())
        self.made += 1 if drawing is None else drawing
        return torch.where(greatest.isfinite(), token, -1)

    def _draw(self, probs: Tensor) -> Tensor:
        # argmax(probs / exponential noise) is a draw from probs. torch.multinomial does the same for one token, but it
        # synchronizes with the device to check the probabilities, and one bad row makes all rows fail.
        if self.seeds is None:
            noise = torch.empty_like(probs).exponential_()
        else:
            noise = exponential(self.seeds, self.made, probs.size(-1))
        return (probs / noise).argmax(dim=-1)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Apply the penalties, and ban the tokens that would end a row too early."""
        if self.penalty is not None and self.seen is not None:
            logits = logits.float()
            punished = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(self.seen & (self.penalty != 1.0), punished, logits)
        if self.counts is not None and (self.frequency is not None or self.presence is not None):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if self.frequency is not None:
                logits = logits - self.frequency * self.counts
            if self.presence is not None:
                logits = logits - self.presence * (self.counts > 0)
        if self.minimum is not None and self.banned is not None:
            early = (self.made < self.minimum).unsqueeze(-1)
            logits = logits.masked_fill(self.banned & early, float("-inf"))
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distribution (B, V) float32 after top-k, temperature, top-p and min-p, in this order."""
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
        if self.min_p is not None:  # top-p keeps the most probable token, so either order keeps the same tokens
            probs = probs.masked_fill(probs < self.min_p.unsqueeze(-1) * probs.amax(dim=-1, keepdim=True), 0.0)
        return probs

    def _crop(self, logits: Tensor) -> Tensor:
        """Keep the logits of each row's top-k tokens; among equal ones the first, independent of the other rows."""
        last = (self.top_k - 1).clamp(max=self.max_top_k - 1)
        least = logits.topk(self.max_top_k, dim=-1).values.gather(-1, last)  # (B, 1)
        above, equal = logits > least, logits == least
        room = self.top_k - above.sum(dim=-1, keepdim=True)
        keep = above | (equal & (equal.cumsum(dim=-1) <= room)) | (self.top_k == self.size[1])
        return logits.masked_fill(~keep, float("-inf"))


def is_cold(args: SamplingArgs) -> bool:
    """Return whether a row's temperature is so low that it takes the most probable token."""
    return args.temperature is not None and args.temperature < MIN_TEMPERATURE


def logprobs_of(logits: Tensor, token: Tensor) -> Tensor:
    """Return the log-probabilities (B,) float32 of tokens (B,) under unchanged logits (B, V)."""
    return logits.float().log_softmax(dim=-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens under logits (B, V): log-probabilities (B, count) float32 and tokens (B, count)."""
    values, tokens = logits.float().log_softmax(dim=-1).topk(count, dim=-1)
    return values, tokens


def exponential(seed: Tensor, step: Tensor, size: int) -> Tensor:
    """Return exponential noise (B, size) float32, a pure function of seed (B,), step (B,) and the index.

    The mixing is that of splitmix64 (Steele, Lea, Flood 2014) on wrapping int64; the upper 53 bits give the uniform.
    """
    index = torch.arange(size, device=seed.device)
    state = _mix(_mix(seed).add(step * _GOLDEN).unsqueeze(-1)) + index * _GOLDEN  # (B, size)
    if seed.device.type == "mps":  # MPS has no float64
        return ((_mix(state) >> 40) & (2**24 - 1)).float().add_(0.5).mul_(2.0**-24).log_().neg_()
    uniform = ((_mix(state) >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().float()


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor  # a logical shift: the sign bit is shifted, too
    return x
