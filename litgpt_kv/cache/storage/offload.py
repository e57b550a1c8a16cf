"""Keys and values in the memory of the host, for contexts that the device has no room for.

B rows · G key/value heads (or pools) · S slots · T tokens · D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from litgpt_kv.cache.storage.base import Storage
from litgpt_kv.registry import register

REFUSED: tuple[str, ...] = ("cpu",)  # devices whose memory is the host's


@register("storage", "offload")
class Offload(Storage):
    """Keys or values as they are, in the host's memory; the device holds those of two layers at a time.

    While a layer attends, the next one's are on their way to the device, on a stream of their own. New tokens are
    written in both places. Copying a layer takes as long as the bus needs: decoding waits for it where attention and
    the rest of a layer are faster. A compiled model cannot wait for copies, and takes another storage.

    Attributes:
        data: (B, G, S, D) on the host, in pinned memory if the device is an NVIDIA GPU's.
    """

    divisible: ClassVar[bool] = False
    needs_accelerator: ClassVar[bool] = True
    capturable: ClassVar[bool] = False
    data: Tensor

    def __init__(self, role: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        if device.type in REFUSED:
            raise ValueError(
                f"The storage 'offload' keeps tokens in the host's memory, where those of a model on {device.type} are "
                "anyway: use 'plain', or int8, int4, k8v4 or float8 to save memory."
            )
        super().__init__()
        host = torch.device("meta" if device.type == "meta" else "cpu")
        data = torch.zeros(shape, dtype=dtype, device=host, pin_memory=device.type == "cuda")
        self.register_buffer("data", data, persistent=False)
        self._device, self._state, self._next = device, _State(), None

    @property
    def device(self) -> torch.device:
        return self._device

    def before(self, following: Storage) -> None:
        self.__dict__["_next"] = following if isinstance(following, Offload) else None  # no submodule

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        self.put(self.data, slot.cpu(), x.cpu(), None if live is None else live.cpu())
        ahead = self._arrived(None)
        self._state.version += 1
        if ahead is not None:  # slots beyond what is on its way are never read from it
            self.put(ahead.data, slot.clamp(max=ahead.data.size(2) - 1), x.to(ahead.data.dtype), live)
            ahead.version = self._state.version

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots on the device, (B, G, extent, D); the next layer's set out for it."""
        ahead = self._arrived(extent) or self._fetch(extent)
        self._state.ahead = None
        following = self._next
        if following is not None and following.data.size(0) == self.data.size(0):
            following._state.ahead = following._fetch(min(extent, following.data.size(2)))
        ahead.wait()
        return ahead.data

    def reset(self, rows: Tensor | slice) -> None:
        super().reset(rows)
        self.changed()

    def changed(self) -> None:
        self._state.version += 1

    def _fetch(self, extent: int) -> _Ahead:
        """Begin to copy slots to the device."""
        part, stream = self.data[:, :, :extent], _stream(self._device)
        key = (self.data.data_ptr(), self.data.size(0))
        if stream is None:
            return _Ahead(part.to(self._device, copy=True), self._state.version, key)
        stream.wait_stream(torch.cuda.current_stream(self._device))  # memory that is reused may still be read
        with torch.cuda.stream(stream):
            data = part.to(self._device, non_blocking=True)
            return _Ahead(data, self._state.version, key, stream.record_event())

    def _arrived(self, extent: int | None) -> _Ahead | None:
        """What was fetched before, if it is of these rows, of that extent and still true."""
        ahead = self._state.ahead
        if ahead is None or ahead.version != self._state.version or extent not in (None, ahead.data.size(2)):
            return None
        if ahead.key != (self.data.data_ptr(), self.data.size(0)):
            return None
        ahead.wait()
        return ahead

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Offload:
        like = fn(torch.empty(0, dtype=self.data.dtype, device=self._device))
        if like.device.type in REFUSED:
            raise ValueError(f"The storage 'offload' is not for a model on {like.device.type}.")
        self._device = like.device
        if like.dtype != self.data.dtype:
            data = self.data.to(like.dtype)
            self.data = data.pin_memory() if like.device.type == "cuda" else data
        self._state.version += 1
        return self


@dataclass(eq=False)
class _Ahead:
    """Slots on the device, or on their way there.

    Attributes:
        data: (B, G, extent, D). version: Of the storage when they set out. key: Which rows they are.
        event: To wait for; None: they are there.
    """

    data: Tensor
    version: int
    key: tuple[int, int]
    event: Any = None

    def wait(self) -> None:
        """Let what is done on the device next wait until they are there."""
        if self.event is not None:
            stream = torch.cuda.current_stream(self.data.device)
            stream.wait_event(self.event)
            self.data.record_stream(stream)
            self.event = None


class _State:
    """What a storage and the views of its rows share.

    Attributes:
        version: Of what is stored; every write makes a new one. ahead: Slots on their way, or None.
    """

    def __init__(self) -> None:
        self.version, self.ahead = 0, None

    def __getstate__(self) -> dict[str, Any]:
        return {"version": self.version, "ahead": None}


@functools.cache
def _stream(device: torch.device) -> Any:
    """The stream of copies to a device; None where copies are done at once."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
