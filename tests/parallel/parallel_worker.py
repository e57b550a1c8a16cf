"""What each process of a launch runs for test_parallel.py: small models, whole on process 0 and in parts on all.

Started once for each number of processes, as torchrun starts users' scripts; process 0 writes what it found as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from litgpt.config import Config
from litgpt_kv import GPT, KVCache, KVCacheArgs, SamplingArgs, Strategy, Tokens, register, registry
from litgpt_kv.generate import generate
from litgpt_kv.generate.request import Request
from litgpt_kv.parallel import tensor
from litgpt_kv.parallel.base import DeviceRequest, seed_requests
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.launch import launch
from litgpt_kv.parallel.tensor import load_tensor_parallel
from tests.oracle.reference import kept_of, lift, logits_of, tokens_of
from tests.oracle.shrink import DEEPSEEK, LLAMA, SYNTHETIC, fill, shrink
from tests.oracle.strategies import FEW, NAMES, THREE, options_of, plain
from tests.oracle.walks import storages_for

LENGTHS, PROMPTS, BUDGET = (14, 11, 10), [10, 4, 9], 6


@dataclass(frozen=True)
class OneChoice(Strategy):
    """Keep, for all heads alike, what the last query attends to."""

    statistics: ClassVar[tuple[str, ...]] = ("last",)
    select: ClassVar[str] = "layer"

    def score(self, tokens: Tokens) -> Tensor:
        return tokens["last"]


@dataclass(frozen=True)
class OneChoiceKeys(Strategy):
    """Keep, for all heads alike, tokens with long keys."""

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    select: ClassVar[str] = "layer"

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.keys.norm(dim=-1)


@dataclass(frozen=True)
class Queries(Strategy):
    """Keep, for each key/value head, tokens that the last queries score high: copies of a head see different ones."""

    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    window: ClassVar[int] = 3

    def score(self, tokens: Tokens) -> Tensor:
        queries, keys = tokens.queries[0], tokens.keys
        groups = queries.unflatten(1, (keys.size(1), -1)).mean(dim=(2, 3))  # (B, G, D)
        return (keys @ groups.unsqueeze(-1)).squeeze(-1)


OURS = {"one-choice": OneChoice, "one-choice-keys": OneChoiceKeys, "queries": Queries}  # registered when this runs
GRID = {
    "mha": shrink(LLAMA, n_query_groups=4),
    "gqa": shrink(LLAMA),
    "mqa": shrink(LLAMA, n_query_groups=1),
    "uneven": shrink(LLAMA, n_head=9, n_query_groups=3, head_size=6, n_embd=54),
}
LATENT = {
    "latent": shrink(LLAMA, **DEEPSEEK, bias=True, attn_bias=True),
    "latent-uneven": shrink(LLAMA, **DEEPSEEK | dict(n_head=5, n_query_groups=5), attention_logit_softcapping=2.0),
    "latent-experts": SYNTHETIC["latent-experts"],  # grouped routing and a dense layer first, as in DeepSeek-V3
}
SPREAD = (
    "pythia-14m",  # biases everywhere, parallel residual, a part of each head rotated
    "phi-2",  # one norm for both, a bias at the head
    "falcon-7b",  # one key/value head, parallel residual
    "Gemma-2b",  # embedding scaled by its width, head size of its own, norm of 1 + weight
    "Gemma-2-2b",  # softcaps, windows in every other layer, norms after
    "Gemma-3-1b-it",  # norms of queries and keys, two rope bases
    "Qwen2.5-0.5B",  # biases of the stacked projection alone
    "Qwen3-0.6B",  # norms a head
    "OLMo-2-1124-7B",  # norms over the whole projection
    "Mistral-7B-v0.1",  # a window in every layer
    "Phi-4-mini-instruct",
    "Mixtral-8x7B-v0.1",  # experts
    "Qwen3-30B-A3B",  # experts of a width of their own
    "yarn",
    "grouped-moe",  # routed groups of experts, a shared one, a dense layer first
    "head-bias",
)

SOME = ("phi-2", "Gemma-2-2b", "Mixtral-8x7B-v0.1")


def cases(devices: int) -> Iterator[tuple[str, Config, str, str, str, str]]:
    """(name, config, strategy, storage, positions, prefill way)."""
    few = devices > 2  # a machine of few cores takes its time to switch between processes
    strategies = sorted({*THREE, *OURS})
    for name, config in GRID.items():
        for strategy in sorted({*NAMES, *OURS}) if name == "gqa" else strategies:
            looks = strategy in ("h2o", *OURS)  # at what heads have, which may be elsewhere
            if not few or name == "gqa" or (name == "mqa" and looks):
                yield f"{name}/{strategy}/plain/full", config, strategy, "plain", "absolute", "full"
            if name == "gqa" and strategy in ("h2o", "one-choice") if few else name in ("mha", "mqa"):
                yield f"{name}/{strategy}/plain/streamed", config, strategy, "plain", "absolute", "streamed"
    for strategy in NAMES if not few else ():  # two pools of two devices
        if not plain(strategy).recency:
            way = "full" if strategy == "h2o" else "admitted"
            yield f"mha/{strategy}:pool/plain/{way}", GRID["mha"], f"{strategy}:pool", "plain", "absolute", way
    for strategy in THREE if not few else ():
        for storage in storages_for(strategy):
            if storage != "plain":
                yield f"gqa/{strategy}/{storage}/full", GRID["gqa"], strategy, storage, "absolute", "full"
    for strategy in ("sink", "h2o"):
        yield f"gqa/{strategy}/plain/streamed/cache", GRID["gqa"], strategy, "plain", "cache", "streamed"
    for name in SOME if few else SPREAD:
        yield f"{name}/h2o/plain/streamed", _config(name), "h2o", "plain", "absolute", "streamed"
    yield from latent_cases(few)
    olmo = _config("OLMo-2-1124-7B", n_query_groups=1 if devices == 2 else 2)
    yield "OLMo-2-copied-keys/h2o/plain/full", olmo, "h2o", "plain", "absolute", "full"


def latent_cases(few: bool) -> Iterator[tuple[str, Config, str, str, str, str]]:
    """Latent attention: heads are divided, and all devices hold the same latents and keep the same tokens."""
    strategies = sorted({*(n for n in FEW if plain(n).latent), *OURS})
    for name, config in LATENT.items():
        some = strategies if name == "latent" and not few else ("h2o", "one-choice", "queries")
        for strategy in some if name == "latent-uneven" or not few else ("h2o",):
            yield f"{name}/{strategy}/plain/full", config, strategy, "plain", "absolute", "full"
        for strategy in ("dense", "sink", "h2o") if name == "latent" and not few else ():
            yield f"{name}/{strategy}/plain/streamed", config, strategy, "plain", "absolute", "streamed"
            for way in ("full", "streamed") if strategy != "dense" else ():
                yield f"{name}/{strategy}/plain/{way}/cache", config, strategy, "plain", "cache", way
        for storage in storages_for("h2o") if name == "latent" and not few else ():
            if storage != "plain":
                yield f"{name}/h2o/{storage}/full", config, "h2o", storage, "absolute", "full"
        if name == "latent-experts":
            yield f"{name}/h2o/plain/streamed/cache", config, "h2o", "plain", "cache", "streamed"


def _config(name: str, **changes: Any) -> Config:
    if name in SYNTHETIC:
        return SYNTHETIC[name]
    return shrink(name, **changes)


class Whole:
    """Models of all devices' parts, and on process 0 the whole model beside it; made once for each config."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives, self.made = collectives, {}

    def __call__(self, config: Config, **options: Any) -> tuple[GPT, GPT]:
        key = (id(config), *options.items())
        if key not in self.made:
            torch.manual_seed(0)
            whole = fill(GPT(config)).double()
            part = load_tensor_parallel(config, self.collectives, whole.state_dict(), dtype=torch.float64, **options)
            self.made = {key: (config, lift(whole).eval(), lift(part))}
        return self.made[key][1:]


