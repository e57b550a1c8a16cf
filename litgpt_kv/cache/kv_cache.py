"""The cache of a model: its layers, the slots their tokens are in, and a counter for every row.

B rows · T new tokens · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt_kv.attention.rope import RopeTables
from litgpt_kv.cache import door, serialize
from litgpt_kv.cache.build import build_cache
from litgpt_kv.cache.inspection import LayerContents, by_token, inspect_row
from litgpt_kv.cache.layer import build_layers
from litgpt_kv.cache.pieces import PromptReader
from litgpt_kv.cache.plan import limit_of, resolve
from litgpt_kv.cache.row_clock import RowClock
from litgpt_kv.cache.rows import (
    RowViews,
    allocated,
    recount,
    refresh,
    repeated,
    reset_rows,
    restore_row,
    set_static,
    view_of,
)
from litgpt_kv.cache.steps import begin_step, expecting
from litgpt_kv.cache.views import Pass, begin_prefill
from litgpt_kv.config import KVCacheArgs


class KVCache(nn.Module):
    """Everything a model remembers of a batch of sequences. Passed to `GPT.forward`, never attached to the model.

    A step changes it between `begin_...` and the `commit` of what that returns. A step that fails in between leaves
    its rows marked, and later calls refuse them by name until `reset`.

    Attributes:
        args: What the user asked for.
        max_tokens: How many tokens a row may see; `context`: how many the model may.
        dtype: Of the model, for which the cache was built.
        limit: The most tokens a row may see, None without an end; `why` says the reason.
        longest_block: The most tokens of one decode step.
        first_chunk: The most prompt tokens that every layer keeps.
        exact_blocks: Whether a block of tokens gives what they give one at a time, whatever attention they pay.
        rereads: Whether prompts may be read twice, in one pass then.
        evicting: In static mode, whether the next step may find a row full; False saves it the search for victims.
        read_length: In static mode, how many first slots of a head the next step reads, new token included: the
            others are empty in all live rows. None: all. Every value is a graph of a compiled model; see `expect`.
    """

    def __init__(
        self,
        config: Config,
        args: KVCacheArgs,
        batch_size: int,
        max_tokens: int,
        context: int,
        dtype: torch.dtype = torch.float32,
        devices: Sequence[torch.device] | None = None,
        static: bool = False,
    ) -> None:
        super().__init__()
        self.args, self.max_tokens, self.context = args, max_tokens, context
        self.dtype, self.fingerprint, self.evicting = dtype, "", True
        self.read_length: int | None = None
        self.rope: RopeTables | None = None  # the model's, for `inspect` of strategies that read keys
        self.theta: list[tuple[Tensor, Tensor, Tensor]] = []  # of each rope base, for angles beyond the tables
        devices = devices or [torch.device("cpu")] * config.n_layer
        plans = self.plans = resolve(config, args, max_tokens, context)
        door.check_static(plans, static)
        slots, layers, self.group_of = build_layers(plans, args, batch_size, dtype, devices)
        self.slots, self.layers = nn.ModuleList(slots), nn.ModuleList(layers)
        self.clock = RowClock(batch_size, len(slots), devices[0], static)
        self.limit, self.why = limit_of(plans, context)
        self.longest_block = min(plan.longest_block for plan in plans)
        self.first_chunk = min(plan.slots for plan in plans)
        self.exact_blocks = all(plan.exact_blocks for plan in plans)
        self.rereads = any(plan.strategy.rereads for plan in plans)
        self._views = RowViews()

    @classmethod
    def build(
        cls,
        model: Any,
        args: KVCacheArgs | str | None = None,
        batch_size: int = 1,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        static: bool = False,
    ) -> KVCache:
        """A cache that fits a model, on the devices of its layers.

        Args:
            model: The `GPT` it is for.
            args: What to keep and how, or just the name of a strategy; the default keeps everything.
            batch_size: Rows, B.
            max_tokens: How many tokens a row may see, prompt included: the size of a dense cache, and the budget where
                none is given. None: the model's context.
            dtype: Of stored keys and values; None: that of the model's weights.
            static: For a compiled model: shapes and branches of a decode step never depend on the rows' counters.

        Raises:
            ValueError: If the arguments contradict each other, or ask for more context or memory than there is.
        """
        return build_cache(cls, model, args, batch_size, max_tokens, dtype, static)

    @classmethod
    def nbytes(
        cls, config: Config, args: KVCacheArgs, batch_size: int, max_tokens: int, dtype: torch.dtype = torch.float32
    ) -> dict[str, int]:
        """Exact bytes of a cache before anything is allocated: keys, values, positions, statistics and total."""
        args = door.check_build(args, batch_size, max_tokens)
        nowhere = [torch.device("meta")] * config.n_layer
        return cls(config, args, batch_size, max_tokens, config.block_size, dtype, nowhere).allocated()

    def allocated(self) -> dict[str, int]:
        """Bytes held by this cache's buffers, as `nbytes` names them; they never grow."""
        return allocated(self)

    def save(self, path: str | Path, model: Any = None) -> None:
        """Write the cache to a file in safetensors' format, with a fingerprint of its model (`model` must be that)."""
        serialize.write(self, path, model)

    @classmethod
    def load(cls, path: str | Path, model: Any, args: KVCacheArgs | str | None = None) -> KVCache:
        """The cache that `save` wrote, on the devices of the model's layers.

        Args:
            path: The file.
            model: The model that it was made with.
            args: What it should be, or the name of its strategy if all else is as by default; None: not checked.

        Raises:
            ValueError: If the file is missing or no cache, or was made with another model or other arguments.
        """
        return serialize.read(cls, path, model, args)

    def __repr__(self) -> str:
        kept = dict.fromkeys(f"{type(s.strategy).__name__.lower()} {s.plan.slots}" for s in self.slots)
        rows = "1 row" if self.batch_size == 1 else f"{self.batch_size} rows"
        return f"KVCache({', '.join(kept)} tokens a row; {len(self.layers)} layers, {rows})"

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def pos(self) -> Tensor:
        """(B,) int64, the tokens each row has seen, which is its next position."""
        return self.clock.pos

    @property
    def live(self) -> Tensor:
        """(B,) bool, False for a retired row, which stays behind while the others decode."""
        return self.clock.live

    @property
    def batch_size(self) -> int:
        return self.clock.pos.size(0)

    @property
    def seen(self) -> list[int]:
        """The tokens each row has seen, without waiting for the device (in static mode, a copy from it)."""
        return self.clock.seen

    @property
    def static(self) -> bool:
        """Whether shapes and branches of a step never depend on the rows' counters, as a compiled model needs it."""
        return self.clock.static

    @static.setter
    def static(self, value: bool) -> None:
        set_static(self, value)

    def tokens(self) -> dict[str, list[int]]:
        """For each row the tokens it has "seen" and the most that any head has "kept" of them (a device sync)."""
        kept = torch.stack([slots.kept_per_head().to(self.pos.device) for slots in self.slots]).amax(0)
        return {"seen": self.pos.tolist(), "kept": kept.tolist()}

    def inspect(self, row: int) -> list[LayerContents]:
        """What a row holds, of each layer and head: the tokens' positions, statistics, scores, keys and values."""
        return inspect_row(self.row(row))

    def by_token(self, row: int, tokens: int, statistic: str | None = None) -> Tensor:
        """Whether each layer and head holds each of N `tokens` of a row's text, (L, G, N) bool, or a statistic of it.

        A token that is not held has statistic 0. ValueError if the row has seen more, or no strategy has the statistic.
        """
        return by_token(self.row(row), tokens, statistic)

    # -- rows --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Empty all rows, or some; they may then be seeded again."""
        self._refresh()
        reset_rows(self, rows)

    @torch.no_grad()
    def retire(self, rows: Sequence[int] | Tensor) -> None:
        """Stop rows: later steps neither advance their counter nor change what they keep."""
        self._refresh()
        self.clock.set_live(door.check_rows(rows, self.batch_size), False)

    @torch.no_grad()
    def revive(self) -> None:
        """Let retired rows go on where they stopped."""
        self._refresh()
        self.clock.set_live(range(self.batch_size), True)

    @torch.no_grad()
    def set_prompt_lengths(self, lengths: dict[int, int]) -> None:
        """Say how long rows' prompts are, before their first pass reads a part of them; `keep_prompt` protects them.

        ValueError if a prompt is to be kept and does not fit the budget.
        """
        self._refresh()
        door.check_prompts(self, lengths)
        self.clock.set_prompt_lengths(lengths)

    def row(self, b: int) -> KVCache:
        """A cache of one row that shares this one's memory: seed it to admit a request without touching the others."""
        (b,) = door.check_rows([b], self.batch_size)
        return self.rows(b, b + 1)

    def rows(self, start: int, stop: int) -> KVCache:
        """As `row`, of the rows `start` to `stop` - 1."""
        door.check_range(start, stop, self.batch_size)
        self._refresh()
        return view_of(self, self._views, start, stop)

    def repeat(self, count: int) -> KVCache:
        """A cache of its own in which every row stands `count` times, side by side: one context, many questions."""
        door.check_count("count", count, most=2**20)
        self.clock.check_whole("Repeating")
        self._refresh()
        with torch.inference_mode(False), torch.no_grad():  # see `build`
            return repeated(self, count)

    @torch.no_grad()
    def restore(self, row: int, state: KVCache) -> None:
        """Let a row hold what a copy of a row, `cache.row(b).repeat(1)`, holds; ValueError if they do not match."""
        state.clock.check_whole("Restoring")
        self._refresh()
        door.check_rows([row], self.batch_size)
        restore_row(self, row, state)

    def recount(self) -> None:
        """Read the counters off the buffers, after these were written from outside (a device sync)."""
        recount(self)

    def read_in_pieces(self, row: int, length: int) -> PromptReader:
        """Read the prompt of an empty row in several passes that give what one pass gives.

        `model(tokens[:, a:b], reader)` reads the next piece and gives the logits (1, V) after its last token; the last
        piece compresses the prompt and seeds the row.

        Raises:
            ValueError: If the row is not empty or the prompt of `length` tokens does not fit.
        """
        door.check_pieces(length, self.context, self.rereads)
        return PromptReader(self.row(row), length)

    # -- one pass: begin works out slots, masks and angles once for all layers; commit counts ------------------------

    def begin_prefill(self, T: int, length: Tensor, rope: RopeTables) -> Pass:
        """Prepare to seed empty rows with prompts of `length` (B,) tokens, padded on the right to T."""
        self._refresh()
        lengths = door.check_prompt(self, T, length)
        return begin_prefill(self.clock, self.slots, self.layers, self.group_of, T, length, lengths, rope)

    def begin_decode(self, T: int, rope: RopeTables) -> Pass:
        """Prepare to decode T tokens a row; more than one is a block, causal inside."""
        self._refresh()
        door.check_step(self, T)
        return begin_step(self, T, rope)

    def expect(self, seen: int) -> AbstractContextManager[None]:
        """Say for one-token steps of a static cache what the host knows: no live row has seen more than `seen` tokens.

        Compiled steps then neither look for victims nor read slots where there can be none; wrong numbers give wrong
        results. Outside of static mode this does nothing: the cache counts by itself.
        """
        return expecting(self, seen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KVCache:
        self.clock.host.moves += 1  # views take the new buffers when they are used next
        return super()._apply(fn, recurse)

    def _refresh(self) -> None:
        refresh(self, self._views)
