"""What each strategy's definition says a token is worth, by loops over tokens; shares no code with the package.

A `Moment` of one layer and key/value head: the tokens it holds, the queries so far, and where rotations place them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Scores = dict[int, float]


def naive_scores(oracle: Any, layer: int, g: int, now: int, prompt: bool) -> Scores:
    """The worth of each token that head g of a layer keeps, by position.

    Args:
        oracle: An `Oracle`. now: Position of the newest token.
        prompt: Whether the tokens are those of a prompt, of which none was evicted yet.
    """
    policy = oracle.policies[layer]
    return NAIVE[policy.name](View(oracle, layer, g, sorted(oracle.kept[layer][g]), now, prompt, dict(policy.options)))


@dataclass
class View:
    oracle: Any
    layer: int
    g: int
    held: list[int]
    now: int
    prompt: bool
    options: dict
    known: dict = field(default_factory=dict)  # what was worked out before

    def option(self, name: str, default: Any) -> Any:
        return self.options.get(name, default)

    @property
    def cache_positions(self) -> bool:
        return self.oracle.policies[self.layer].positions == "cache" and not self.prompt

    @property
    def heads(self) -> range:
        size = self.oracle.config.n_head // len(self.oracle.kept[self.layer])
        return range(self.g * size, (self.g + 1) * size)

    def statistic(self, p: int, of: Callable[[View, int], float]) -> float:
        """What the cache keeps of a token: its own head's value, or where the heads choose together their mean."""
        if self.oracle.policies[self.layer].select != "layer":
            return of(self, p)
        every = [replace(self, g=g, known={}) for g in range(len(self.oracle.kept[self.layer]))]
        return fmean(of(view, p) for view in every)

    def place(self, p: int) -> int:
        """Where rotation sees a token that is held."""
        return self.held.index(p) if self.cache_positions else p

    def query_place(self, p: int) -> int:
        newest = len(self.held) - 1 if self.cache_positions else self.now
        return newest - (self.now - p)

    def last_queries(self, window: int) -> list[int]:
        return list(range(max(0, self.now - window + 1), self.now + 1))

    def sees(self, query: int, p: int) -> bool:
        window = self.oracle.window(self.layer) if self.prompt else self.oracle.horizon(self.layer)
        return p <= query and (window is None or p > query - window)

    def key(self, p: int) -> Tensor:
        """A key as it is attended to; of latent attention what all heads share: the rotary part and the latent."""
        if ("key", p) not in self.known:
            key = self.rotary_key(p)
            self.known["key", p] = torch.cat((key, self.value(p))) if self.oracle.config.latent_attention else key
        return self.known["key", p]

    def rotary_key(self, p: int) -> Tensor:
        if ("rotary", p) not in self.known:
            key = self.oracle.keys[self.layer][p, self.g]
            self.known["rotary", p] = self.oracle.rotate(key, self.place(p), self.layer)
        return self.known["rotary", p]

    def query(self, h: int, query: int) -> Tensor:
        """A query at its place; of latent attention its rotary part alone."""
        if (h, query) not in self.known:
            q, config = self.oracle.queries[self.layer][query, h], self.oracle.config
            part = q[config.qk_nope_head_dim :] if config.latent_attention else q
            self.known[h, query] = self.oracle.rotate(part, self.query_place(query), self.layer)
        return self.known[h, query]

    def value(self, p: int) -> Tensor:
        return self.oracle.values[self.layer][p, self.g]

    def scale(self) -> float:
        config, attn = self.oracle.config, self.oracle.model.transformer.h[self.layer].attn
        size = config.qk_head_dim if config.latent_attention else config.head_size
        return attn.mscale**2 / math.sqrt(config.attention_scores_scalar or size)

    def capped(self, score: float) -> float:
        cap = self.oracle.config.attention_logit_softcapping
        return score if cap is None else math.tanh(score / cap) * cap

    def product(self, h: int, query: int, p: int) -> float:
        """The score of token p for the query of head h at position `query`."""
        config, dot = self.oracle.config, self.rotary_key(p) @ self.query(h, query)
        if config.latent_attention:
            attn, N = self.oracle.model.transformer.h[self.layer].attn, config.qk_nope_head_dim
            up = attn.kv_b_proj(self.value(p)).reshape(config.n_head, -1)[h]
            dot = dot + up[:N] @ self.oracle.queries[self.layer][query, h][:N]
        return self.capped(float(dot) * self.scale())

    def attention(self, h: int, query: int) -> Scores:
        """The attention that a query pays to the tokens that are held."""
        seen = [p for p in self.held if self.sees(query, p)]
        return softmax({p: self.product(h, query, p) for p in seen})

    def mean_attention(self, query: int) -> Scores:
        """The same averaged over the query heads of the group; 0 for what is not seen."""
        rows = [self.attention(h, query) for h in self.heads]
        return {p: fmean(row.get(p, 0.0) for row in rows) for p in self.held}


