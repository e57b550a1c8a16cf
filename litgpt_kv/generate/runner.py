"""Run the model for the engine: read pieces of prompts, and decode one token for every running row.

B rows of the cache · N neighbouring rows whose prompts are read together · T tokens · V vocabulary.
"""

from __future__ import annotations

from collections import abc
from typing import Protocol

import torch
from torch import Tensor

from litgpt_kv.arguments import check_count
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.pieces import PromptReader
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import shown
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.generate.limits import Limits, check_prefill
from litgpt_kv.generate.prompt_scores import FirstPassScores, note_scores
from litgpt_kv.generate.request import Sequence

PIECE = 512  # the default of piece_size, in tokens
BLOCK = 128  # tokens; the logits of a block are (N, BLOCK, V), so a longer block needs memory and saves little time
Model = abc.Callable[..., Tensor]


class Runner(Protocol):
    """A model, and the state of each row.

    Attributes:
        size: The number of rows, B. device: Of tokens and logits. limits: The limits of a request.
        joins: Whether prompts of the same length may be read together.
        copies: Whether a row can get a copy of another one.
        compile_seconds: Spent on compiling decode steps so far.
    """

    size: int
    joins: bool
    copies: bool
    compile_seconds: float
    device: torch.device
    limits: Limits

    def seen(self, row: int) -> int:
        """Return the number of tokens that a row has seen."""

    def check_continues(self, row: int) -> None:
        """Raise ValueError if a step failed in the middle of this row, so that a text cannot continue in it."""

    def check_state(self, state: KVCache, row: int | None) -> None:
        """Raises ValueError if a sequence cannot begin with what a cache of one row holds."""

    def start(self, sequence: Sequence) -> None:
        """Prepare the row of a sequence: empty it, copy its state into it, or leave it if the sequence continues it."""

    def copy_prompt(self, leader: Sequence, sequence: Sequence) -> None:
        """Let the row of a sequence hold what that of another one holds, which has just read the same prompt."""

    def piece_size(self, sequence: Sequence) -> int:
        """Return the tokens of the prompt's next piece; 0 at its end, or if decode steps read the rest."""

    def read_piece(self, sequences: list[Sequence]) -> Tensor:
        """Read the next piece of N neighbouring rows, all of one size: logits (N, V) after its last token."""

    def decode(self, token: Tensor, rows: set[int]) -> Tensor:
        """Decode a token (B,) in some rows, and leave the others unchanged: logits (B, V), valid for `rows`."""

    def discard(self, row: int) -> None:
        """Mark a row as invalid, because a step failed in the middle of it."""


