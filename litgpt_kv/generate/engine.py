"""The engine: requests come and go at any time, and every step makes one more token of each that runs.

B rows · V vocabulary.
"""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from litgpt_kv.arguments import check_count
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import check_callable, check_type, shown
from litgpt_kv.generate.limits import vocabulary_of
from litgpt_kv.generate.prompt_scores import note_scores, tops_of
from litgpt_kv.generate.request import Output, Request, Sequence
from litgpt_kv.generate.runner import PIECE, CacheRunner, Model, RecomputeRunner, Runner
from litgpt_kv.generate.sampling import Sampler, logprobs_of
from litgpt_kv.generate.scheduler import Scheduler
from litgpt_kv.generate.text import TextStream

T = TypeVar("T")


@dataclass
class Stats:
    """What a run did.

    Attributes:
        prompt_tokens, new_tokens: Tokens read and made, by all rows.
        prefill_tokens, prefill_seconds: Tokens of prompts that were not read beside the decode steps of other rows, and
            the time that took.
        decode_tokens, decode_seconds: Tokens made after each row's first, and the time of the steps that made them;
            what the caller does between two steps is not counted.
        reasons: Why each row ended, in the order of the prompts: "stop", "length" or "error".
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


class Engine:
    """Answers requests on the rows of a cache.

    A row gives what its prompt gives alone, whatever joins or leaves meanwhile (sampled rows if they have a seed).

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        cache: Its rows take the requests. None: no cache, every text is computed again at every step.
        rows: Rows without a cache; with one, its batch size.
        prefill: How prompts are read, see `litgpt_kv.generate.stream`. prefill_chunk: As there.
        pieces: How many pieces of prompts a step reads at most, so that running rows wait no longer. None: all that
            there are, the fastest where nobody waits for single tokens; neighbours with prompts of one length are then
            read together.
        piece_size: The most tokens of such a piece, but with `pieces` None: a longer first pass over a prompt, which
            is all of it with prefill "full", is read in several that give what one gives.
        decoder: Runs the one-token steps instead of `model`, a compiled one for instance.
        decode_text: From token ids to text, if outputs shall have text.
        logprobs: Keep the log-probability of every token.
        stats: Is filled; None: an own one.

    Attributes:
        stats: What it did so far. limits: What a request must fit.

    Raises:
        ValueError: If the arguments contradict each other.
    """

    def __init__(
        self,
        model: GPT,
        cache: KVCache | None,
        *,
        rows: int | None = None,
        prefill: str = "min-length",
        prefill_chunk: int | None = None,
        pieces: int | None = 1,
        piece_size: int = PIECE,
        decoder: Model | None = None,
        decode_text: abc.Callable[[abc.Sequence[int]], str] | None = None,
        logprobs: bool = False,
        stats: Stats | None = None,
    ) -> None:
        if not (cache is None or isinstance(cache, KVCache)):
            raise ValueError(f"cache must be a KVCache or None, got {shown(cache)}.")
        size = rows if cache is None else cache.batch_size
        if not isinstance(size, int) or size < 1 or not (rows is None or (isinstance(rows, int) and rows == size)):
            raise ValueError(f"rows must be at least 1, and the cache's batch size if there is one, got {shown(rows)}.")
        if pieces is not None and not (isinstance(pieces, int) and pieces >= 1):
            raise ValueError(f"pieces must be at least 1, or None for all, got {shown(pieces)}.")
        check_count("piece_size", piece_size, 1, 2**31 - 1)
        vocabulary_of(model)  # raises for what is no model
        check_type("logprobs", logprobs, bool, "True or False")
        check_callable("decoder", decoder)
        check_callable("decode_text", decode_text)
        check_type("stats", stats, (Stats, type(None)), "Stats or None")
        self.runner: Runner
        if cache is None:
            self.runner = RecomputeRunner(model, size)
        else:
            self.runner = CacheRunner(
                model, decoder, cache, prefill, prefill_chunk, None if pieces is None else piece_size
            )
        self.limits, self.pieces = self.runner.limits, pieces
        self.scheduler = Scheduler(size)
        self.sampler = Sampler(size, self.limits.vocabulary, self.runner.device)
        self.decode_text, self.logprobs = decode_text, logprobs
        self.stats = Stats() if stats is None else stats
        self._sequences: dict[int, Sequence] = {}  # by id, those that have not ended
        self._next_id = 0
        self._token = torch.zeros(size, dtype=torch.int64, device=self.runner.device)  # the last one of each row
        self._marked: tuple[list[int], Tensor | None] = [], None
        # logits that no token was drawn from yet, kept where a step breaks off between its passes
        self._decoded: tuple[list[Sequence], Tensor | None] | None = None
        self._fresh: list[tuple[list[Sequence], Tensor]] = []

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._sequences)

    def sequence(self, id: int) -> Sequence:
        """The answer so far of a request that has not ended."""
        return self._sequences[id]

    @property
    def free(self) -> int:
        """How many more requests would get a row at the next step."""
        return self.scheduler.free

    def add(self, request: Request, row: int | None = None, state: KVCache | None = None) -> int:
        """Takes a request; it begins when a row is free.

        Args:
            request: What to answer.
            row: Go on with what this row of the cache holds; None: take any free row, which is emptied first.
            state: Go on with what this cache of one row holds, copied into a free row: `copy_of` made it.

        Returns:
            Its id.

        Raises:
            TypeError: If it is no `Request`.
            ValueError: If it does not fit, or its id is in use.
        """
        if not isinstance(request, Request):
            raise TypeError(f"An engine takes a Request, got {shown(request)}.")
        size = self.runner.size
        if row is not None and (isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < size):
            raise ValueError(f"The engine has rows 0 to {size - 1}, got {shown(row)}.")
        number = self._next_id if request.id is None else request.id
        if number in self._sequences:
            raise ValueError(f"The id {number} is in use: wait until its request has ended, or abort it.")
        seen = 0
        if state is not None:
            self.runner.check_state(state, row)
            seen = state.seen[0]
        elif row is not None:
            self.runner.check_continues(row)
            seen = self.runner.seen(row)
        self.limits.check(request, f"Prompt {number}", seen)
        self._next_id = max(self._next_id, number) + 1
        sequence = Sequence(request, number, row=-1 if row is None else row, continues=row is not None, state=state)
        if self.decode_text is not None:
            sequence.stream = TextStream(self.decode_text, sequence.prompt, request.stop_texts)
        self._sequences[number] = sequence
        self.scheduler.add(sequence)
        return number

    def abort(self, id: int) -> bool:
        """Ends a request; its row is free at the next step. Returns whether it had not ended before."""
        check_type("id", id, int, "the id of a request")
        sequence = self._sequences.get(id)
        if sequence is None:
            return False
        self._finish(sequence, "abort")
        return True

    def copy_of(self, sequence: Sequence) -> KVCache:
        """A copy of what the row of an ended sequence holds, before the next step; the last token drawn is not in it.

        Raises:
            ValueError: Without a cache, or if a step of the row broke off.
        """
        if not isinstance(self.runner, CacheRunner):
            raise ValueError("Without a cache there is nothing to copy.")
        return self.runner.cache.row(sequence.row).repeat(1)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """One more token of every running row, then pieces of waiting prompts, whose rows draw their first token.

        Returns:
            What was added to each answer that drew a token. Nothing if there is nothing to do, or if prompts were read
            and are not at their end; `unfinished` tells.

        Raises:
            Exception: What the model raises. The requests that took part in this pass end with an error; the others go
                on at the next step.
        """
        if not self._sequences:
            return []
        began = time.perf_counter()
        if self._decoded is None:
            running = self.scheduler.running()
            self._decoded = running, self._decode(running) if running else None
        running, logits = self._decoded
        decoding, decoded = any(s.last >= 0 for s in running), time.perf_counter()  # beside those that only read
        while len(self._fresh) != self.pieces and (group := self._next_to_read()):
            self._fresh.append((group, self._read(group)))
        fresh, read = self._fresh, time.perf_counter()
        self._decoded, self._fresh = None, []
        in_step = {s.row: s for group in (running, *(group for group, _ in fresh)) for s in group}
        ready = [s for s in in_step.values() if s.ready and s.reason is None]
        outputs = self._guarded(ready, self._draw, ready, self._joined(logits, fresh)) if ready else []
        rest = decoded - began + time.perf_counter() - read
        self.stats.prefill_seconds += read - decoded + (0 if decoding else rest)
        self.stats.decode_seconds += rest if decoding else 0
        return outputs

    def _decode(self, running: list[Sequence]) -> Tensor:
        """One more token for every running row, what it drew or the next one of its prompt: logits (B, V)."""
        if reading := [s for s in running if not s.ready]:
            forced = [-1] * self.runner.size
            for sequence in reading:
                forced[sequence.row] = sequence.prompt[sequence.read]
            given = torch.tensor(forced).to(self.runner.device, non_blocking=True)
            self._token = torch.where(given < 0, self._token, given)
        logits = self._guarded(running, self.runner.decode, self._token, {s.row for s in running})
        for sequence in reading:
            if sequence.request.prompt_logprobs:
                note_scores(sequence, sequence.read, logits[sequence.row].unsqueeze(0))
            sequence.read += 1
        self.stats.prompt_tokens += len(reading)
        self.stats.prefill_tokens += len(reading) if len(reading) == len(running) else 0
        return logits

    def _next_to_read(self) -> list[Sequence]:
        if admitted := self.scheduler.admit():
            now = time.perf_counter()
            for sequence in admitted:
                sequence.began = now
                self.runner.start(sequence)
                if not self.runner.piece_size(sequence):
                    self.scheduler.finish_reading(sequence)
            self.sampler.assign({s.row: s.request for s in admitted})
        return self.scheduler.next_to_read(self.pieces is None, self.runner.piece_size)

    def _read(self, group: list[Sequence]) -> Tensor:
        """The next piece of some prompts of neighbouring rows: logits (N, V)."""
        before = group[0].read
        logits = self._guarded(group, self.runner.read_piece, group)
        tokens = (group[0].read - before) * len(group)
        self.stats.prompt_tokens += tokens
        self.stats.prefill_tokens += tokens
        for sequence in group:
            if not self.runner.piece_size(sequence):
                self.scheduler.finish_reading(sequence)
        return logits

    def _joined(self, logits: Tensor | None, fresh: list[tuple[list[Sequence], Tensor]]) -> Tensor:
        """Logits (B, V) of decode steps and of prompts."""
        for group, read in fresh:
            if len(group) == self.runner.size:
                logits = read
            else:
                logits = read.new_zeros(self.runner.size, read.size(-1)) if logits is None else logits
                rows = torch.tensor([s.row for s in group], device=logits.device)
                logits = logits.index_copy(0, rows, read)
        return logits

    def _draw(self, ready: list[Sequence], logits: Tensor) -> list[Output]:
        drawing = self._mask([s.row for s in ready])
        drawn = self.sampler(logits, drawing)
        drawn = drawn if drawing is None else torch.where(drawing, drawn, self._token)
        self._token = drawn.clamp(min=0)
        wanted = [s.request.logprobs for s in ready if s.request.logprobs is not None]
        odds = logprobs_of(logits, self._token) if self.logprobs or wanted else None
        chosen, odds = _to_host(drawn, odds)  # the one copy to the host
        tops = tops_of(logits, max(wanted)) if any(wanted) else None
        now, outputs = time.perf_counter(), []
        for sequence in ready:
            row = sequence.row
            if chosen[row] < 0:
                sequence.fail(no_token(sequence, self.limits.vocabulary))
            else:
                self.stats.new_tokens += 1
                self.stats.decode_tokens += sequence.last >= 0
                count = sequence.request.logprobs
                wants = self.logprobs or count is not None
                sequence.push(chosen[row], odds[row] if wants else None, tops[row][:count] if tops and count else None)
            sequence.first = sequence.first or now
            outputs.append(Output(sequence.index, sequence.new, sequence.piece, sequence.reason, sequence))
            if sequence.reason is not None:
                self._finish(sequence, sequence.reason, now)
        return outputs

    def _mask(self, rows: list[int]) -> Tensor | None:
        """Marks some rows (B,), None for all; the same as before is not copied to the device again."""
        size = self.runner.size
        if len(rows) == size:
            return None
        if rows != self._marked[0]:
            inside = set(rows)
            marks = torch.tensor([row in inside for row in range(size)])
            self._marked = rows, marks.to(self.runner.device, non_blocking=True)
        return self._marked[1]

    def _guarded(self, sequences: list[Sequence], run: abc.Callable[..., T], *args: object) -> T:
        """Runs a pass for some sequences; if it breaks off, their rows hold nothing of use, and they end."""
        try:
            return run(*args)
        except BaseException as error:
            for sequence in (s for s in sequences if s.reason is None):
                sequence.error = f"A step broke off: {type(error).__name__}: {error}"
                self.runner.discard(sequence.row)
                self._finish(sequence, "error")
            raise

    def _finish(self, sequence: Sequence, reason: str, now: float | None = None) -> None:
        sequence.reason, sequence.ended = reason, time.perf_counter() if now is None else now
        self.scheduler.remove(sequence)
        del self._sequences[sequence.index]


def no_token(sequence: Sequence, vocabulary: int) -> str:
    """Why no token could be drawn for a sequence."""
    request, made = sequence.request, sequence.made
    stops = {stop[0] for stop in request.stop if len(stop) == 1 and 0 <= stop[0] < vocabulary}
    if made < request.min_new_tokens and len(stops) == vocabulary:
        return f"min_new_tokens {request.min_new_tokens} bans all {vocabulary} tokens: each of them is a stop sequence."
    return (
        f"The model's logits are not finite after {made} new tokens: a weight is damaged, or numbers overflow "
        "(in 16 bit, try precision 32-true)."
    )


def _to_host(token: Tensor, odds: Tensor | None) -> tuple[list[int], list[float] | list[None]]:
    if odds is None:
        return token.tolist(), [None] * token.numel()
    both = torch.stack((token, odds.view(torch.int32).long())).cpu()
    return both[0].tolist(), both[1].int().view(torch.float32).tolist()