def softmax(scores: Scores) -> Scores:
    if not scores:
        return {}
    top = max(scores.values())
    total = sum(math.exp(s - top) for s in scores.values())
    return {p: math.exp(s - top) / total for p, s in scores.items()}


def kvzip(view: View) -> Scores:
    """The largest attention of the tokens read again after the prompt; later ones are worth more than any."""
    oracle, first = view.oracle, view.oracle.first
    compressed = first > oracle.policies[view.layer].budget

    def worth(own: View, p: int) -> float:
        if not compressed or p >= first:
            return 1.0 + p * 2.0**-23
        return reread(own)[p]

    return {p: view.statistic(p, worth) for p in view.held}


def reread(view: View) -> Scores:
    oracle, first, size = view.oracle, view.oracle.first, view.option("chunk", 2048)
    prompt, best = oracle.tokens[:first], dict.fromkeys(range(first), 0.0)
    memory = oracle.__dict__.setdefault("reread", {})  # by start the second reading, by layer and head what came out
    if (view.layer, view.g) in memory:
        return memory[view.layer, view.g]
    for start in range(0, first, size):
        part = prompt[start : start + size]
        if start not in memory:
            memory[start] = type(oracle)(oracle.model, type(oracle.policies[0])())
            memory[start].feed(prompt + part)
        again, held = memory[start], list(range(first + len(part)))
        whole = replace(view, oracle=again, held=held, now=held[-1], prompt=True, known={})
        for query in range(first, first + len(part)):
            for h in view.heads:
                for p, share in whole.attention(h, query).items():
                    if p < first:
                        best[p] = max(best[p], share)
    memory[view.layer, view.g] = best
    return best


def h2o(view: View) -> Scores:
    scores = {p: view.statistic(p, lambda v, p: v.oracle.mass[v.layer][v.g][p]) for p in view.held}
    for p in view.held:
        if view.option("normalize", False):
            scores[p] /= view.now - p + 1
        if view.option("value_weighted", False):
            scores[p] *= view.statistic(p, lambda v, p: sum(abs(x) for x in v.value(p).tolist()))
    return scores


def tova(view: View) -> Scores:
    return {p: view.oracle.last[view.layer][view.g][p] for p in view.held}


