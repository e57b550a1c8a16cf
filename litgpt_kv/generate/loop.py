"""The loop of every generation: rows read their prompts, draw tokens, end, and make room for the next. Floor 5.

B rows · V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt_kv.generate.request import Row
from litgpt_kv.generate.runners import Cached, Prompts, Recompute
from litgpt_kv.generate.sampling import Sampler, logprobs_of


@dataclass
class Stats:
    """What a run did.

    Attributes:
        prompt_tokens, new_tokens: Tokens read and made, by all rows.
        prefill_tokens, prefill_seconds: Tokens read before a row's first new one was drawn without a step of the others
            between, and the time that took.
        decode_tokens, decode_seconds: Tokens made after each row's first, and the time of the steps that made them;
            what the caller does between two steps is not counted.
        reasons: Why each row ended, in the order of the prompts: "stop" or "length".
        logprobs: If asked for, the log-probability of each row's new tokens under the model's own distribution, before
            temperature and all other settings.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    reasons: list[str | None] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


class Loop:
    """Runs rows to their end; when one ends, the next that waits takes its place.

    Args:
        run: The model and its memory.
        rows: The first row of each place.
        waiting: Those that follow, taken one at a time, when there is room.
        sampler: Has the first rows' settings.
        stats: Is filled.
        logprobs: Whether to note the log-probability of every token.
    """

    def __init__(
        self,
        run: Cached | Recompute,
        rows: list[Row],
        waiting: Iterable[Row],
        sampler: Sampler,
        stats: Stats,
        logprobs: bool = False,
    ) -> None:
        self.run, self.rows, self.waiting, self.sample = run, rows, iter(waiting), sampler
        self.stats, self.logprobs = stats, logprobs

    @torch.inference_mode()
    def steps(self) -> Iterator[list[Row]]:
        """For each draw the rows that took part in it; one that has a `reason` ended and is seen for the last time."""
        self._begin()
        while True:
            while ready := [b for b in sorted(self._fresh) if self.rows[b].ready]:
                self._draw(ready)
                yield [self.rows[b] for b in ready]
                self._clock = time.perf_counter()
                self._replace([b for b in ready if self.rows[b].reason is not None])
            if all(row.reason for row in self.rows):
                return
            self._step()

    def _begin(self) -> None:
        self._clock = time.perf_counter()
        rows = [row for row in self.rows if row.reason is None]  # those that are left over stand at the end
        batch = Prompts.of([row.request.prompt for row in rows], self.sample.size[1], self.run.device)
        self._logits, read = self.run.begin(batch)  # (B, V)
        for row, n in zip(rows, read):
            row.read, row.began = n, self._clock
        self.stats.prompt_tokens = sum(read)
        self._prompts = [_as_list(row) for row in self.rows]
        self._token = torch.zeros(len(self.rows), dtype=torch.int64, device=self.run.device)
        self._fresh = set(range(len(rows)))  # whose logits follow the last token that they have read
        self._prefilling = True
        self._marked: tuple[list[int], Tensor | None] = [], None

    def _draw(self, ready: list[int]) -> None:
        drawing = self._mask(ready)
        drawn = self.sample(self._logits, drawing)
        drawn = drawn if drawing is None else torch.where(drawing, drawn, self._token)
        self._token = drawn.clamp(min=0)
        odds = logprobs_of(self._logits, self._token) if self.logprobs else None
        chosen, odds = _to_host(drawn, odds)  # the one copy to the host
        now, stats = time.perf_counter(), self.stats
        if stats.new_tokens == 0:
            stats.prefill_tokens = stats.prompt_tokens
        if self._prefilling:
            stats.prefill_seconds += now - self._clock
        else:
            stats.decode_seconds += now - self._clock
        drew = [b for b in ready if chosen[b] >= 0]
        stats.new_tokens += len(drew)
        stats.decode_tokens += sum(self.rows[b].first > 0 for b in drew)
        for b in ready:
            row = self.rows[b]
            if chosen[b] < 0:
                row.fail(no_token(row, self.sample.size[1]))
            else:
                row.push(chosen[b], odds[b])
            row.first, row.ended = row.first or now, now
        self._prefilling = False

    def _mask(self, rows: list[int]) -> Tensor | None:
        """Marks some rows (B,), None for all; the same as before is not copied to the device again."""
        if len(rows) == len(self.rows):
            return None
        if rows != self._marked[0]:
            inside = set(rows)
            marks = torch.tensor([b in inside for b in range(len(self.rows))])
            self._marked = rows, marks.to(self.run.device, non_blocking=True)
        return self._marked[1]

    def _replace(self, ended: list[int]) -> None:
        """The next that wait take the places of rows that ended."""
        self._fresh = set()
        left = []
        for b in ended:
            if (row := next(self.waiting, None)) is None:
                left.append(b)
                continue
            self.rows[b], self._prompts[b] = row, _as_list(row)
            row.began = time.perf_counter()
            self.sample.place({b: row.request})
            logits, row.read = self.run.admit(b, torch.tensor(self._prompts[b]))
            self._logits = self._logits.index_copy(0, torch.tensor([b], device=logits.device), logits)
            self.stats.prompt_tokens += row.read
            self.stats.prefill_tokens += row.read if row.ready else 0
            self._fresh.add(b)
        self._prefilling = any(self.rows[b].ready for b in self._fresh)
        if left:
            self.run.retire(left)

    def _step(self) -> None:
        """One more token for every row: what it drew, or the next one of its prompt."""
        live = [b for b, row in enumerate(self.rows) if row.reason is None]
        if reading := [b for b in live if not self.rows[b].ready]:
            forced = [-1] * len(self.rows)
            for b in reading:
                forced[b] = self._prompts[b][self.rows[b].read]
            given = torch.tensor(forced).to(self.run.device, non_blocking=True)
            self._token = torch.where(given < 0, self._token, given)
        self._logits = self.run.step(self._token)
        self.stats.prompt_tokens += len(reading)
        for b in live:
            self.rows[b].read += 1
        self._fresh, self._prefilling = set(live), self.stats.new_tokens == 0


def no_token(row: Row, vocabulary: int) -> str:
    """Why no token could be drawn for a row."""
    request, made = row.request, row.made
    stops = {stop[0] for stop in request.stop if len(stop) == 1 and 0 <= stop[0] < vocabulary}
    if made < request.min_new_tokens and len(stops) == vocabulary:
        return f"min_new_tokens {request.min_new_tokens} bans all {vocabulary} tokens: each of them is a stop sequence."
    return (
        f"The model's logits are not finite after {made} new tokens: a weight is damaged, or numbers overflow "
        "(in 16 bit, try precision 32-true)."
    )


def _as_list(row: Row) -> list[int]:
    prompt = row.request.prompt
    return prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)


def _to_host(token: Tensor, odds: Tensor | None) -> tuple[list[int], list[float] | list[None]]:
    if odds is None:
        return token.tolist(), [None] * token.numel()
    both = torch.stack((token, odds.view(torch.int32).long())).cpu()
    return both[0].tolist(), both[1].int().view(torch.float32).tolist()