class CacheRunner:
    """Run the model on the rows of a cache.

    Args:
        model: Reads prompts.
        decoder: Runs the one-token steps, for instance a compiled model; None: the model.
        cache: The cache, empty or with the text before the prompts.
        prefill: "min-length" or "full".
        chunk: With "min-length", the tokens of a block, for the rest of a prompt after the first pass; None: `BLOCK`
            or less if blocks do not change results, else one token. With "full", the same as `piece`.
        piece: The most tokens of a pass; a longer first pass over a prompt is done in several, with the same result.
            None: no limit.

    Attributes:
        joins: Whether prompts of the same length are read together; not if prompts are read in pieces.
    """

    copies = True

    def __init__(
        self,
        model: GPT,
        decoder: Model | None,
        cache: KVCache,
        prefill: str,
        chunk: int | None,
        piece: int | None = None,
    ) -> None:
        check_prefill(prefill)
        if prefill == "full" and chunk is not None:
            check_count("prefill_chunk", chunk, 1, 2**31 - 1)
            piece, chunk = min(chunk, piece or chunk), None
        if cache.rereads:
            piece = None
        if chunk is not None and not (isinstance(chunk, int) and 1 <= chunk <= cache.longest_block):
            most = cache.longest_block
            raise ValueError(f"prefill_chunk must be 1 to {most} (budget less sinks), got {shown(chunk)}.")
        self.model, self.decoder, self.cache = model, model if decoder is None else decoder, cache
        self.full, self.piece, self.joins = prefill == "full", piece, piece is None
        self.chunk = chunk or (min(BLOCK, cache.longest_block) if cache.exact_blocks else 1)
        self.size, self.device = cache.batch_size, cache.pos.device
        self.limits = Limits.of_cache(model, cache, prefill)
        cache.static = cache.static or self.decoder is not model or hasattr(model, "_orig_mod")  # compiled
        cache.revive()
        self._live = set(range(self.size))  # rows that the next decode step advances
        self._tokens = cache.seen  # tokens that each row has seen
        self._readers: dict[int, PromptReader] = {}  # by row; for prompts that are read in pieces
        self._scores: dict[int, FirstPassScores] = {}  # by row; for prompts whose first pass is scored

    @property
    def compile_seconds(self) -> float:
        return self.decoder.seconds if isinstance(self.decoder, CompiledDecoder) else 0.0

    def seen(self, row: int) -> int:
        return self._tokens[row]

    def check_continues(self, row: int) -> None:
        self.cache.clock.check_whole("A conversation or text", [row])

    def check_state(self, state: KVCache, row: int | None) -> None:
        if not isinstance(state, KVCache) or state.batch_size != 1 or not state.seen[0]:
            raise ValueError(f"state must be a cache of one row that has seen tokens, got {shown(state)}.")
        if row is not None:
            raise ValueError("A request goes on with a row or with a state, not with both.")

    def start(self, sequence: Sequence) -> None:
        row = sequence.row
        self._forget(row)
        restored = sequence.state is not None
        if restored:
            self.cache.restore(row, sequence.state)
            self._tokens[row], sequence.state = sequence.state.seen[0], None
            self._live.add(row)
        sequence.past = self._tokens[row]
        if not (sequence.continues or restored) and (
            sequence.past or row not in self._live or self.cache.clock.interrupted[row]
        ):
            self.cache.reset([row])
            self._live.add(row)
            sequence.past = self._tokens[row] = 0
        if not sequence.past:
            self.cache.set_prompt_lengths({row: len(sequence.prompt)})

    def copy_prompt(self, leader: Sequence, sequence: Sequence) -> None:
        row = sequence.row
        self._forget(row)
        self.cache.restore(row, self.cache.row(leader.row))
        self._live.add(row)
        self._tokens[row], sequence.read = self._tokens[leader.row], leader.read
        sequence.prompt_scores = list(leader.prompt_scores)

    def piece_size(self, sequence: Sequence) -> int:
        left = len(sequence.prompt) - sequence.read
        first = 0 if sequence.past else self._first_pass(sequence)
        if sequence.read < first:
            return min(first - sequence.read, self.piece or first)
        return min(left, self.chunk) if self.chunk > 1 else 0

    def _first_pass(self, sequence: Sequence) -> int:
        """Return how many tokens of a prompt the first pass reads."""
        return len(sequence.prompt) if self.full else min(len(sequence.prompt), self.cache.first_chunk)

    def read_piece(self, sequences: list[Sequence]) -> Tensor:
        rows, first = [s.row for s in sequences], sequences[0]
        size, first_pass = self.piece_size(first), 0 if first.past else self._first_pass(first)
        tokens = torch.tensor([s.prompt[s.read : s.read + size] for s in sequences]).to(self.device)
        self._set_live(self._live.union(rows))
        for sequence in (s for s in sequences if s.request.prompt_logprobs and s.read < first_pass):
            self._score(sequence, size, first_pass)
        if first.read < first_pass and size < first_pass:  # one row: `Scheduler.next_to_read` joins whole passes only
            logits = self._read_part(first, tokens, first_pass)
        else:
            cache = self.cache if len(rows) == self.size else self.cache.rows(rows[0], rows[-1] + 1)
            if first.read >= first_pass:
                block = self.model(tokens, cache)  # (N, T, V)
                for sequence, own in zip(sequences, block):
                    if sequence.request.prompt_logprobs:
                        note_scores(sequence, sequence.read, own)
                logits = block[:, -1]
            else:
                logits = self.model(tokens, cache, torch.full((len(rows),), size, device=self.device))
        for sequence in sequences:
            sequence.read += size
            if sequence.row not in self._readers:
                self._tokens[sequence.row] = sequence.past + sequence.read
        return logits

    def _read_part(self, sequence: Sequence, tokens: Tensor, first_pass: int) -> Tensor:
        """Read the next tokens (1, T) of a first pass of `first_pass` tokens: logits (1, V)."""
        row = sequence.row
        if row not in self._readers:
            self._readers[row] = self.cache.read_in_pieces(row, first_pass)
        logits = self.model(tokens, self._readers[row])
        if not self._readers[row].remaining:
            del self._readers[row]
        return logits

    def _score(self, sequence: Sequence, size: int, seeds: int) -> None:
        """Score the tokens that the next piece of a first pass reads."""
        row = sequence.row
        if row not in self._scores:
            self._scores[row] = FirstPassScores(self.model, seeds, self.cache.dtype)
        self._scores[row].read(sequence, sequence.read, sequence.read + size)
        if sequence.read + size >= seeds:
            del self._scores[row]

    def _forget(self, row: int) -> None:
        self._readers.pop(row, None)
        self._scores.pop(row, None)

    def decode(self, token: Tensor, rows: set[int]) -> Tensor:
        self._set_live(rows)
        with self.cache.expect(max(self._tokens[row] for row in rows)):
            logits = self.decoder(token.unsqueeze(1), self.cache).squeeze(1)
        for row in rows:
            self._tokens[row] += 1
        return logits

    def discard(self, row: int) -> None:
        self._forget(row)
        self.cache.clock.begin([row])  # marks the row also if the step failed outside the cache

    def _set_live(self, rows: set[int]) -> None:
        """Make the next decode step advance these rows only."""
        if rows == self._live:
            return
        if rows - self._live:
            self.cache.revive()
            self._live = set(range(self.size))
        if stopped := self._live - rows:
            self.cache.retire(sorted(stopped))
        self._live = rows


