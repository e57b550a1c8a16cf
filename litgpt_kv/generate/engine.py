"""The engine: requests are added and aborted at any time, and each step makes one token for every running one.

B rows · V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections import abc
from dataclasses import dataclass, field

import torch
from torch import Tensor

from litgpt_kv.arguments import check_count
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import check_callable, check_type, shown
from litgpt_kv.generate.limits import vocabulary_of
from litgpt_kv.generate.prompt_scores import note_scores, tops_of
from litgpt_kv.generate.request import Output, PromptGroup, Request, Sequence
from litgpt_kv.generate.runner import PIECE, CacheRunner, Model, RecomputeRunner, Runner
from litgpt_kv.generate.sampling import Sampler, logprobs_of
from litgpt_kv.generate.scheduler import Scheduler
from litgpt_kv.generate.text import TextStream


@dataclass
class Stats:
    """Tokens and seconds of a run.

    Attributes:
        prompt_tokens, new_tokens: Prompt tokens read and new tokens made, by all rows.
        prefill_tokens, prefill_seconds: Prompt tokens that were read in passes of their own, not in the decode steps of
            other rows, and the seconds of these passes.
        decode_tokens, decode_seconds: New tokens after the first one of each row, and the seconds of the decode steps;
            the time that the caller takes between two steps is not counted.
        compile_seconds: The seconds in which decode steps were compiled, which are in no other number.
        reasons: Why each row ended, in the order of the prompts: "stop", "length" or "error".
        logprobs: With `logprobs`, the log-probability of each row's new tokens under the model's own distribution,
            before temperature and all other settings.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    reasons: list[str | None] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)

    def add(self, other: Stats) -> None:
        """Add the tokens and seconds of another run."""
        for name in ("prompt_tokens", "new_tokens", "prefill_tokens", "decode_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.prefill_seconds += other.prefill_seconds
        self.decode_seconds += other.decode_seconds
        self.compile_seconds += other.compile_seconds


class Engine:
    """Answer requests on the rows of a cache.

    A request gives the same tokens as its prompt alone, no matter which other requests run (if it is sampled, it needs
    a seed).

    Args:
        model: A `litgpt_kv.GPT`, plain, compiled or wrapped.
        cache: The cache; each running request has one of its rows. None: no cache, every step computes the whole texts
            again.
        rows: The number of rows without a cache; with one, its batch size.
        prefill, prefill_chunk: How prompts are read, see `litgpt_kv.generate.stream`.
        pieces: The most pieces of prompts that a step reads, which limits how long running rows wait. None: no limit,
            the fastest if nobody waits for single tokens; prompts of the same length in neighbouring rows are then read
            together.
        piece_size: The most tokens of a piece. A longer first pass over a prompt (with prefill "full", the whole
            prompt) is read in several pieces, with the same result. Ignored if `pieces` is None.
        decoder: Runs the one-token steps instead of `model`, for instance a compiled model.
        decode_text: A function from token ids to text; None: outputs have no text.
        logprobs: Keep the log-probability of every token.
        stats: The stats to fill; None: new ones.

    Attributes:
        stats: Tokens and seconds so far. limits: The limits of a request.

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
        counts = [size] if rows is None else [size, rows]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 or n != size for n in counts):
            raise ValueError(f"rows must be at least 1, and the cache's batch size if there is one, got {shown(rows)}.")
        if pieces is not None and (isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 1):
            raise ValueError(f"pieces must be at least 1, or None for all, got {shown(pieces)}.")
        check_count("piece_size", piece_size, 1, 2**31 - 1)
        vocabulary_of(model)  # raises TypeError if it is not a model
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
        self._sequences: dict[int, Sequence] = {}  # by id; only those that have not ended
        self._next_id = 0
        self._token = torch.zeros(size, dtype=torch.int64, device=self.runner.device)  # the last token of each row
        self._marked: tuple[list[int], Tensor | None] = [], None
        # logits from which no token was drawn yet; if a pass of a step fails, the next step uses them
        self._decoded: tuple[list[Sequence], Tensor | None] | None = None
        self._fresh: list[tuple[list[Sequence], Tensor]] = []

    @property
    def unfinished(self) -> int:
        """The number of requests that wait or run."""
        return len(self._sequences)

    def sequence(self, id: int) -> Sequence:
        """Return the state of a request that has not ended."""
        return self._sequences[id]

    @property
    def free(self) -> int:
        """The number of further requests that would get a row at the next step."""
        return self.scheduler.free

    def add(
        self,
        request: Request,
        row: int | None = None,
        state: KVCache | None = None,
        same_prompt_as: int | None = None,
    ) -> int:
        """Add a request; it starts when a row is free.

        Args:
            request: The request.
            row: Continue after the tokens of this row of the cache; None: take any free row, and empty it first.
            state: Continue after the tokens of this cache of one row, copied into a free row: `copy_of` made it.
            same_prompt_as: The id of an earlier request with the same prompt. If both have rows before the prompt is
                read, it is read once, and copied. The result is the same; ignored if the earlier request has ended.

        Returns:
            The request's id.

        Raises:
            TypeError: If it is not a `Request`.
            ValueError: If it does not fit, or its id is in use.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request must be a Request, got {shown(request)}.")
        size = self.runner.size
        if row is not None and (isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < size):
            raise ValueError(f"row must be 0 to {size - 1}, got {shown(row)}.")
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
        sequence = Sequence(request, number, row=-1 if row is None else row, continues=row is not None, state=state)
        if same_prompt_as is not None:
            self._join(sequence, same_prompt_as)
        self._next_id = max(self._next_id, number) + 1
        if self.decode_text is not None:
            sequence.stream = TextStream(self.decode_text, sequence.prompt, request.stop_texts)
        self._sequences[number] = sequence
        self.scheduler.add(sequence)
        return number

    def _join(self, sequence: Sequence, other: int) -> None:
        check_type("same_prompt_as", other, int, "the id of a request")
        earlier = self._sequences.get(other)
        if earlier is None or not self.runner.copies:
            return
        whole = all(not s.continues and s.state is None for s in (sequence, earlier))
        scored = [s.request.prompt_logprobs for s in (sequence, earlier)]
        if sequence.prompt != earlier.prompt or not whole or scored[0] != scored[1]:
            raise ValueError(f"The request does not begin as request {other} does: the whole prompt must be the same.")
        sequence.group = earlier.group = earlier.group or PromptGroup(earlier)

    def abort(self, id: int) -> bool:
        """End a request; its row is free at the next step. Return False if it had already ended."""
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
        """Run a decode step for all running rows, then read pieces of waiting prompts, then draw tokens for both.

        Returns:
            The output of each request that got a token. The list is empty if there is nothing to do, or if prompts were
            read but none to its end; check `unfinished`.

        Raises:
            Exception: Any error of the model. The requests of the failed pass end with an error; the others continue at
                the next step.
        """
        if not self._sequences:
            return []
        began, compiled = time.perf_counter(), self.runner.compile_seconds
        if self._decoded is None:
            running = self.scheduler.running()
            self._decoded = running, self._decode(running) if running else None
        running, logits = self._decoded
        decoding, decoded = any(s.last >= 0 for s in running), time.perf_counter()  # False if all rows read prompts
        while len(self._fresh) != self.pieces and (group := self._next_to_read()):
            self._fresh.append((group, self._read(group)))
        fresh, read = self._fresh, time.perf_counter()
        self._decoded, self._fresh = None, []
        in_step = {s.row: s for group in (running, *(group for group, _ in fresh)) for s in group}
        ready = [s for s in in_step.values() if s.ready and s.reason is None]
        outputs: list[Output] = []
        if ready:
            followers = [s for s in self.scheduler.following if s.group is not None and s.group.leader in ready]
            with self._guard([*ready, *followers]):
                shared = self._shared(self._joined(logits, fresh), followers)
                outputs = self._draw([*ready, *followers], shared)
        compiled = self.runner.compile_seconds - compiled
        rest = decoded - began + time.perf_counter() - read - compiled
        self.stats.compile_seconds += compiled
        self.stats.prefill_seconds += read - decoded + (0 if decoding else rest)
        self.stats.decode_seconds += rest if decoding else 0
        return outputs

    def _decode(self, running: list[Sequence]) -> Tensor:
        """Run a decode step with each row's last token, or with the next token of its prompt: logits (B, V)."""
        if reading := [s for s in running if not s.ready]:
            tokens = [-1] * self.runner.size
            for sequence in reading:
                tokens[sequence.row] = sequence.prompt[sequence.read]
            prompt = torch.tensor(tokens).to(self.runner.device, non_blocking=True)
            self._token = torch.where(prompt < 0, self._token, prompt)
        with self._guard(running):
            logits = self.runner.decode(self._token, {s.row for s in running})
        for sequence in reading:
            if sequence.request.prompt_logprobs:
                note_scores(sequence, sequence.read, logits[sequence.row].unsqueeze(0))
            sequence.read += 1
        self.stats.prompt_tokens += len(reading)
        self.stats.prefill_tokens += len(reading) if len(reading) == len(running) else 0
        return logits

    def _next_to_read(self) -> list[Sequence]:
        """Give free rows to waiting requests; return the sequences whose next piece is read together."""
        for sequence in list(self.scheduler.following):
            if not _follows(sequence):  # its leader ended before it had read the prompt
                self.scheduler.read_alone(sequence)
                self._start(sequence)
        if admitted := self.scheduler.admit():
            now = time.perf_counter()
            for sequence in admitted:
                sequence.start_time = now
                if _follows(sequence):
                    self.scheduler.follow(sequence)
                else:
                    self._start(sequence)
            self.sampler.assign({s.row: s.request for s in admitted})
        return self.scheduler.next_to_read(self.pieces is None and self.runner.joins, self.runner.piece_size)

    def _start(self, sequence: Sequence) -> None:
        self.runner.start(sequence)
        if not self.runner.piece_size(sequence):
            self.scheduler.finish_reading(sequence)

    def _read(self, group: list[Sequence]) -> Tensor:
        """Read the next piece of the prompts of N neighbouring rows: logits (N, V)."""
        before = group[0].read
        with self._guard(group):
            logits = self.runner.read_piece(group)
        tokens = (group[0].read - before) * len(group)
        self.stats.prompt_tokens += tokens
        self.stats.prefill_tokens += tokens
        for sequence in group:
            if not self.runner.piece_size(sequence):
                self.scheduler.finish_reading(sequence)
        return logits

    def _joined(self, logits: Tensor | None, fresh: list[tuple[list[Sequence], Tensor]]) -> Tensor:
        """Copy the logits of prompts over those of the decode step: (B, V)."""
        for group, read in fresh:
            if len(group) == self.runner.size:
                logits = read
            else:
                logits = read.new_zeros(self.runner.size, read.size(-1)) if logits is None else logits
                rows = torch.tensor([s.row for s in group], device=logits.device)
                logits = logits.index_copy(0, rows, read)
        return logits

    def _shared(self, logits: Tensor, followers: list[Sequence]) -> Tensor:
        """Copy the rows of leaders, and their logits, into the rows of their followers: logits (B, V)."""
        if not followers:
            return logits
        leaders = [sequence.group.leader for sequence in followers if sequence.group is not None]
        for leader, sequence in zip(leaders, followers):
            self.runner.copy_prompt(leader, sequence)
            self.scheduler.finish_following(sequence)
        rows, sources = (torch.tensor([s.row for s in group], device=logits.device) for group in (followers, leaders))
        return logits.index_copy(0, rows, logits[sources])

    def _draw(self, ready: list[Sequence], logits: Tensor) -> list[Output]:
        """Draw a token for each sequence from logits (B, V), and end sequences that are complete."""
        drawing = self._mask([s.row for s in ready])
        drawn = self.sampler(logits, drawing)
        drawn = drawn if drawing is None else torch.where(drawing, drawn, self._token)
        self._token = drawn.clamp(min=0)
        wanted = [s.request.logprobs for s in ready if s.request.logprobs is not None]
        logprobs = logprobs_of(logits, self._token) if self.logprobs or wanted else None
        tokens, logprobs = _to_host(drawn, logprobs)  # the only copy to the host in a step
        tops = tops_of(logits, max(wanted)) if any(wanted) else None
        now, outputs = time.perf_counter(), []
        for sequence in ready:
            row = sequence.row
            if tokens[row] < 0:
                sequence.fail(no_token_error(sequence, self.limits.vocabulary))
            else:
                self.stats.new_tokens += 1
                self.stats.decode_tokens += sequence.last >= 0
                count = sequence.request.logprobs
                wants = self.logprobs or count is not None
                top = tops[row][:count] if tops and count else None
                sequence.push(tokens[row], logprobs[row] if wants else None, top)
            sequence.first_token_time = sequence.first_token_time or now
            outputs.append(Output(sequence.index, sequence.new_tokens, sequence.new_text, sequence.reason, sequence))
            if sequence.reason is not None:
                self._finish(sequence, sequence.reason, now)
        return outputs

    def _mask(self, rows: list[int]) -> Tensor | None:
        """Return a mask (B,) bool of some rows, None for all. The last mask is kept, to copy it to the device once."""
        size = self.runner.size
        if len(rows) == size:
            return None
        if rows != self._marked[0]:
            inside = set(rows)
            marks = torch.tensor([row in inside for row in range(size)])
            self._marked = rows, marks.to(self.runner.device, non_blocking=True)
        return self._marked[1]

    @contextlib.contextmanager
    def _guard(self, sequences: list[Sequence]) -> abc.Iterator[None]:
        """Run a pass for some sequences: if it raises, discard their rows and end them with an error."""
        try:
            yield
        except BaseException as error:
            for sequence in (s for s in sequences if s.reason is None):
                sequence.error = f"A step failed: {type(error).__name__}: {error}"
                self.runner.discard(sequence.row)
                self._finish(sequence, "error")
            raise

    def _finish(self, sequence: Sequence, reason: str, now: float | None = None) -> None:
        sequence.reason, sequence.end_time = reason, time.perf_counter() if now is None else now
        self.scheduler.remove(sequence)
        del self._sequences[sequence.index]


def _follows(sequence: Sequence) -> bool:
    """Return whether a sequence waits for its group's leader; if that one has begun or ended, let the sequence lead."""
    if sequence.group is None:
        return False
    leader = sequence.group.leader
    if leader is not sequence and leader.reason is None and leader.row >= 0 and leader.last < 0:
        return True
    sequence.group.leader = sequence
    return False


def no_token_error(sequence: Sequence, vocabulary: int) -> str:
    """Return the error message for a sequence without a token that can be drawn."""
    request, count = sequence.request, sequence.num_generated
    stops = {stop[0] for stop in request.stop if len(stop) == 1 and 0 <= stop[0] < vocabulary}
    if count < request.min_new_tokens and len(stops) == vocabulary:
        return f"min_new_tokens {request.min_new_tokens} bans all {vocabulary} tokens: each of them is a stop sequence."
    return (
        f"The model's logits are not finite after {count} new tokens: a weight is damaged, or numbers overflow "
        "(in 16 bit, try precision 32-true)."
    )


def _to_host(token: Tensor, logprobs: Tensor | None) -> tuple[list[int], list[float] | list[None]]:
    """Copy tokens (B,) int64 and log-probabilities (B,) float32 to the host in one transfer."""
    if logprobs is None:
        return token.tolist(), [None] * token.numel()
    both = torch.stack((token, logprobs.view(torch.int32).long())).cpu()
    return both[0].tolist(), both[1].int().view(torch.float32).tolist()
