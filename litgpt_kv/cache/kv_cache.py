"""The cache of a model: its layers, the slots their tokens are in, and a counter for every row. Floor 3.

L layers of a group · B rows · T new tokens · S slots (the budget) · N keys attended to (S, or S + T for a block) ·
P sets of kept tokens (1, or one a key/value head) · E rotated elements.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt_kv import registry
from litgpt_kv.attention.rope import Angles, angles_at, ranks, rows_at, visible
from litgpt_kv.cache import serialize as saving
from litgpt_kv.cache.layer import DecodeStep, LayerCache, PromptStep, Turn
from litgpt_kv.cache.plan import Plan, limit_of, settle
from litgpt_kv.cache.slots import Slots
from litgpt_kv.config import KVCacheArgs

if TYPE_CHECKING:
    from litgpt_kv.model.gpt import GPT


class KVCache(nn.Module):
    """Everything a model remembers of a batch of sequences. Passed to `GPT.forward`, never attached to the model.

    Attributes:
        pos: (B,) int64, the tokens each row has seen, which is its next position.
        live: (B,) bool, False for a retired row, which stays behind while the others decode.
    """

    row_dim: ClassVar[int] = 0
    _model: weakref.ref[GPT] | None = None

    def __init__(
        self,
        config: Config,
        args: KVCacheArgs,
        batch_size: int,
        max_tokens: int,
        context: int,
        dtype: torch.dtype = torch.float32,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        super().__init__()
        self.args, self.max_tokens, self.dtype = args, max_tokens, dtype
        devices = devices or [torch.device("cpu")] * config.n_layer
        self.register_buffer("pos", torch.zeros(batch_size, dtype=torch.int64, device=devices[0]), persistent=False)
        self.register_buffer("live", torch.ones(batch_size, dtype=torch.bool, device=devices[0]), persistent=False)
        plans = settle(config, args, max_tokens, context)
        groups: dict[tuple, list[Plan]] = {}
        for plan in plans:
            groups.setdefault((*plan.shared, devices[plan.facts.index]), []).append(plan)
        exact = torch.promote_types(dtype, torch.float32)
        self.slots = nn.ModuleList()
        layers: dict[int, LayerCache] = {}
        for group in groups.values():
            first, device = group[0], devices[group[0].facts.index]
            facts = tuple(plan.facts for plan in group)
            slots = Slots(first, facts, batch_size, exact, device)
            self.slots.append(slots)
            for i, plan in enumerate(group):
                store = registry.get("storage", plan.storage)
                layer = registry.get("cache", plan.strategy.layer_cache)
                keys, values = (
                    store(batch_size, plan.facts.groups, plan.slots, width, dtype, device)
                    for width in (plan.facts.key_size, plan.facts.value_size)
                )
                layers[plan.facts.index] = layer(plan.facts, slots, slots.place(i), keys, values, plan.raw)
        self.layers = nn.ModuleList(layers[i] for i in range(config.n_layer))
        self._group = [next(g for g, s in enumerate(self.slots) if plan.facts in s.layers) for plan in plans]
        self._plans = plans
        self.limit, self.why = limit_of(plans, context)
        self._longest_block = max(1, min(plan.slots - plan.sinks for plan in plans))
        self._most_slots = max(plan.slots for plan in plans)
        self._theta: list[Angles] = []  # of each rope base, for angles beyond the model's tables
        self._seen: list[int] | None = [0] * batch_size  # what `pos` and `live` hold, known without a device sync
        self._alive = [True] * batch_size
        self._lengths: list[int] = []  # of the prompts being read, between the door and the count
        self._whole: tuple[KVCache, range] | None = None  # of a view: whose rows it shows

    @classmethod
    def build(
        cls,
        model: GPT,
        args: KVCacheArgs | str | None = None,
        batch_size: int = 1,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """A cache that fits a model, on the devices of its layers.

        Args:
            model: The model it is for.
            args: What to keep and how, or just the name of a strategy; the default keeps everything.
            batch_size: Rows, B.
            max_tokens: How many tokens a row may see, prompt included: the size of a dense cache, and the budget where
                none is given. None: the model's context.
            dtype: Of stored keys and values; None: that of the model's weights.

        Raises:
            ValueError: If the arguments contradict each other or ask for more than the model's context.
        """
        args = KVCacheArgs(strategy=args) if isinstance(args, str) else args or KVCacheArgs()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        context = model.max_seq_length
        max_tokens = context if max_tokens is None else max_tokens
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        devices = [next(block.attn.proj.parameters()).device for block in model.transformer.h]
        dtype = dtype or model.transformer.wte.weight.dtype
        with torch.inference_mode(False):  # tensors made inside could not be used outside of it
            cache = cls(model.config, args, batch_size, max_tokens, context, dtype, devices)
            cache._model = weakref.ref(model)  # whose it is, for `save`
            if any(plan.endless for plan in cache._plans):
                cache._theta = model.theta()
            for slots in cache.slots:
                slots.sharing = model.sharing
            return cache

    @classmethod
    def nbytes(
        cls,
        config: Config,
        args: KVCacheArgs,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, int]:
        """Exact bytes of a cache, before anything is allocated: {"keys", "values", "positions", "ranks", "total"}."""
        devices = [torch.device("meta")] * config.n_layer
        return cls(config, args, batch_size, max_tokens, config.block_size, dtype, devices).allocated()

    def allocated(self) -> dict[str, int]:
        """Bytes held by this cache's buffers, as `nbytes` names them; they never grow."""
        size = {
            "keys": sum(_bytes(layer.keys) for layer in self.layers),
            "values": sum(_bytes(layer.values) for layer in self.layers),
            "positions": sum(slots.pos.nbytes for slots in self.slots) + self.pos.nbytes + self.live.nbytes,
            "ranks": sum(slots.rank.nbytes for slots in self.slots if slots.rank is not None),
        }
        return {**size, "total": sum(size.values())}

    def save(self, path: str | Path, model: GPT | None = None) -> None:
        """Writes the cache to a file in safetensors' format, with its arguments and a fingerprint of its model.

        Args:
            path: Of the file.
            model: The cache's model; needed only by a copy or where the model it was built for is gone.
        """
        model = model or (self._model and self._model())
        if model is None:
            raise ValueError("The cache's model is gone: give it, as save(path, model).")
        saving.write(self, path, model)

    @classmethod
    def load(cls, path: str | Path, model: GPT, args: KVCacheArgs | str | None = None) -> KVCache:
        """The cache that `save` wrote, on the devices of the model's layers.

        Args:
            path: Of the file.
            model: The model that it was made with.
            args: What it should be, or the name of its strategy if all else is as by default; None: not checked.

        Raises:
            ValueError: If the file is missing or no cache, or was made with another model or other arguments.
        """
        return saving.read(cls, path, model, args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a weak reference can neither be copied nor pickled

    def __repr__(self) -> str:
        kept = dict.fromkeys(f"{type(s.strategy).__name__.lower()} {s.size}" for s in self.slots)
        return f"KVCache({', '.join(kept)} tokens a row; {len(self.layers)} layers, {self.batch_size} rows)"

    @property
    def batch_size(self) -> int:
        return self.pos.size(0)

    @property
    def seen(self) -> list[int]:
        """The tokens each row has seen: `pos` as the host knows it, without waiting for the device."""
        return list(self._host()[0])

    @property
    def first_chunk(self) -> int:
        """The most prompt tokens that every layer can keep: the first pass of the min-length prefill."""
        return min(plan.slots for plan in self._plans)

    @property
    def longest_block(self) -> int:
        """The most tokens that a decode step can take."""
        return self._longest_block

    @property
    def exact_blocks(self) -> bool:
        """Whether a block of tokens gives what they give one at a time: what is kept does not hang on attention."""
        return all(plan.strategy.recency for plan in self._plans)

    @torch.no_grad()
    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empties all rows, or some; they may then be seeded again."""
        chosen = self._checked(range(self.batch_size) if rows is None else rows)
        where = slice(None) if rows is None else torch.tensor(chosen, device=self.pos.device).long()
        for module in self.modules():
            if module is not self and hasattr(module, "reset"):
                module.reset(where)
        self.pos[where], self.live[where] = 0, True
        self._note(dict.fromkeys(chosen, 0), alive=True)

    @torch.no_grad()
    def retire(self, rows: Sequence[int]) -> None:
        """Stops rows: later steps neither advance their counter nor change what they keep."""
        chosen = self._checked(rows)
        self._note(dict.fromkeys(chosen), alive=False)
        self.live[torch.tensor(chosen, dtype=torch.int64, device=self.pos.device)] = False

    @torch.no_grad()
    def revive(self) -> None:
        """Lets retired rows go on where they stopped."""
        self._note(dict.fromkeys(range(self.batch_size)), alive=True)
        self.live.fill_(True)

    def row(self, b: int) -> KVCache:
        """A cache of one row that shares this one's memory: seed it to admit a request without touching the others."""
        (b,) = self._checked([b])
        return self.rows(b, b + 1)

    def rows(self, start: int, stop: int) -> KVCache:
        """As `row`, of the rows `start` to `stop` - 1."""
        chosen = range(start, stop)
        self._checked(chosen)
        view = _with_rows(self, lambda buffer, dim: buffer.narrow(dim, start, len(chosen)))
        view._whole = (self, chosen)
        return view

    def repeat(self, count: int) -> KVCache:
        """A cache of its own in which every row stands `count` times, side by side: one context, many questions."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        with torch.inference_mode(False), torch.no_grad():  # see `build`
            copy = _with_rows(self, lambda buffer, dim: buffer.repeat_interleave(count, dim))
        copy._whole = None
        copy._seen, copy._alive = ([x for x in values for _ in range(count)] for values in self._host())
        return copy

    def recount(self) -> None:
        """Reads the counters off the buffers, after these were written from outside (a device sync)."""
        self._forget()
        self._alive = self.live.tolist()

    def tokens(self) -> dict[str, list[int]]:
        """For each row the tokens it has "seen" and the most that any layer has "kept" of them (a device sync)."""
        kept = torch.stack([(s.pos >= 0).sum(-1).amax((0, 2)).to(self.pos.device) for s in self.slots]).amax(0)
        return {"seen": self.pos.tolist(), "kept": kept.tolist()}

    def _checked(self, rows: Iterable[int] | Tensor) -> list[int]:
        if isinstance(rows, Tensor):  # row numbers, or a mask of rows
            if rows.dtype == torch.bool and rows.shape != (self.batch_size,):
                raise ValueError(f"A mask of rows has shape ({self.batch_size},), got {tuple(rows.shape)}.")
            rows = (rows.nonzero().flatten() if rows.dtype == torch.bool else rows).tolist()
        if not isinstance(rows, Iterable):
            raise ValueError(f"Rows are a list of row numbers, got {rows!r}.")
        rows = list(rows)
        if bad := [b for b in rows if isinstance(b, bool) or not isinstance(b, int) or not 0 <= b < self.batch_size]:
            raise ValueError(f"The cache has rows 0 to {self.batch_size - 1}, got {bad[0]!r}.")
        return rows

    # -- one pass: begin works out slots, masks and angles once for all layers; end counts --------------------------

    def begin_prompt(self, T: int, length: Tensor, angles: list[Angles], tables: list[int]) -> list[Turn]:
        """Prepares to seed empty rows with prompts of `length` (B,) tokens, padded on the right to T."""
        self._check_prompt(T, length)
        pos = torch.arange(T, device=self.pos.device).expand(self.batch_size, T)
        steps = []
        for slots in self.slots:
            device, kept = slots.pos.device, None
            here = length.to(device)
            if slots.rank is None:  # every layer of the group keeps the same: choose once
                kept = slots.keep(pos.unsqueeze(1).to(device), here)
            steps.append(PromptStep(slots, here, kept))
        return [Turn(layer, steps[g], angles[t]) for layer, g, t in zip(self.layers, self._group, tables)]

    def end_prompt(self, length: Tensor) -> None:
        """Counts the tokens of a prefill that went well."""
        self.pos.copy_(length)
        self._note(dict(enumerate(self._lengths)))

    def begin(self, T: int, rope: list[Angles], tables: list[int]) -> list[Turn]:
        """Prepares to decode T tokens a row.

        Args:
            T: New tokens a row; more than one is a block, causal inside.
            rope: The model's cos and sin tables, one pair or one for each of its rope bases.
            tables: Which of them each layer uses.
        """
        extent, even = self._check_step(T)
        pos = self.pos.unsqueeze(1) + torch.arange(T, device=self.pos.device)  # (B, T)
        steps = [self._step(slots, pos, extent, even) for slots in self.slots]
        angles: dict[tuple, tuple] = {}
        turns = []
        for layer, plan, g, t in zip(self.layers, self._plans, self._group, tables):
            if (g, t) not in angles:
                angles[g, t] = self._angles(plan, steps[g], extent, t, *rope[t])
            turns.append(Turn(layer, steps[g], *angles[g, t]))
        return turns

    def _step(self, slots: Slots, pos: Tensor, extent: int, even: bool) -> DecodeStep:
        T, device, extent = pos.size(1), slots.pos.device, min(extent, slots.size)
        pos, live = pos.to(device), self._frozen(device)
        slot = slots.choose(pos[:, -1], T)
        window = slots.window
        if T == 1:
            slots.put(slot, pos, live)
            seen = slots.pos[..., :extent]
        else:
            old = slots.pos
            if slots.rank is None:
                window = min(slots.size - slots.sinks, window or slots.size) if slots.strategy.evicts else window
            else:  # which tokens the block evicts depends on data: all leave before it
                old = old.scatter(-1, slot, -1)
            seen = torch.cat((old[..., :extent], pos[None, :, None].expand(slot.shape)), dim=-1)
            slots.put(slot, pos, live)
        mask = None
        if not even or T > 1:
            mask = visible(pos[None, :, None], seen, window, slots.sinks if T > 1 else 0)
        return DecodeStep(slots, pos, slot, seen, mask, live, extent)

    def _frozen(self, device: torch.device) -> Tensor | None:
        """`live` on a device; None where the host knows that every row is."""
        known = not torch.compiler.is_compiling() and all(self._host()[1])
        return None if known else self.live.to(device)

    def _angles(self, plan: Plan, step: DecodeStep, extent: int, table: int, cos: Tensor, sin: Tensor) -> tuple:
        """`Turn`'s angles, far and ranked, as the plan's positions ask for them."""
        T, slots = step.pos.size(1), step.slots
        if plan.raw:
            rank = ranks(step.seen)  # (L, B, P, N)
            mine = rank[..., -T:] if T > 1 else rank.gather(-1, step.slot)
            return rows_at(cos, sin, mine[0, :, 0]), None, (rank, (cos, sin))
        if not plan.endless:
            return rows_at(cos, sin, step.pos), None, None
        far = None
        if slots.sinks and extent + T > slots.size:  # until something was evicted all distances are the text's own
            # and inside the window they stay so: only the sinks, always in the first slots, are nearer than they were
            first = step.seen[0, ..., : slots.sinks if T == 1 else None]
            far = rows_at(cos, sin, step.pos.clamp(max=slots.size - 1)), (first >= 0) & (first < slots.sinks)
        here = step.pos.device if step.pos.device.type != "mps" else "cpu"  # mps has no float64
        theta = (x.to(here) for x in self._theta[table])
        return angles_at(tuple(theta), step.pos, cos.dtype), far, None

    def end(self, turns: list[Turn]) -> None:
        """Counts the tokens of a decode pass that went well, and updates the ranks."""
        T = turns[0].step.pos.size(1)
        for step in {id(turn.step): turn.step for turn in turns}.values():
            step.slots.rerank(step.slot, step.entered, step.masses, step.pos[:, -1], step.live)
        self.pos.add_(self.live, alpha=T)
        if torch.compiler.is_compiling():
            self._forget()
        else:
            seen, alive = self._host()
            self._note({b: n + T for b, n in enumerate(seen) if alive[b]})

    # -- the door: what a pass may do, checked on the host without waiting for the device ---------------------------

    def _check_prompt(self, T: int, length: Tensor) -> None:
        if not isinstance(length, Tensor) or tuple(length.shape) != (self.batch_size,):
            raise ValueError(
                f"length must have shape ({self.batch_size},), one a row, got {getattr(length, 'shape', length)}."
            )
        self._lengths = lengths = length.tolist()
        if min(lengths) < 1 or max(lengths) > T:
            bad = min(lengths) if min(lengths) < 1 else max(lengths)
            raise ValueError(f"Every row's prompt must have 1 to {T} tokens, got {bad}.")
        seen, alive = self._host()
        if any(seen) or not all(alive):
            what = f"tokens seen are {seen}" if any(seen) else f"row {alive.index(False)} is retired"
            raise ValueError(f"A prompt needs empty rows; {what}: call reset() first.")
        if self.limit is not None and max(lengths) > self.limit:
            raise ValueError(f"A prompt of {max(lengths)} tokens is over the limit of {self.limit}: {self.why}.")

    def _check_step(self, T: int) -> tuple[int, bool]:
        """Raises if T more tokens do not fit; returns how many slots can be filled, and whether all of them are."""
        if T > self._longest_block:
            most = self._longest_block
            hint = "" if any(self._host()[0]) else " To read a prompt into an empty cache give its length, too."
            raise ValueError(
                f"A block of {T} tokens is longer than the {most} a layer can take (budget less sinks).{hint}"
            )
        if torch.compiler.is_compiling():
            if self.limit is not None:
                fits = ((self.pos + T <= self.limit) | ~self.live).all()
                torch._assert_async(fits, f"A row is over the limit of {self.limit} tokens: {self.why}.")
            return self._most_slots + T, False
        seen, alive = self._host()
        for b, n in enumerate(seen):
            if self.limit is not None and alive[b] and n + T > self.limit:
                raise ValueError(f"Row {b} would see {n + T} tokens, over the limit of {self.limit}: {self.why}.")
        even = all(alive) and len(set(seen)) == 1
        return max(seen) + T if T == 1 else max(1, *seen), even

    def _host(self) -> tuple[list[int], list[bool]]:
        """What `pos` and `live` hold, kept on the host so that no step waits for the device; a view asks the whole."""
        if self._whole is not None:
            whole, rows = self._whole
            seen, alive = whole._host()
            return [seen[b] for b in rows], [alive[b] for b in rows]
        if self._seen is None:
            self._seen = self.pos.tolist()
        return self._seen, self._alive

    def _note(self, seen: dict[int, int | None], alive: bool | None = None) -> None:
        """Writes down for some rows how many tokens they have seen (None: no change) and whether they are live."""
        if self._whole is not None:
            whole, rows = self._whole
            whole._note({rows[b]: n for b, n in seen.items()}, alive)
            return
        for b, n in seen.items():
            if self._seen is not None and n is not None:
                self._seen[b] = n
            if alive is not None:
                self._alive[b] = alive

    def _forget(self) -> None:
        """A compiled step counts on the device alone."""
        (self if self._whole is None else self._whole[0])._seen = None


def _bytes(module: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


def _with_rows(module: nn.Module, change: Callable[[Tensor, int], Tensor]) -> Any:
    """A shallow copy of a tree of modules in which every buffer is changed along its dimension of rows."""
    copy = module.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    dim = getattr(module, "row_dim", 0)
    copy._buffers = {k: t if t is None else change(t, dim) for k, t in module._buffers.items()}
    copy._modules = {k: _with_rows(m, change) for k, m in module._modules.items()}
    return copy
