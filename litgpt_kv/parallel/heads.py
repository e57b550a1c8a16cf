"""Divide the heads among devices, and combine per-head statistics over devices.

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
    """The heads of one device: query heads `queries` of `all_queries`, key/value heads `groups` of `all_groups`.

    A device has whole groups, or some query heads of one group and a copy of its key/value head. In latent attention
    all heads are one group, because they share one cached latent and one rotary key.
    """

    queries: range
    groups: range
    all_queries: int
    all_groups: int

    @property
    def weight(self) -> float:
        """The share of its groups' query heads that this device has; over all devices, the sum is 1 for each group."""
        return len(self.queries) * self.all_groups / (len(self.groups) * self.all_queries)


def split_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """Return start and end of part `index` if `total` things are divided into `parts`; sizes differ by at most one."""
    return total * index // parts, total * (index + 1) // parts


def divide_heads(config: Config, devices: int) -> list[Heads]:
    """Divide the heads of a model among devices.

    With at most as many devices as groups, each device has whole groups; if they do not divide evenly, the last devices
    have one more. With more devices, each has one key/value head, which other devices have as well, and some of its
    query heads.

    Raises:
        ValueError: If the model cannot be divided over so many devices; the message has the limit.
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
    """Combine the statistics of a layer's heads over devices; see `litgpt_kv.cache.slots.Sharing`.

    Devices with whole groups only communicate if a strategy makes one choice for all heads of a layer.
    """

    def __init__(self, collectives: Collectives, heads: Heads) -> None:
        self.collectives, self.heads = collectives, heads
        self.split = collectives.size > heads.all_groups

    @property
    def groups_and_devices(self) -> tuple[int, int]:
        """Key/value heads of the whole model, and devices."""
        return self.heads.all_groups, self.collectives.size

    def mass(self, mass: Tensor, per_head: bool) -> Tensor:
        """Combine the attention mass (..., G of this device, S): the same shape, or (..., 1, S) unless `per_head`."""
        if per_head:
            return self._of_groups(mass) if self.split else mass
        return self.collectives.all_reduce(mass.sum(dim=-2, keepdim=True) * (self.heads.weight / self.heads.all_groups))

    def score(self, score: Tensor, per_head: bool) -> Tensor:
        """Return the mean of scores (..., P, S) over all devices with query heads of the same set of tokens."""
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
        """Return the mean over the devices that share this device's only group, weighted by their query heads."""
        (group,) = self.heads.groups
        groups = x.new_zeros(*x.shape[:-2], self.heads.all_groups, x.size(-1))
        groups[..., group, :] = x[..., 0, :] * self.heads.weight
        return self.collectives.all_reduce(groups)[..., group, :].unsqueeze(-2)
