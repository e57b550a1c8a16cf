"""A naive reference: no cache, no slots, full matrices, explicit positions; shares no code with caches.

Slow on purpose. Every layer keeps the unrotated keys and values of all tokens of one sequence. Each query rebuilds its
attention from them, over exactly the tokens that the policy kept for that layer and key/value head. Of the model it
uses weights, norms, MLPs and linear layers; of litgpt's rope the angle of position 1, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

import litgpt.model as base
from litgpt.config import Config
from litgpt_kv import GPT, KVCache, KVCacheArgs
from tests.oracle.reference_latent import latent_attention
from tests.oracle.reference_pool import deal_out, evict_pools
from tests.oracle.reference_scores import naive_scores
from tests.oracle.walks import kept_of, logits_of, scores_of, slots_of, walk

__all__ = ["kept_of", "logits_of", "scores_of", "slots_of", "walk"]  # for the tests, from here as well


class ExactNorm(nn.Module):
    """litgpt's RMSNorm with the same weight, computed in the dtype of its input instead of float32."""

    def __init__(self, norm: base.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = norm.weight, norm.eps, 1.0 if norm.add_unit_offset else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def theta(model: base.GPT) -> tuple[Tensor, Tensor]:
    """The angle of position 1 and the amplitude, in float64: (E,) each, or (E, bases) with several rope bases."""
    cos, sin = (t.double() for t in type(model).rope_cache(model))  # `lift` replaces the instance's own
    return torch.atan2(sin[1], cos[1]), cos[0]


def exact_tables(model: base.GPT, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """litgpt's rope tables in float64."""
    angle, amplitude = theta(model)
    pos = torch.arange(model.max_seq_length, dtype=torch.float64).view(-1, *[1] * angle.dim())
    return (pos * angle).cos() * amplitude, (pos * angle).sin() * amplitude


def lift(model: base.GPT) -> base.GPT:
    """Makes a litgpt or litgpt_kv GPT float64 throughout: norms, routers, rope tables, softcapped softmax."""
    model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, base.RMSNorm):
                setattr(module, name, ExactNorm(child))
            elif isinstance(child, base.GroupedTopkRouter):
                child.forward = _routed.__get__(child)
    model.rope_cache = lambda device=None: exact_tables(model)
    model.cos, model.sin = model.rope_cache()
    if model.config.attention_logit_softcapping is not None:
        for block in model.transformer.h:
            if not hasattr(block.attn, "spec"):  # ours does it right, and every pass of ours comes through there
                block.attn.scaled_dot_product_attention = _softcapped.__get__(block.attn)
    return model


def _softcapped(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """litgpt's softcapped attention of a whole sequence, without its float32 softmax."""
    T, scale = q.size(2), attn.mscale**2 / math.sqrt(attn.config.attention_scores_scalar or q.size(-1))
    cap = attn.config.attention_logit_softcapping
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1) if mask is None else mask
    return ((torch.tanh(q @ k.mT * scale / cap) * cap + mask).softmax(-1) @ v).transpose(1, 2)


def _routed(router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """litgpt's grouped router without its float32."""
    scores = (x @ router.weight.T).sigmoid()
    index = router.get_topk_indices(scores)
    weights = scores.gather(1, index)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) if router.config.norm_topk_prob else weights, index


def tiny(seed: int = 0, cls: type = GPT, exact: bool = True, **kwargs) -> base.GPT:
    """A tiny model in eval mode with random weights; attention is sharp enough for heads to disagree."""
    options = dict(n_layer=2, n_head=4, n_query_groups=2, n_embd=24, head_size=6, padded_vocab_size=61, vocab_size=61)
    options |= dict(block_size=96, intermediate_size=20, mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm")
    options |= dict(rotary_percentage=1.0, parallel_residual=False, bias=False, norm_eps=1e-5, name="tiny")
    config = Config(**(options | kwargs))
    torch.manual_seed(seed)
    model = cls(config).eval().requires_grad_(False)
    for block in model.transformer.h:
        if config.latent_attention:
            block.attn.q_b_proj.weight.mul_(4)
            block.attn.kv_b_proj.weight.mul_(4)
        else:
            block.attn.qkv.weight.mul_(2.5)
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            weight.add_(0.2 * torch.randn_like(weight))
        if name.endswith("gate.weight"):  # litgpt leaves a grouped router's uninitialised
            weight.normal_()
    return lift(model) if exact else model


@dataclass(frozen=True)
class Policy:
    """What a layer keeps. `order` "before": evict, append, attend; "after": append, attend, evict (official codes)."""

    name: str = "dense"
    budget: int = 10**9
    sinks: int = 0
    recent: int = 0
    positions: str = "absolute"
    order: str = "before"
    prefill_scores: bool = True
    interval: int = 1
    keep_prompt: bool = False
    select: str = "head"
    floor: float = 0.2
    pools: int = 1
    prompt: int = 0  # tokens of the prompt, for `keep_prompt`
    options: dict = field(default_factory=dict)

    @property
    def scored(self) -> bool:
        """Whether tokens are worth something else than their position."""
        return self.name not in ("dense", "window", "sink")

    def worth(self, pos: int, now: int, score: float, window: int | None) -> float:
        if window is not None and pos <= now - window:
            return -math.inf
        if pos < self.sinks or pos > now - self.recent or (self.keep_prompt and pos < self.prompt):
            return math.inf
        return score if self.scored else float(pos)

    def leaving(self, kept: int, new: int) -> int:
        """How many of `kept` tokens make room for `new` ones: none, or at least `interval`."""
        over = kept + new - self.budget
        return max(over, self.interval) if over > 0 else 0

    def drop(self, kept: list[int], count: int, now: int, scores: dict[int, float], window: int | None) -> list[int]:
        """`kept` without its `count` least worthy; among equals the latest goes."""
        worst_first = sorted(kept, key=lambda p: (self.worth(p, now, scores.get(p, 0.0), window), -p))
        return sorted(worst_first[max(0, count) :])


@dataclass
class Moment:
    """After one token: its logits (V,) and, by layer and key/value head, kept positions and accumulated attention."""

    logits: Tensor
    kept: list[list[list[int]]] | None = None
    scores: list[list[dict[int, float]]] | None = None


@dataclass
class Oracle:
    """One sequence through a float64 model, token by token or in passes."""

    model: base.GPT
    policies: list[Policy]
    keys: list[Tensor] = field(default_factory=list)  # by layer: (n, G, D), unrotated
    values: list[Tensor] = field(default_factory=list)
    kept: list[list[list[int]]] = field(default_factory=list)
    mass: list[list[dict[int, float]]] = field(default_factory=list)  # attention received from all queries so far
    last: list[list[dict[int, float]]] = field(default_factory=list)  # and from the newest one
    queries: list[Tensor] = field(default_factory=list)  # by layer: (n, H, D), unrotated
    tokens: list[int] = field(default_factory=list)
    first: int = 0  # tokens of the first pass
    dealt: dict[int, int] = field(default_factory=dict)  # with select "model" the slots of a layer, after a long prompt
    seen: int = 0

    def __post_init__(self) -> None:
        config = self.model.config
        self.config = config
        if isinstance(self.policies, Policy):
            self.policies = [self.policies] * config.n_layer
        L, G, widths = config.n_layer, config.n_query_groups, (config.head_size, config.head_size)
        if config.latent_attention:  # one rotary part and one latent a token
            G, widths = 1, (config.qk_rope_head_dim, config.kv_lora_rank)
        self.kept = [[[] for _ in range(G)] for _ in range(L)]
        self.mass, self.last = ([[{} for _ in range(G)] for _ in range(L)] for _ in range(2))
        self.keys, self.values = ([torch.zeros(0, G, w, dtype=torch.float64) for _ in range(L)] for w in widths)
        self.queries = [torch.zeros(0, dtype=torch.float64) for _ in range(L)]
        self.angle, self.amplitude = theta(self.model)

    def window(self, layer: int) -> int | None:
        config = self.config
        if config.sliding_window_size is None or config.latent_attention:  # litgpt's latent attention knows no window
            return None
        sliding = config.sliding_window_indices[layer]
        return config.sliding_window_size if sliding else None

    def horizon(self, layer: int) -> int | None:
        """The window as eviction and later queries know it: inside a cache smaller than it all tokens are near."""
        policy, window = self.policies[layer], self.window(layer)
        near = window is not None and policy.positions == "cache" and policy.budget < window
        return None if near else window

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> list[Moment]:
        """One pass of the model over new tokens."""
        config, start, m = self.config, self.seen, len(tokens)
        self.tokens += tokens
        self.first = self.first or m
        x = self.model.transformer.wte(torch.tensor(tokens))  # (m, C)
        if config.scale_embeddings:
            x = x * config.n_embd**0.5
        for layer, block in enumerate(self.model.transformer.h):
            normed = block.norm_1(x)
            attended = block.post_attention_norm(self.attention(layer, normed, start))
            if config.parallel_residual:
                x = x + attended + block.mlp((normed if config.shared_attention_norm else block.norm_2(x))[None])[0]
            else:
                x = x + attended
                x = x + block.post_mlp_norm(block.mlp(block.norm_2(x)[None])[0])
        self.seen += m
        if start == 0:
            deal_out(self, m - 1)
        logits = self.model.lm_head(self.model.transformer.ln_f(x))
        if config.final_logit_softcapping is not None:
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        moments = [Moment(row) for row in logits]
        moments[-1].kept = [[list(k) for k in heads] for heads in self.kept]
        moments[-1].scores = [self.scores(layer, self.seen - 1) for layer in range(config.n_layer)]
        return moments

    def scores(self, layer: int, now: int, prompt: bool = False) -> list[dict[int, float]]:
        """What each head's kept tokens are worth by the strategy alone; `prompt`: before any was evicted."""
        policy, kept = self.policies[layer], self.kept[layer]
        if not policy.scored:
            return [{p: float(p) for p in head} for head in kept]
        found = [naive_scores(self, layer, g, now, prompt) for g in range(len(kept))]
        if policy.select == "layer" and policy.name == "random":
            found = [found[0]] * len(kept)  # one draw for all
        elif policy.select == "layer":
            mean = {p: sum(s[p] for s in found) / len(found) for p in kept[0]}
            found = [mean] * len(kept)
        return found

    def make_room(self, layer: int, start: int, m: int) -> None:
        """Evict what m new tokens need, by scores that know nothing of them; a block makes room for all of itself."""
        policy, kept = self.policies[layer], self.kept[layer]
        if start == 0 or not policy.scored or policy.order == "after":
            return
        if policy.select in ("pool", "model"):
            return evict_pools(self, layer, start, 1)
        if max(policy.leaving(len(head), m) for head in kept):
            scores, last, window = self.scores(layer, start - 1), start + m - 1, self.horizon(layer)
            for g, head in enumerate(kept):
                kept[g] = policy.drop(head, policy.leaving(len(head), m), last, scores[g], window)

    def compress(self, layer: int, start: int, m: int) -> None:
        """Evict what a long prompt or the order "after" left over."""
        policy, kept = self.policies[layer], self.kept[layer]
        if policy.select in ("pool", "model") and policy.scored:  # of all layers: `deal_out`
            return evict_pools(self, layer, m - 1, 0) if start == 0 and policy.select == "pool" else None
        over = max(len(head) for head in kept) - policy.budget
        if over > 0:
            now = start + m - 1
            scores = self.scores(layer, now, start == 0)
            for g, head in enumerate(kept):
                kept[g] = policy.drop(head, over, now, scores[g], self.horizon(layer))

    def attention(self, layer: int, x: Tensor, start: int) -> Tensor:
        if self.config.latent_attention:
            return latent_attention(self, layer, x, start)
        config, attn, policy = self.config, self.model.transformer.h[layer].attn, self.policies[layer]
        H, G, D = config.n_head, config.n_query_groups, config.head_size
        qkv = attn.qkv(x)
        q, k, v = qkv[:, : H * D], qkv[:, H * D : (H + G) * D], qkv[:, (H + G) * D :]
        if config.norm_qk and config.norm_qk_type == "olmo2":
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = q.reshape(-1, H, D), k.reshape(-1, G, D), v.reshape(-1, G, D)
        if config.norm_qk and config.norm_qk_type == "default":
            q, k = attn.norm_q(q), attn.norm_k(k)
        self.keys[layer] = torch.cat((self.keys[layer], k))
        self.values[layer] = torch.cat((self.values[layer], v))
        self.queries[layer] = torch.cat((self.queries[layer].reshape(-1, H, D), q))
        scale = attn.mscale**2 / math.sqrt(config.attention_scores_scalar or D)
        m, out = len(x), torch.zeros(len(x), H, D, dtype=torch.float64)
        self.make_room(layer, start, m)
        for g in range(G):
            plans = self.visible(layer, g, start, m)
            gained: dict[int, float] = {}
            for i, (seen, positions) in enumerate(plans):
                newest = dict.fromkeys(seen, 0.0)
                keys = self.rotate(self.keys[layer][seen, g], positions, layer)
                for h in range(g * H // G, (g + 1) * H // G):
                    query = self.rotate(q[i, h], positions[-1], layer)
                    score = keys @ query * scale
                    if (cap := config.attention_logit_softcapping) is not None:
                        score = torch.tanh(score / cap) * cap
                    probs = torch.exp(score - score.max())
                    probs = probs / probs.sum()
                    out[i, h] = probs @ self.values[layer][seen, g]
                    for p, prob in zip(seen, probs.tolist()):
                        gained[p] = gained.get(p, 0.0) + prob / (H // G)
                        newest[p] += prob / (H // G)
            self.note(layer, g, gained if policy.prefill_scores or start else {}, newest)
        self.compress(layer, start, m)
        return attn.proj(out.reshape(m, H * D))

    def visible(self, layer: int, g: int, start: int, m: int) -> list[tuple[list[int], list[int]]]:
        """For each new query the tokens it attends to (itself last) and the rotary positions of those tokens."""
        policy, kept = self.policies[layer], self.kept[layer][g]
        window = self.horizon(layer) if start else self.window(layer)
        plans = []
        if start == 0:
            sets = [list(range(i + 1)) for i in range(m)]
        elif policy.scored and policy.order == "before":  # `make_room` did
            sets = [kept + list(range(start, start + i + 1)) for i in range(m)]
        else:
            sets = []
            for now in range(start, start + m):
                if policy.order == "before":
                    kept = policy.drop(kept, policy.leaving(len(kept), 1), now, {}, window)
                kept = [*kept, now]
                sets.append(kept)
        for seen in sets:
            at = list(range(len(seen))) if policy.positions == "cache" else seen
            inside = [(p, a) for p, a in zip(seen, at) if window is None or p > seen[-1] - window]
            plans.append(([p for p, _ in inside], [a for _, a in inside]))
        self.kept[layer][g] = sets[-1]
        return plans

    def note(self, layer: int, g: int, gained: dict[int, float], newest: dict[int, float]) -> None:
        """Adds up attention received, and remembers that from the newest query."""
        mass = self.mass[layer][g]
        for p, gain in gained.items():
            mass[p] = mass.get(p, 0.0) + gain
        self.mass[layer][g] = {p: mass.get(p, 0.0) for p in self.kept[layer][g]}
        self.last[layer][g] = {p: newest.get(p, 0.0) for p in self.kept[layer][g]}

    def arranged(self, x: Tensor) -> Tensor:
        """x (..., D) in litgpt's half-split layout: interleaved pairs are moved there."""
        E = self.config.rope_n_elem
        return torch.cat((x[..., 0:E:2], x[..., 1:E:2], x[..., E:]), -1) if self.config.rope_interleave else x

    def rotate(self, x: Tensor, pos: int | list[int], layer: int) -> Tensor:
        """x (..., D) at positions (...), litgpt's layout: pairs (i, i + E/2)."""
        config, E = self.config, self.config.rope_n_elem
        angle, amplitude = self.angle, self.amplitude
        if config.rope_indices is not None:
            angle, amplitude = angle[:, config.rope_indices[layer]], amplitude[:, config.rope_indices[layer]]
        at = torch.tensor(pos, dtype=torch.float64).unsqueeze(-1)
        head, tail = self.arranged(x).split([E, x.size(-1) - E], -1)
        low, high = head[..., : E // 2], head[..., E // 2 :]
        if E % 2 == 0:
            turned = at * angle[: E // 2]
            z = torch.complex(low, high) * torch.polar(amplitude[: E // 2].expand_as(turned), turned)
            return torch.cat((z.real, z.imag, tail), -1)
        swapped = torch.cat((-high, low), -1)  # litgpt's odd sizes, which are no rotation
        turned = head * (at * angle).cos() * amplitude + swapped * (at * angle).sin() * amplitude
        return torch.cat((turned, tail), -1)


def passes(prompt: int, total: int, way: str, budget: int) -> list[int]:
    """Lengths of the passes: the "full" prompt, or "streamed": min(prompt, budget); then single tokens."""
    first = prompt if way == "full" else min(prompt, budget)
    return [first] + [1] * (total - first)


def oracle(model: base.GPT, policy: Policy | list[Policy], tokens: list[int], lengths: list[int]) -> list[Moment]:
    """The moments after each token, fed in passes of these lengths (kept and scores only at the end of a pass)."""
    reference, moments = Oracle(model, policy), []
    for n in lengths:
        moments += reference.feed(tokens[len(moments) : len(moments) + n])
    return moments


# -- driving the library: prompts of rows, then their own next tokens, and what its cache holds -----------------------


def tokens_of(seed: int, count: int, vocabulary: int = 61) -> list[int]:
    """Random token ids."""
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def arguments(policy: Policy, **others) -> KVCacheArgs:
    """The library's arguments for a policy of this file."""
    budget = None if policy.budget > 10**8 else policy.budget
    given = dict(strategy=policy.name, budget=budget, sinks=policy.sinks, recent=policy.recent)
    given |= dict(interval=policy.interval, keep_prompt=policy.keep_prompt, select=policy.select)
    given |= dict(floor=policy.floor, pools=policy.pools, options=policy.options)
    return KVCacheArgs(**given, positions=policy.positions, **others)


def check_stored(cache: KVCache, reference: Oracle, b: int, tol: float = 1e-8) -> None:
    """Keys and values in a row's slots are those of the tokens they claim to be, and empty slots hold zeros."""
    for layer, contents in enumerate(cache.inspect(b)):
        for g, head in enumerate(contents.heads):
            for p, stored_key, stored_value in zip(head.positions.tolist(), head.keys, head.values):
                key = reference.keys[layer][p, g]
                key = reference.arranged(key) if contents.unrotated else reference.rotate(key, p, layer)
                torch.testing.assert_close(stored_key, key, rtol=0, atol=tol)
                torch.testing.assert_close(stored_value, reference.values[layer][p, g], rtol=0, atol=tol)
        if cache.plans[layer].interval > 1 or cache.plans[layer].pools:
            continue  # what left together stays in its slots, unseen, until other tokens take them
        pos, stored = slots_of(cache, layer, b)[0], cache.layers[layer]
        keys, values = stored.keys.read(pos.size(-1))[b], stored.values.read(pos.size(-1))[b]
        assert not keys[pos < 0].any() and not values[pos < 0].any(), "an empty slot is not zero"


def compare(
    model: GPT, policy: Policy | list[Policy], rows: list[list[int]], prompts: list[int], way: str, tol: float = 1e-8
) -> None:
    """The library's logits, kept tokens, scores, stored keys and values equal the reference's at every step."""
    policies = policy if isinstance(policy, list) else [policy] * model.config.n_layer
    given = [arguments(p) for p in policies]
    names = ("strategy", "budget", "sinks", "recent")
    args = replace(given[0], **{n: [getattr(g, n) for g in given] for n in names})
    cache = KVCache.build(model, args, batch_size=len(rows))
    chunk = min(p.budget if way == "streamed" else prompts[0] for p in policies)
    blank = Oracle(model, policies)
    for i, p in enumerate(policies):  # a layer with a sliding window keeps no more than the window, and no sinks
        if (window := blank.window(i)) is not None:
            p = replace(p, sinks=0) if p.positions == "absolute" else p
            p = Policy("window", window, positions=p.positions) if p.budget >= window else p
            policies = [*policies[:i], p, *policies[i + 1 :]]
    references = [Oracle(model, [replace(p, prompt=n) for p in policies]) for n in prompts]
    for at, logits in walk(model, cache, rows, prompts, way):
        for b, i in enumerate(at):
            if i is None:
                continue
            reference = references[b]
            if way != "streamed" and reference.seen == 0:
                moment = reference.feed(rows[b][: prompts[b]])[-1]
            else:  # its own passes: the library's first chunk may have been cut short by a partner
                while reference.seen <= i:
                    rest = i + 1 - reference.seen
                    size = rest if reference.seen == 0 and rest <= chunk else 1
                    moment = reference.feed(rows[b][reference.seen : reference.seen + size])[-1]
            where, held = partial("row {}, token {}, {}, {}".format, b, i, policies, way), cache.inspect(b)
            torch.testing.assert_close(
                logits[b], moment.logits, rtol=0, atol=tol, msg=lambda m, where=where: f"{where()}\n{m}"
            )
            assert [[head.positions.tolist() for head in layer.heads] for layer in held] == moment.kept, where()
            for layer, p in enumerate(policies):
                if p.scored:
                    for head, kept, scores in zip(held[layer].heads, moment.kept[layer], moment.scores[layer]):
                        expected = torch.tensor([scores[p] for p in kept], dtype=torch.float64)
                        assert len(head.scores) == len(kept), where()
                        assert not kept or (head.scores - expected).abs().max() <= tol, where()
    for b, reference in enumerate(references):
        if cache.live[b]:
            check_stored(cache, reference, b, tol)