def build(model: GPT, config: Config, strategy: str, storage: str, positions: str) -> KVCache:
    strategy, _, select = strategy.partition(":")
    budget = BUDGET if registry.get("strategy", strategy).evicts else None
    own = options_of(strategy, config) if strategy in NAMES else {}
    choice = dict(select=select or None, pools=2 if select == "pool" else 1)
    if not select and strategy in NAMES and plain(strategy).select == "pool":  # one pool would cross devices
        choice["select"] = "head"
    args = KVCacheArgs(strategy, budget=budget, storage=storage, positions=positions, options=own, **choice)
    return KVCache.build(model, args, batch_size=len(LENGTHS), max_tokens=16)


def same_answers(collectives: Collectives, pair: Whole, case: tuple) -> dict[str, Any]:
    """Logits of every token, kept tokens, greedy and sampled tokens: the parts' against the whole model's."""
    _, config, strategy, storage, positions, way = case
    whole, part = pair(config)
    rows = [tokens_of(7 + i, n, config.vocab_size) for i, n in enumerate(LENGTHS)]
    cache = build(part, config, strategy, storage, positions)
    mine = logits_of(part, cache, rows, PROMPTS, way)
    found: dict[str, Any] = {}
    flat = torch.cat([x for row in mine for x in row.values()])
    digest = hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    found["alike"] = len(set(collectives.all_gather_object(digest))) == 1
    groups = part.sharing.heads.groups
    kept = collectives.all_gather_object((groups.start, [kept_of(cache, b) for b in range(len(rows))]))
    sampling = SamplingArgs(temperature=1.0, top_k=20, seed=5)
    runs = [dict(sampling=SamplingArgs(temperature=0.0)), dict(sampling=sampling)]
    options = dict(max_new_tokens=3, prefill="full" if way == "full" else "min-length")
    prompts = [row[:n] for row, n in zip(rows, PROMPTS)]
    made = []
    for run in runs if way == "full" else ():
        cache.reset()
        made.append([row.tolist() for row in generate(part, prompts, cache, **options, **run)])
    if collectives.rank == 0:
        alone = build(whole, config, strategy, storage, positions)
        expected = logits_of(whole, alone, rows, PROMPTS, way)
        found["steps"] = sum(map(len, expected))
        found["logits"] = max(float((a[i] - b[i]).abs().max()) for a, b in zip(mine, expected) for i in b)
        found["scale"] = max(float(x.abs().max()) for row in expected for x in row.values())
        theirs = [kept_of(alone, b) for b in range(len(rows))]
        found["kept"] = all(
            heads == theirs[b][layer][first : first + len(heads)]
            for first, held in kept
            for b, layers in enumerate(held)
            for layer, heads in enumerate(layers)
        )
        for name, run, tokens in zip(("greedy", "sampled"), runs, made):
            alone.reset()
            found[name] = tokens == [row.tolist() for row in generate(whole, prompts, alone, **options, **run)]
    return found