class RecomputeRunner:
    """Run the model without a cache: every step computes the whole text again. This is the baseline."""

    copies = False
    compile_seconds = 0.0

    def __init__(self, model: GPT, rows: int) -> None:
        self.model, self.size, self.joins = model, rows, True
        self.limits = Limits.of(model, None, "min-length")
        self.device = next(model.parameters()).device
        self.text = torch.zeros(rows, model.max_seq_length, dtype=torch.int64, device=self.device)
        self.length = [0] * rows

    def seen(self, row: int) -> int:
        return 0

    def check_continues(self, row: int) -> None:
        """Do nothing: without a cache, a failed step leaves nothing behind."""

    def check_state(self, state: KVCache, row: int | None) -> None:
        raise ValueError("Without a cache there is no state to go on with.")

    def start(self, sequence: Sequence) -> None:
        self.length[sequence.row] = 0

    def copy_prompt(self, leader: Sequence, sequence: Sequence) -> None:
        raise NotImplementedError("Without a cache every row reads its whole text at each step.")

    def piece_size(self, sequence: Sequence) -> int:
        return len(sequence.prompt) - sequence.read

    def read_piece(self, sequences: list[Sequence]) -> Tensor:
        size = self.piece_size(sequences[0])
        for sequence in sequences:
            self.text[sequence.row, :size] = torch.tensor(sequence.prompt, device=self.device)
        logits = self.model(self.text[sequences[0].row : sequences[-1].row + 1, :size])  # (N, T, V)
        for sequence, own in zip(sequences, logits):
            if sequence.request.prompt_logprobs:
                note_scores(sequence, 0, own)
            self.length[sequence.row] = sequence.read = size
        return logits[:, -1]

    def decode(self, token: Tensor, rows: set[int]) -> Tensor:
        for row in rows:
            self.text[row, self.length[row]] = token[row]
            self.length[row] += 1
        last = [self.length[row] - 1 if row in rows else 0 for row in range(self.size)]
        logits = self.model(self.text[:, : max(last) + 1])
        return logits[torch.arange(self.size, device=self.device), torch.tensor(last, device=self.device)]

    def discard(self, row: int) -> None:
        """Do nothing: the next sequence overwrites the text."""
