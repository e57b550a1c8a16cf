"""What the cache held at the end of conversations' last turns, so that the next turn is all that is read."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from litgpt_kv.cache.kv_cache import KVCache

TOKEN_BYTES = 36  # of a Python integer in a tuple
Messages = tuple[tuple[str, str], ...]  # roles and texts


@dataclass(frozen=True)
class KeptState:
    """A conversation after a turn.

    Attributes:
        cache: The name of the server's cache. messages: All that was said, the last reply included.
        state: A cache of one row. last: The last token drawn, which the state has not read yet.
        text: All tokens of the conversation, for the repetition penalty. state_bytes: Memory of the state.
        seen: Tokens that the state has seen; other threads may not ask the state, which the engine's thread uses.
    """

    cache: str
    messages: Messages
    state: KVCache
    last: int
    text: tuple[int, ...]
    state_bytes: int
    seen: int

    @property
    def nbytes(self) -> int:
        """Memory of the state, the messages and the tokens."""
        words = sum(sys.getsizeof(part) for message in self.messages for part in message)
        return self.state_bytes + words + TOKEN_BYTES * len(self.text)


class Conversations:
    """States of conversations by id, at most `limit` bytes; the least recently used one leaves.

    Threads may share it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._states: OrderedDict[str, KeptState] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    def find(self, id: str, cache: str, messages: Messages) -> KeptState | None:
        """The state that these messages go on from: it has all but the last of them. None if there is none."""
        with self._lock:
            kept = self._states.get(id)
            if kept is None or kept.cache != cache or kept.messages != messages[:-1]:
                return None
            self._states.move_to_end(id)
            return kept

    def keep(self, id: str, kept: KeptState) -> None:
        """Keep a state in place of an earlier one; one that is larger than the limit is not kept."""
        with self._lock:
            self._drop(id)
            self._states[id] = kept
            self.nbytes += kept.nbytes
            while self.nbytes > self.limit:
                self._drop(next(iter(self._states)))

    def state(self, id: str) -> KeptState | None:
        """The state of a conversation, to look at."""
        with self._lock:
            return self._states.get(id)

    def _drop(self, id: str) -> None:
        dropped: Any = self._states.pop(id, None)
        self.nbytes -= 0 if dropped is None else dropped.nbytes
