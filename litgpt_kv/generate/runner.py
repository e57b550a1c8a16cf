"""Runs the model for the engine: pieces of prompts, and one more token for every running row.

B rows of the cache · N neighbouring rows whose prompts are read together · T tokens · V vocabulary.
"""

from __future__ import annotations

from collections import abc
from typing import Protocol

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.pieces import PromptReader
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import shown
from litgpt_kv.generate.limits import Limits, check_prefill
from litgpt_kv.generate.prompt_scores import FirstPassScores, note_scores
from litgpt_kv.generate.request import Sequence

PIECE = 512  # tokens of a prompt in a step, unless told otherwise
BLOCK = 128  # tokens; the logits of a block are (N, BLOCK, V), so a longer one would cost memory and save little
Model = abc.Callable[..., Tensor]


class Runner(Protocol):
    """A model and what it remembers of each row.

    Attributes:
        size: Rows, B. device: Of tokens and logits. limits: What a request must fit.
    """

    size: int
    device: torch.device
    limits: Limits

    def seen(self, row: int) -> int:
        """Tokens that a row holds."""

    def check_continues(self, row: int) -> None:
        """Raises ValueError if a row is in the middle of a step that broke off: nothing can go on there."""

    def check_state(self, state: KVCache, row: int | None) -> None:
        """Raises ValueError if a sequence cannot begin with what a cache of one row holds."""

    def start(self, sequence: Sequence) -> None:
        """Gives a sequence its row: emptied, with its state, or as it is for one that continues."""

    def piece_size(self, sequence: Sequence) -> int:
        """Tokens of the next piece of its prompt; 0 if nothing is left, or the rest is read beside decode steps."""

    def read_piece(self, sequences: list[Sequence]) -> Tensor:
        """Reads the next piece, of one size, of sequences in neighbouring rows: logits (N, V) after its last token."""

    def decode(self, token: Tensor, rows: set[int]) -> Tensor:
        """One more token (B,) for some rows, while the others stay as they are: logits (B, V), of use for `rows`."""

    def discard(self, row: int) -> None:
        """Notes that a step broke off in the middle of a row: what it holds is of no use."""


class CacheRunner:
    """Rows of a cache.

    Args:
        model: Runs prompts.
        decoder: Runs the one-token steps, a compiled model for instance; None: the model.
        cache: Empty, or with what came before the prompts.
        prefill: "min-length" or "full".
        chunk: Tokens of a block in which the rest of a prompt is read after the first pass; None: the longest that
            changes nothing.
        piece: The most tokens of the first pass over a prompt; a longer one is read in several passes that give what
            one gives. None: no limit.
    """

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
        if chunk is not None and not (isinstance(chunk, int) and 1 <= chunk <= cache.longest_block):
            most = cache.longest_block
            raise ValueError(f"prefill_chunk must be 1 to {most} (budget less sinks), got {shown(chunk)}.")
        self.model, self.decoder, self.cache = model, model if decoder is None else decoder, cache
        self.full, self.piece = prefill == "full", piece
        self.chunk = chunk or (min(BLOCK, cache.longest_block) if cache.exact_blocks else 1)
        self.size, self.device = cache.batch_size, cache.pos.device
        self.limits = Limits.of_cache(model, cache, prefill)
        cache.static = cache.static or self.decoder is not model or hasattr(model, "_orig_mod")  # a compiled one
        # tokens from which on a row may have to evict; a compiled step asks before it runs, see `KVCache.evicting`
        self.evicts_from = min((plan.slots for plan in cache.plans if plan.strategy.evicts), default=None)
        cache.revive()
        self._live = set(range(self.size))  # rows that the next step of the cache would advance
        self._tokens = cache.seen  # of each row
        self._readers: dict[int, PromptReader] = {}  # by row, of prompts that are read in pieces
        self._scores: dict[int, FirstPassScores] = {}  # by row, of prompts whose first pass is scored

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

    def piece_size(self, sequence: Sequence) -> int:
        left = len(sequence.prompt) - sequence.read
        first = 0 if sequence.past else self._first_pass(sequence)
        if sequence.read < first:
            return min(first - sequence.read, self.piece or first)
        return min(left, self.chunk) if self.chunk > 1 else 0

    def _first_pass(self, sequence: Sequence) -> int:
        """Tokens of a prompt that seed its row."""
        return len(sequence.prompt) if self.full else min(len(sequence.prompt), self.cache.first_chunk)

    def read_piece(self, sequences: list[Sequence]) -> Tensor:
        rows, first = [s.row for s in sequences], sequences[0]
        size, seeds = self.piece_size(first), 0 if first.past else self._first_pass(first)
        tokens = torch.tensor([s.prompt[s.read : s.read + size] for s in sequences]).to(self.device)
        self._set_live(self._live.union(rows))
        for sequence in (s for s in sequences if s.request.prompt_logprobs and s.read < seeds):
            self._score(sequence, size, seeds)
        if first.read < seeds and size < seeds:  # alone: `Scheduler.next_to_read` joins whole first passes only
            logits = self._read_on(first, tokens, seeds)
        else:
            cache = self.cache if len(rows) == self.size else self.cache.rows(rows[0], rows[-1] + 1)
            if first.read >= seeds:
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

    def _read_on(self, sequence: Sequence, tokens: Tensor, seeds: int) -> Tensor:
        """The next tokens (1, t) of a first pass in several pieces: logits (1, V)."""
        row = sequence.row
        if row not in self._readers:
            self._readers[row] = self.cache.read_in_pieces(row, seeds)
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
        limit = self.evicts_from
        self.cache.evicting = limit is not None and any(self._tokens[row] >= limit for row in rows)
        try:
            logits = self.decoder(token.unsqueeze(1), self.cache).squeeze(1)
        finally:
            self.cache.evicting = True  # which is right for whoever uses the cache next
        for row in rows:
            self._tokens[row] += 1
        return logits

    def discard(self, row: int) -> None:
        self._forget(row)
        self.cache.clock.begin([row])  # also where the step broke off before or after the cache's own part

    def _set_live(self, rows: set[int]) -> None:
        if rows == self._live:
            return
        if rows - self._live:
            self.cache.revive()
            self._live = set(range(self.size))
        if stopped := self._live - rows:
            self.cache.retire(sorted(stopped))
        self._live = rows


class RecomputeRunner:
    """No cache: every step runs the whole text again, the baseline."""

    def __init__(self, model: GPT, rows: int) -> None:
        self.model, self.size = model, rows
        self.limits = Limits.of(model, None, "min-length")
        self.device = next(model.parameters()).device
        self.text = torch.zeros(rows, model.max_seq_length, dtype=torch.int64, device=self.device)
        self.length = [0] * rows

    def seen(self, row: int) -> int:
        return 0

    def check_continues(self, row: int) -> None:
        """A text without a cache is always whole."""

    def check_state(self, state: KVCache, row: int | None) -> None:
        raise ValueError("Without a cache there is no state to go on with.")

    def start(self, sequence: Sequence) -> None:
        self.length[sequence.row] = 0

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
        """The next sequence writes its own text."""