def passes(pair: Whole, config: Config, trace: bool) -> dict[str, float]:
    """The greatest difference from the whole model in passes of other kinds, the last one compiled if asked for."""
    idx = torch.tensor([tokens_of(3, 11, config.vocab_size), tokens_of(4, 11, config.vocab_size)])
    found = {}
    with torch.no_grad():
        whole, uncut = pair(config, split_head=False)
        found["uncut_head"] = float((uncut(idx) - whole(idx)).abs().max())
        whole, part = pair(config)
        found["training_pass"] = float((part(idx) - whole(idx)).abs().max())
        # a block of several new tokens, and the same under torch.compile's tracing, in one graph
        caches = [KVCache.build(m, KVCacheArgs("h2o", budget=8), 2, 24) for m in (whole, part, part)]
        lengths = torch.tensor([9, 7])
        first = [m(idx[:, :9], c, lengths) for m, c in zip((whole, part, part), caches)]
        traced = torch.compile(part, fullgraph=True, backend="eager", dynamic=False) if trace else part
        block = [m(idx[:, 9:11], c) for m, c in zip((whole, part, part), caches)]
        last = [m(idx[:, :1], c) for m, c in zip((whole, part, traced), caches)]
        for name, (a, *others) in dict(first=first, block=block, last=last).items():
            found[name] = max(float((a - b).abs().max()) for b in others)
    return found


def extras(collectives: Collectives, pair: Whole) -> dict[str, Any]:
    """What is asked once."""
    few = collectives.size > 2
    found = {"gqa": passes(pair, GRID["gqa"], trace=True), "latent": passes(pair, LATENT["latent"], trace=not few)}
    free = SamplingArgs(top_k=5)  # without a seed
    rows = [[Request([1], sampling=free, id=b) for b in range(3)] for _ in range(2)]
    drawn = [tuple(request.sampling.seed for request in seed_requests(collectives, some)) for some in rows]
    found["unseeded"] = dict(alike=len(set(collectives.all_gather_object(drawn[0]))) == 1, fresh=drawn[0] != drawn[1])
    found["unseeded"]["by_row"] = len(set(drawn[0])) == 3
    return found


def memory(collectives: Collectives, folder: Path) -> dict[str, Any]:
    """Loads a part from a file; how this process' own memory grew meanwhile, in bytes."""
    weights = torch.load(folder / "lit_model.pth", mmap=True, weights_only=True)
    grown, cut = [anonymous()], tensor.slice_parameter

    def noted(*args: Any) -> Tensor:
        grown.append(anonymous())
        return cut(*args)

    tensor.slice_parameter = noted
    model = load_tensor_parallel(Config.from_file(folder / "model_config.yaml"), collectives, weights)
    tensor.slice_parameter = cut
    held = sum(p.nbytes for p in model.parameters())
    grown.append(anonymous())
    found = dict(whole=sum(w.nbytes for w in weights.values()), held=held, peak=max(grown) - grown[0])
    return {"ranks": collectives.all_gather_object(found)}


def anonymous() -> int:
    """This process' memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int)
    parser.add_argument("--out")
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    for name, strategy in OURS.items():
        register("strategy", name)(strategy)
    run = launch(DeviceRequest("cpu", options.devices))
    torch.set_num_threads(1)
    collectives = run.collectives
    torch.manual_seed(collectives.rank)
    began, pair, found = time.perf_counter(), Whole(collectives), {}
    for case in cases(collectives.size):
        found[case[0]] = same_answers(collectives, pair, case)
    report = {"cases": found, "extras": extras(collectives, pair)}
    if options.checkpoint is not None:
        report["memory"] = memory(collectives, options.checkpoint)
    if collectives.rank == 0:
        print(f"{len(found)} cases in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        Path(options.out).write_text(json.dumps(report))  # the processes end together by themselves


if __name__ == "__main__":
    main()
