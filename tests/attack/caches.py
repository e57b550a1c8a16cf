"""Saved caches with damaged or crafted content: loading gives the right cache or ValueError."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from litgpt_kv import GPT, KVCache, KVCacheArgs
from tests.attack.harness import Case, flipped
from tests.cache.test_serialize_damaged import CRAFTED_ABOUT, CRAFTED_ARGS, CRAFTED_BUFFERS, craft, same
from tests.oracle.reference import tiny

BATCH = 100  # files a process
SAVED = [KVCacheArgs("h2o", 10, positions="cache"), KVCacheArgs("sink", 10), KVCacheArgs("dense")]
Damage = Callable[[Path, bytes, random.Random], None]


def made(model: GPT, args: KVCacheArgs) -> KVCache:
    cache = KVCache.build(model, args, 2, 24)
    with torch.inference_mode():
        model(torch.arange(28).reshape(2, 14), cache, torch.tensor([14, 9]))
        for token in range(5):
            model(torch.full((2, 1), token), cache)
    return cache


def tried(args: KVCacheArgs, damages: Sequence[Damage], seed: int) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        model, rng = tiny(), random.Random(seed)
        cache, path = made(model, args), folder / "cache"
        cache.save(path)
        whole = path.read_bytes()
        for damage in damages:
            path.write_bytes(whole)
            damage(path, whole, rng)
            try:
                found = KVCache.load(path, model)
            except ValueError:
                continue
            if not same(cache, found):
                raise SystemExit(f"a wrong cache was loaded: {damage}")

    return act


def _header(path: Path, whole: bytes, rng: random.Random) -> None:
    path.write_bytes(flipped(whole, rng, 0, 8 + struct.unpack("<Q", whole[:8])[0]))


def _data(path: Path, whole: bytes, rng: random.Random) -> None:
    path.write_bytes(flipped(whole, rng, 8 + struct.unpack("<Q", whole[:8])[0]))


def _cut(path: Path, whole: bytes, rng: random.Random) -> None:
    path.write_bytes(whole[: rng.randrange(len(whole))])


def _random(path: Path, whole: bytes, rng: random.Random) -> None:
    path.write_bytes(struct.pack("<Q", rng.choice([0, 2, 100, 2**31, 2**63 - 1])) + rng.randbytes(rng.randrange(200)))


def _crafted() -> Iterator[Damage]:
    for about in [{"args": args} for args in CRAFTED_ARGS] + CRAFTED_ABOUT:
        yield lambda path, whole, rng, about=about: craft(path, about, {})
    for name, change in CRAFTED_BUFFERS:
        yield lambda path, whole, rng, name=name, change=change: craft(
            path, {}, {name: change(load_file(path).get(name))}
        )


def cases(seed: int) -> Iterator[Case]:
    kinds: dict[str, list[Damage]] = {
        "header flips": [_header] * 1700,
        "data flips": [_data] * 300,
        "cut": [_cut] * 100,
        "random bytes": [_random] * 100,
    }
    for kind, damages in kinds.items():
        for first in range(0, len(damages), BATCH):
            batch = damages[first : first + BATCH]
            args = SAVED[(first // BATCH) % len(SAVED)]
            name = f"{kind} from {first}, {args.strategy}"
            yield Case(name, tried(args, batch, seed + first), tries=len(batch), codes=(0,))
    crafted = list(_crafted())
    yield Case("crafted", tried(SAVED[0], crafted, seed), tries=len(crafted), codes=(0,))
