"""The decode step of a model, compiled: a graph for each length up to which caches are read.

On a CUDA device, a step that comes again and again is recorded as a CUDA graph, too.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.config import check_callable
from litgpt_kv.generate.cuda_graph import CudaGraph, addresses, can_record
from litgpt_kv.model.packed import prepare_to_compile

MOST_GRAPHS = 64  # more than the read lengths of a long text; beyond torch's limit, 8 by default, steps run eagerly
RECORD_AFTER = 8  # steps of a kind before it is recorded, as recording takes as long as several steps


@dataclass(eq=False)
class _Known:
    """What was done with a cache.

    Attributes:
        token: (B, 1), what steps on a GPU read, at an address that stays.
        steps: How many steps of each kind there were: by `evicting`, `read_length`, and whether in inference mode.
        graphs: The CUDA graph of each kind; None: it cannot be recorded.
        addresses: See `cuda_graph.addresses`.
    """

    token: Tensor
    steps: Counter = field(default_factory=Counter)
    graphs: dict[tuple, CudaGraph | None] = field(default_factory=dict)
    addresses: tuple[int, ...] = ()


class CompiledDecoder:
    """Run one-token steps compiled; a graph is made when the first step needs it.

    Args:
        model: The model. How its weights are kept on a CPU may change (`prepare_to_compile`).
        note: Called with a line of text before a graph is made and after.
        backend: Of `torch.compile`.

    Attributes:
        seconds: Spent on compiling and on recording CUDA graphs so far. graphs: How many steps were compiled.
    """

    def __init__(
        self, model: GPT, note: Callable[[str], None] = lambda text: None, backend: str | Callable = "inductor"
    ) -> None:
        check_callable("note", note)
        self.note, self.seconds, self.graphs = note, 0.0, 0
        self._model = model
        self._step = torch.compile(model, dynamic=False, backend=backend)
        self._known: WeakKeyDictionary[KVCache, _Known] = WeakKeyDictionary()  # a cache that is gone is forgotten

    def __call__(self, token: Tensor, cache: KVCache) -> Tensor:
        """Decode tokens (B, 1) on a static cache: logits (B, 1, V)."""
        known = self._known.get(cache)
        if known is None:
            prepare_to_compile(self._model, cache.batch_size)
            with torch.inference_mode(False):
                known = self._known[cache] = _Known(torch.zeros_like(token, memory_format=torch.contiguous_format))
        kind = (cache.evicting, cache.read_length, torch.is_inference_mode_enabled())
        records = can_record(self._model, cache)
        if records:
            token = known.token.copy_(token)
            if known.addresses != (now := addresses(self._model, cache)):
                known.addresses, known.graphs, known.steps = now, {}, Counter()
        known.steps[kind] += 1
        if known.steps[kind] == 1:
            with self._watched(cache):
                return self._step(token, cache)
        if records and known.steps[kind] >= RECORD_AFTER:
            if kind not in known.graphs:
                known.graphs[kind] = self._record(token, cache)
            if (graph := known.graphs[kind]) is not None:
                return graph()
        return self._step(token, cache)

    def _record(self, token: Tensor, cache: KVCache) -> CudaGraph | None:
        began = time.perf_counter()
        try:
            return CudaGraph(self._step, token, cache)
        except RuntimeError as error:
            self.note(f"This step is not recorded as a CUDA graph: {str(error).splitlines()[0]}")
            return None
        finally:
            self.seconds += time.perf_counter() - began

    @torch.inference_mode()
    def warm_up(self, cache: KVCache, seen: int = 1) -> float:
        """Compile the first steps after prompts of `seen` tokens before anyone waits for them, if nothing is yet.

        Args:
            cache: An empty cache; it is empty afterwards.
            seen: Tokens of the longest prompt.

        Returns:
            The seconds it took to compile.
        """
        if self.graphs:
            return 0.0
        cache.static = True
        token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=cache.pos.device)
        self._model(token, cache)  # as a prompt would: the model makes its rope tables in its first pass
        cache.reset()
        with cache.expect(seen):
            self(token, cache)
        cache.reset()
        return self.seconds

    @contextlib.contextmanager
    def _watched(self, cache: KVCache) -> Iterator[None]:
        """Count and announce the graphs that are made meanwhile, and allow for many."""
        import torch._dynamo as dynamo  # takes a second, which only those pay who compile

        began = 0.0
        length = max(plan.slots for plan in cache.plans) if cache.read_length is None else cache.read_length

        def start(*_: object) -> None:
            nonlocal began
            began = time.perf_counter()
            self.note(f"Compiling the decode step for up to {length:,} tokens in the cache ...")

        def end(*_: object) -> None:
            spent = time.perf_counter() - began
            self.seconds, self.graphs = self.seconds + spent, self.graphs + 1
            self.note(f"... done in {spent:.1f} s.")

        handler = dynamo.callback.callback_handler
        handler.register_start_callback(start)
        handler.register_end_callback(end)
        try:
            with dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                yield
        finally:
            handler.remove_start_callback(start)
            handler.remove_end_callback(end)


def keep_compiled(folder: Path | None = None) -> Path | None:
    """Let compiled code of this process be kept in a folder, where later processes find it; return the folder.

    Args:
        folder: Where; None: `litgpt_kv/inductor` in the user's folder for caches. If torch's environment variable
            TORCHINDUCTOR_CACHE_DIR names a folder, that is taken instead.

    Returns:
        The folder, or None if it cannot be written to: torch then keeps the code in a temporary one.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import, as above

    known = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if known and known != default_cache_dir():  # which torch sets by itself when it is imported
        return Path(known)
    try:
        if folder is None:
            home = os.environ.get("XDG_CACHE_HOME")
            folder = (Path(home) if home else Path.home() / ".cache") / "litgpt_kv" / "inductor"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds code that is run
    except (OSError, RuntimeError):
        return None
    if not os.access(folder, os.W_OK):
        return None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return folder
