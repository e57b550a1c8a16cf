"""Keys quantised by channel, values by token, the newest tokens as they are (KIVI).

B rows · G key/value heads · S slots · T new tokens · D width · g tokens of a group · N tokens of the open group and the
new ones, rounded up to W groups · K groups that a storage has room for.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_kv.cache.storage.coded import Coded, check_choice, check_positive, grouped, groups_of, levels, pack, unpack
from litgpt_kv.registry import register


@register("storage", "kivi")
class Kivi(Coded):
    """Keys of few bits with a scale a channel and group of tokens; values with a scale a token; new tokens exact.

    Keys have channels of very different size, which a scale a channel follows. A channel's scale needs several tokens:
    new ones are kept as they are until `group` of them are there, which are then quantised together, once. So tokens
    must leave in order. KIVI: Liu et al. 2024, arXiv 2402.02750; the official code (jy-yuan/KIVI) quantises a value
    when it is no longer among the last `residual_length`, here keys and values wait for the end of their group.

    `bits` (2) is 2 or 4; `group` (32) is the tokens of a group, and the most elements of a value that share a scale.
    A budget below it leaves all tokens as they are. Tokens that left before their group was whole count for its scales.

    Attributes:
        codes: (B, G, S + 1, .) packed uint8; the last slot takes what is not to be written.
        scale, zero: bfloat16; of keys (B, G, K, D), of values (B, G, S + 1, groups of elements).
        group_of: (B, 1, S + 1) int32 which of the K groups a slot's token is in, counted from 1; 0: none yet.
        recent: (B, G, g, D) the open group's tokens. recent_slot: (B, 1, g) int64 their slots, counted from 1; 0 where
            the slot was given to another token. open: (B, 1, 1) int64 how many they are.
    """

    in_order: ClassVar[bool] = True
    divisible: ClassVar[bool] = False
    bits = 2
    options: ClassVar[tuple[str, ...]] = ("bits", "group")
    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor
    recent: Tensor
    recent_slot: Tensor
    open: Tensor

    def __init__(
        self,
        role: str,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        bits: int = 2,
        group: int = 32,
    ) -> None:
        check_choice("kivi", "bits", bits, (2, 4))
        check_positive("kivi", "group", group)
        B, G, S, D = shape
        super().__init__(role, D, dtype)
        self.bits = bits
        self.group = group
        self.count, self.size = (1, D) if role == "keys" else groups_of(D, group)
        # held tokens are a beginning and a run, each with a group at its ends that is theirs in part
        scales = -(-S // self.group) + 3 if role == "keys" else S + 1

        def add(name: str, *size: int, of: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(size, dtype=of, device=device), persistent=False)

        add("codes", B, G, S + 1, -(-self.count * self.size * bits // 8), of=torch.uint8)
        add("scale", B, G, scales, D if role == "keys" else self.count, of=torch.bfloat16)
        add("zero", *self.scale.shape, of=torch.bfloat16)
        add("group_of", B, 1, S + 1, of=torch.int32)
        add("recent", B, G, self.group, D, of=dtype)
        add("recent_slot", B, 1, self.group, of=torch.int64)
        add("open", B, 1, 1, of=torch.int64)

    def write(self, slot: Tensor, x: Tensor, live: Tensor | None = None) -> None:
        """See `Storage.write`; P is 1, as tokens that leave in order are the same for all heads."""
        (B, _, T, _), g = x.shape, self.group
        slot = slot.expand(B, 1, T)
        real = torch.ones_like(slot, dtype=torch.bool) if live is None else live.view(B, 1, -1).expand(B, 1, T)
        self._forget(slot, real)
        # the open group, then the new tokens, and their slots counted from 1; the last place takes what is not real
        N = -(-(g + T) // g) * g
        every, slots = F.pad(self.recent, (0, 0, 0, N - g + 1)), F.pad(self.recent_slot, (0, N - g + 1))
        place = (self.open + real.cumsum(dim=-1) - 1).masked_fill(~real, N)
        every.scatter_(2, place.unsqueeze(-1).expand(x.shape), x.to(every.dtype))
        slots.scatter_(2, place, slot + 1)
        every, slots = every[:, :, :N], slots[:, :, :N]
        tokens = self.open + real.sum(dim=-1, keepdim=True)  # (B, 1, 1)
        end = tokens // g * g  # of the whole groups
        self._close(every, slots, end)
        rest = end + torch.arange(g, device=x.device)  # (B, 1, g)
        inside = rest < tokens
        left = every.gather(2, rest.unsqueeze(-1).expand(self.recent.shape))
        self.recent.copy_(torch.where(inside.unsqueeze(-1), left, 0.0))
        self.recent_slot.copy_(slots.gather(2, rest).masked_fill(~inside, 0))
        self.open.copy_(tokens - end)

    def _forget(self, slot: Tensor, real: Tensor) -> None:
        """Drop the tokens whose slots are given to others."""
        taken = torch.zeros_like(self.group_of, dtype=torch.bool)  # (B, 1, S + 1), slots counted from 1
        taken.scatter_(2, (slot + 1) * real, True)
        self.group_of[..., :-1].masked_fill_(taken[..., 1:], 0)
        self.recent_slot.masked_fill_(taken.gather(2, self.recent_slot), 0)

    def _close(self, x: Tensor, slots: Tensor, end: Tensor) -> None:
        """Quantise the tokens x (B, G, N, D) of the slots (B, 1, N), those before `end` (B, 1, 1)."""
        N, g, last = x.size(2), self.group, self.codes.size(2) - 1
        number = torch.arange(N, device=x.device)
        target = torch.where((number < end) & (slots > 0), slots - 1, last)  # (B, 1, N)
        x = x.to(self.exact)
        if self.role == "keys":
            codes, scale, zero = levels(x.unflatten(2, (-1, g)), 3, self.bits)  # (B, G, W, g, D)
            used = torch.zeros(*end.shape[:2], self.scale.size(2) + 1, dtype=torch.int32, device=x.device)
            used.scatter_(2, self.group_of.long(), 1)
            group = used[..., 1:].argsort(dim=-1, stable=True)[..., : N // g]  # (B, 1, W), those without a token
            for buffer, new in ((self.scale, scale), (self.zero, zero)):
                self.put(buffer, group, new.squeeze(3), number[::g] < end)
            codes, group = codes.flatten(2, 3), (group + 1).repeat_interleave(g, dim=2)
        else:
            codes, scale, zero = levels(grouped(x, self.count, self.size), -1, self.bits)
            codes, group = codes.flatten(-2), torch.ones_like(target)
            self.put(self.scale, target, scale.squeeze(-1), None)
            self.put(self.zero, target, zero.squeeze(-1), None)
        self.put(self.codes, target, pack(codes, self.bits), None)
        self.group_of.scatter_(2, target, group.to(self.group_of.dtype))
        self.group_of[..., last] = 0

    def read(self, extent: int) -> Tensor:
        """The first `extent` slots, dequantised, but those of the open group as they are, (B, G, extent, D)."""
        extent = min(extent, self.codes.size(2) - 1)
        n = extent + 1  # one more, for what is not read
        codes = unpack(self.codes[:, :, :n], self.bits)[..., : self.count * self.size].to(self.exact)
        known = self.group_of[:, :, :n].unsqueeze(-1)
        if self.role == "keys":
            index = (known.long() - 1).clamp(min=0).expand(-1, codes.size(1), -1, self.width)
            scale, zero = (x.gather(2, index).to(self.exact) for x in (self.scale, self.zero))
            x = codes * scale + zero
        else:
            scale, zero = (x[:, :, :n].to(self.exact).unsqueeze(-1) for x in (self.scale, self.zero))
            x = (codes.unflatten(-1, (self.count, self.size)) * scale + zero).flatten(-2)[..., : self.width]
        x = torch.where(known > 0, x, 0.0).to(self.dtype)
        slot = self.recent_slot - 1
        slot = torch.where((slot < 0) | (slot > extent), extent, slot)
        return x.scatter(2, slot.unsqueeze(-1).expand(self.recent.shape), self.recent.to(self.dtype))[:, :, :extent]

    def check(self) -> None:
        if not ((self.group_of >= 0) & (self.group_of <= self.scale.size(2))).all():
            raise ValueError("the groups of a storage's slots are out of range")
        if not ((self.recent_slot >= 0) & (self.recent_slot < self.group_of.size(2))).all():
            raise ValueError("the slots of a storage's recent tokens are out of range")
        if not ((self.open >= 0) & (self.open < self.group)).all():
            raise ValueError("a storage's recent tokens are more than a group")

    def _apply(self, fn: Any, recurse: bool = True) -> Kivi:
        super()._apply(fn, recurse)
        self.recent = self.recent.to(self.dtype)
        return self