def murmur(x: int) -> int:
    """MurmurHash3's finalizer of 32 bits, as its author published it."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def random(view: View) -> Scores:
    layer = murmur((view.option("seed", 0) + 0x9E3779B9) % 2**32) + view.layer
    head = murmur(layer % 2**32) + view.g
    return {p: (murmur((murmur(head % 2**32) + p) % 2**32) >> 8) / 2**24 for p in view.held}


def knorm(view: View) -> Scores:
    scores = {}
    for p in view.held:
        mantissa, exponent = math.frexp(math.sqrt(sum(x * x for x in view.key(p).tolist())))
        scores[p] = -round(mantissa * 2**16) * 2.0 ** (exponent - 16)
    return scores


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def keydiff(view: View) -> Scores:
    keys = {p: view.key(p) for p in view.held}
    anchor = sum(key / math.sqrt(float(key @ key)) for key in keys.values()) / len(keys)
    return {p: -cosine(key, anchor) for p, key in keys.items()}


def lagkv(view: View) -> Scores:
    lag, held, sinks = view.option("lag", 128), view.held, 4
    rest = held[sinks:]
    if len(rest) < 2 * lag:
        return {p: (i - sinks) / max(1, len(held) - sinks) for i, p in enumerate(held)}
    chunks = [rest[i : i + lag] for i in range(0, len(rest) // lag * lag, lag)]
    scores = dict.fromkeys(held, 1.0)
    for chunk, following in itertools.pairwise(chunks):
        total = dict.fromkeys(chunk, 0.0)
        for vectors in ({p: f(p).tolist() for p in held} for f in (view.key, view.value)):
            deviation = {}
            for p in chunk:
                scaled = []
                for c, x in enumerate(vectors[p]):
                    low, high = (f(vectors[n][c] for n in following) for f in (min, max))
                    scaled.append((x - low) / (high - low))
                mean = fmean(scaled)
                deviation[p] = math.sqrt(sum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1))
            for p, share in softmax(deviation).items():
                total[p] += share
        for rank, p in enumerate(sorted(chunk, key=lambda p: total[p])):
            scores[p] = rank / lag
    return scores


def pooled(scores: Scores, held: list[int], kernel: int, join: Callable[[list[float]], float]) -> Scores:
    out = {}
    for i, p in enumerate(held):
        near = [held[j] for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < len(held)]
        out[p] = join([scores[n] for n in near])
    return out


def snapkv(view: View) -> Scores:
    window, kernel = view.option("window", 64), view.option("kernel", 5)
    rows = [view.mean_attention(query) for query in view.last_queries(window)]
    scores = {p: sum(row[p] for row in rows) / len(rows) for p in view.held}
    old = [p for p in view.held if p <= view.now - window]
    return pooled(scores, view.held, kernel, lambda x: sum(x) / kernel) | pooled(
        scores, old, kernel, lambda x: sum(x) / kernel
    )


def finch(view: View) -> Scores:
    queries, scores = view.last_queries(view.option("window", 64)), dict.fromkeys(view.held, 0.0)
    for query in queries:
        weight = sum(view.sees(query, p) for p in view.held) - 1
        for p, share in view.mean_attention(query).items():
            scores[p] += share * max(0, weight) / len(queries)
    return scores


def rkv(view: View) -> Scores:
    window, share, similar = view.option("window", 8), view.option("importance", 0.07), view.option("similar", 0.5)
    old, queries = [p for p in view.held if p <= view.now - window], view.last_queries(window)
    importance = dict.fromkeys(old, 0.0)
    for query in queries:
        best = {p: max(view.product(h, query, p) for h in view.heads) for p in old if view.sees(query, p)}
        for p, part in softmax(best).items():
            importance[p] += part / len(queries)
    importance = pooled(importance, old, 7, max)
    column = dict.fromkeys(view.held, 0.0)
    unit = {p: (view.key(p) / view.key(p).norm()).tolist() for p in view.held}
    for row in view.held:
        cosines = {p: sum(a * b for a, b in zip(unit[row], unit[p])) * (p != row) for p in view.held}
        if alike := [p for p in view.held if cosines[p] > similar]:
            cosines[alike[-1]] = 0.0
        for p, c in cosines.items():
            column[p] += c / len(view.held)
    redundancy = softmax(column)
    return {p: share * importance[p] - (1 - share) * redundancy[p] if p in importance else 0.0 for p in view.held}


def expected_attention(view: View) -> Scores:
    oracle, layer = view.oracle, view.layer
    queries = [i for i in view.last_queries(view.option("window", 128)) if i >= 4]
    keys, scale, total = {p: view.key(p) for p in view.held}, view.scale(), dict.fromkeys(view.held, 0.0)
    D, future, newest = len(view.key(view.held[0])), view.option("future", 512), view.query_place(view.now)
    mean_rotation = torch.zeros(D, D, dtype=torch.float64)
    for t in range(1, future + 1):
        columns = [oracle.rotate(e, newest + t, layer) for e in torch.eye(D, dtype=torch.float64)]
        mean_rotation += torch.stack(columns, dim=1) / future
    for h in view.heads:
        mean, covariance = torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
        for i in queries:
            mean += oracle.queries[layer][i, h] / len(queries)
        for i in queries:
            rest = oracle.queries[layer][i, h] - mean
            covariance += rest[:, None] * rest / len(queries)
        mean, covariance = mean_rotation @ mean, mean_rotation @ covariance @ mean_rotation.mT
        z = {p: float(k @ mean * scale + k @ covariance @ k * scale**2 / 2) for p, k in keys.items() if p >= 4}
        for p, share in softmax({p: view.capped(x) for p, x in z.items()}).items():
            total[p] += share / len(view.heads)
    return {p: (x + view.option("epsilon", 0.0)) * float(view.value(p).norm()) for p, x in total.items()}


def triattention(view: View) -> Scores:
    oracle, layer, found = view.oracle, view.layer, load_file(view.options["calibration"])
    means, sizes = found[f"layers.{layer}.mean"].double(), found[f"layers.{layer}.length"].double()
    pairs, farthest = oracle.config.rope_n_elem // 2, view.option("farthest", 65536)
    offsets = [2**i for i in range(32) if 2**i <= farthest]
    scores = {}
    for p in view.held:
        k, heads = oracle.keys[layer][p, view.g].tolist(), []
        for h in view.heads:
            centre, total = means[h].tolist(), 0.0
            for f in range(pairs):
                omega, s = (float(x[..., f] if x.dim() == 1 else x[f]) for x in (oracle.angle, oracle.amplitude))
                q, key = complex(centre[f], centre[f + pairs]), complex(k[f], k[f + pairs])
                phase = math.atan2((q * key.conjugate()).imag, (q * key.conjugate()).real)
                apart = view.query_place(view.now) - view.place(p)
                waves = fmean(math.cos(omega * (apart + delta) + phase) for delta in offsets)
                total += abs(q) * abs(key) * s * s * waves + (float(sizes[h, f]) - abs(q)) * abs(key) * s * s
            heads.append(total + sum(a * b for a, b in zip(centre[2 * pairs :], k[2 * pairs :])))
        scores[p] = fmean(heads)
    return scores


def duo(view: View) -> Scores:
    gates = load_file(view.options["calibration"])[f"layers.{view.layer}.gate"].tolist()
    rank = round(fmean(gates[h] for h in view.heads) * 2**20)
    return {p: rank + (p + 1) / 2**31 for p in view.held}


def criticalkv(view: View) -> Scores:
    policy, text = view.oracle.policies[view.layer], view.option("base_options", "")
    options = {x.split("=")[0]: int(x.split("=")[1]) for x in text.replace(" ", "").split(",") if x}
    base = NAIVE[view.option("base", "snapkv")](replace(view, options=options, known={}))
    low = min([0.0, *base.values()])
    safe = {p for p in view.held if policy.worth(p, view.now, 0.0, None) == math.inf}
    best_first = sorted(view.held, key=lambda p: (-math.inf if p in safe else -base[p], p))
    sure = best_first[: int(view.option("first", 0.5) * policy.budget)]
    return {p: 2.0**100 if p in sure else (base[p] - low + 1e-4) * view.statistic(p, output_norm) for p in view.held}


def output_norm(view: View, p: int) -> float:
    """The mean over the heads of a group of the L1 norm that a value has after their part of the projection."""
    weight, value = view.oracle.model.transformer.h[view.layer].attn.proj.weight, view.value(p)
    parts = [weight[:, h * len(value) : (h + 1) * len(value)] @ value for h in view.heads]
    return fmean(sum(abs(x) for x in part.tolist()) for part in parts)


NAIVE: dict[str, Callable[[View], Scores]] = {
    f.__name__: f
    for f in (
        h2o,
        tova,
        random,
        knorm,
        keydiff,
        lagkv,
        snapkv,
        finch,
        rkv,
        expected_attention,
        triattention,
        duo,
        criticalkv,
        kvzip,
    )
}
