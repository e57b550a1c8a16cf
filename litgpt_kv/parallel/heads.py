"""Which heads a device holds, and what devices tell each other about them.

H query heads · G key/value heads · R = H/G query heads a group · P sets of kept tokens (1, or one a key/value head) ·
S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from litgpt.config import Config
from litgpt_kv.cache.spec import layer_spec
from litgpt_kv.parallel.collectives import Collectives


@dataclass(frozen=True)
class Heads:
    """A device's heads: `queries` and `groups` are ranges of numbers out of `all_queries` and `all_groups`.

    A device holds whole groups, or a part of one group's query heads and a copy of its key/value head. The heads of
    latent attention are one group, as what they have in common is cached once: the latent and the rotary key.
    """

    queries: range
    groups: range
    all_queries: int
    all_groups: int

    @property
    def weight(self) -> float:
        """Which part of its groups' query heads a device holds: those of all devices add up to 1 for each group."""
        return len(self.queries) * self.all_groups / (len(self.groups) * self.all_queries)


def split_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """Where part `index` of `total` things begins and ends; sizes differ by one at most."""
    return total * index // parts, total * (index + 1) // parts


def divide_heads(config: Config, devices: int) -> list[Heads]:
    """The heads of each device.

    Up to as many devices as groups, each holds whole groups, the last ones one more where they do not come out even.
    Beyond, each holds one key/value head, which other devices hold as well, and some of its query heads.

    Raises:
        ValueError: If the model cannot be divided over so many devices; the message says how many can.
    """
    H, G = config.n_head, layer_spec(config, 0).groups
    widths = [w for w in (config.intermediate_size, config.moe_intermediate_size) if w]
    most = min(H, *widths)
    if not 1 <= devices <= most:
        raise ValueError(f"{config.name!r} has {H} heads: 1 to {most} devices can share it, not {devices}.")
    per_group, shares = H // G, []
    for rank in range(devices):
        if devices <= G:
            first, end = split_range(G, devices, rank)
            queries = range(first * per_group, end * per_group)
        else:
            first = rank * G // devices
            end, holders = first + 1, [r for r in range(devices) if r * G // devices == first]
            a, b = split_range(per_group, len(holders), holders.index(rank))
            queries = range(first * per_group + a, first * per_group + b)
        shares.append(Heads(queries, range(first, end), H, G))
    return shares


class Sharing:
    """What a layer's slots ask for where other devices hold the other heads; see `litgpt_kv.cache.slots.Sharing`.

    Devices that hold whole groups say nothing to each other, unless a strategy makes one choice for all heads.
    """

    def __init__(self, collectives: Collectives, heads: Heads) -> None:
        self.collectives, self.heads = collectives, heads
        self.split = collectives.size > heads.all_groups

    def mass(self, mass: Tensor, per_head: bool) -> Tensor:
        """Mass (..., G here, S) of this device's query heads to that of all: (..., G here, S), or (..., 1, S)."""
        if per_head:
            return self._of_groups(mass) if self.split else mass
        return self.collectives.all_reduce(mass.sum(dim=-2, keepdim=True) * (self.heads.weight / self.heads.all_groups))

    def score(self, score: Tensor, per_head: bool) -> Tensor:
        """Scores (..., P, S) that this device worked out from its own heads: the mean over all devices with a say."""
        if per_head:
            return self._of_groups(score) if self.split else score
        return self.collectives.all_reduce(score * (len(self.heads.queries) / self.heads.all_queries))

    def largest(self, x: Tensor) -> Tensor:
        """The largest of what the devices that hold parts of a group worked out from their query heads, (B, G, ...)."""
        if not self.split:
            return x
        (group,) = self.heads.groups
        every = x.new_full((x.size(0), self.heads.all_groups, *x.shape[2:]), float("-inf"))
        every[:, group] = x[:, 0]
        return self.collectives.all_reduce(every, largest=True)[:, group].unsqueeze(1)

    def _of_groups(self, x: Tensor) -> Tensor:
        """The mean over the devices that hold parts of a group (one group a device), weighted by their query heads."""
        (group,) = self.heads.groups
        every = x.new_zeros(*x.shape[:-2], self.heads.all_groups, x.size(-1))
        every[..., group, :] = x[..., 0, :] * self.heads.weight
        return self.collectives.all_reduce(every)[..., group, :].unsqueeze(-2)
