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
from litgpt_kv.generate.request import Sequence

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

    def start(self, sequence: Sequence) -> None:
        """Gives a sequence its row: emptied, or as it is for one that continues."""

    def piece_size(self, sequence: Sequence) -> int:
        """Tokens of the next piece of its prompt; 0 if nothing is left, or the rest is read beside decode steps."""

    def alike(self, one: Sequence, other: Sequence) -> bool:
        """Whether the next pieces of two sequences can be read together."""

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
        chunk: "full": tokens of a piece of a prompt, which changes nothing. "min-length": tokens of a block in which
            the rest of a prompt is read after its first pass; None: the longest that changes nothing.
        piece: The most tokens of a piece of a first pass; None: read it at once.
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
        self.full = prefill == "full"
        most = model.max_seq_length if self.full else cache.longest_block
        if chunk is not None and not (isinstance(chunk, int) and 1 <= chunk <= most):
            why = "the model's context" if self.full else "budget less sinks"
            raise ValueError(f"prefill_chunk must be 1 to {most} ({why}), got {shown(chunk)}.")
        self.model, self.decoder, self.cache = model, model if decoder is None else decoder, cache
        if self.decoder is not model or hasattr(model, "_orig_mod"):  # the attribute of what torch.compile returns
            cache.static = True  # a compiled step needs shapes that never depend on what the rows hold
        self.piece = chunk if self.full and chunk is not None else piece
        block = None if self.full else chunk
        self.block = block or (min(BLOCK, cache.longest_block) if cache.exact_blocks else 1)
        self.size, self.device = cache.batch_size, cache.pos.device
        self.limits = Limits.of_cache(model, cache, prefill)
        cache.revive()
        self._live = set(range(self.size))  # rows that the next step of the cache would advance
        self._broken: set[int] = set()
        self._readers: dict[int, PromptReader] = {}  # of rows whose first pass is read in pieces

    def seen(self, row: int) -> int:
        return self.cache.seen[row]

    def start(self, sequence: Sequence) -> None:
        row = sequence.row
        self._readers.pop(row, None)
        sequence.past = self.seen(row)
        if not sequence.continues and (sequence.past or row not in self._live or row in self._broken):
            self.cache.reset([row])
            self._live.add(row)
            self._broken.discard(row)
            sequence.past = 0
        if not sequence.past:
            self.cache.set_prompt_lengths({row: len(sequence.prompt)})

    def piece_size(self, sequence: Sequence) -> int:
        left, first = len(sequence.prompt) - sequence.read, self._first_pass(sequence)
        if sequence.read < first:
            return min(first - sequence.read, self.piece or first)
        return min(left, self.block) if self.block > 1 else 0

    def alike(self, one: Sequence, other: Sequence) -> bool:
        if one.read != other.read or self.piece_size(one) != self.piece_size(other):
            return False
        firsts = [self._first_pass(one), self._first_pass(other)]
        return max(firsts) <= one.read or firsts == [self.piece_size(one)] * 2

    def read_piece(self, sequences: list[Sequence]) -> Tensor:
        rows, sequence = [s.row for s in sequences], sequences[0]
        begin, size, first = sequence.read, self.piece_size(sequence), self._first_pass(sequence)
        tokens = torch.tensor([s.prompt[begin : begin + size] for s in sequences]).to(self.device)
        self._set_live(self._live.union(rows))
        if begin < first and size < first:
            logits = self._read_part(sequence.row, first, tokens)
        else:
            cache = self.cache if len(rows) == self.size else self.cache.rows(rows[0], rows[-1] + 1)
            if begin < first:
                logits = self.model(tokens, cache, torch.full((len(rows),), size, device=self.device))
            else:
                logits = self.model(tokens, cache)[:, -1]
        for read in sequences:
            read.read += size
        return logits

    def decode(self, token: Tensor, rows: set[int]) -> Tensor:
        self._set_live(rows)
        return self.decoder(token.unsqueeze(1), self.cache).squeeze(1)

    def discard(self, row: int) -> None:
        self._broken.add(row)

    def _first_pass(self, sequence: Sequence) -> int:
        """How many tokens of a prompt seed the empty row; 0 if it goes on with what the row holds."""
        if sequence.past:
            return 0
        return len(sequence.prompt) if self.full else min(len(sequence.prompt), self.cache.first_chunk)

    def _read_part(self, row: int, length: int, tokens: Tensor) -> Tensor:
        """One piece (1, t) of the first pass of a row; the last one seeds it."""
        if row not in self._readers:
            self._readers[row] = self.cache.read_in_pieces(row, length)
        reader = self._readers[row]
        logits = self.model(tokens, reader)
        if not reader.remaining:
            del self._readers[row]
        return logits

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

    def start(self, sequence: Sequence) -> None:
        self.length[sequence.row] = 0

    def piece_size(self, sequence: Sequence) -> int:
        return len(sequence.prompt) - sequence.read

    def alike(self, one: Sequence, other: Sequence) -> bool:
        return len(one.prompt) == len(other.prompt)

    def read_piece(self, sequences: list[Sequence]) -> Tensor:
        size = self.piece_size(sequences[0])
        for sequence in sequences:
            self.text[sequence.row, :size] = torch.tensor(sequence.prompt, device=self.device)
            self.length[sequence.row] = sequence.read = size
        return self.model(self.text[sequences[0].row : sequences[-1].row + 1, :size])[:, -1]

    def decode(self, token: Tensor, rows: set[int]) -> Tensor:
        for row in rows:
            self.text[row, self.length[row]] = token[row]
            self.length[row] += 1
        last = [self.length[row] - 1 if row in rows else 0 for row in range(self.size)]
        logits = self.model(self.text[:, : max(last) + 1])
        return logits[torch.arange(self.size, device=self.device), torch.tensor(last, device=self.device)]

    def discard(self, row: int) -> None:
        """The next sequence writes its own text."""
