"""How far bfloat16 logits are from float64, cached or not: `python tests/model/low_precision.py --steps 2000`.

The weights are bfloat16 numbers on all sides, so what is measured is the arithmetic: of a cacheless bfloat16 pass over
the whole text, and of the same text decoded token by token, both against the same weights in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt_kv import GPT, KVCache, KVCacheArgs, registry
from litgpt_kv.llm import checkpoint
from tests.oracle.reference import lift
from tests.oracle.shrink import SYNTHETIC, fill, shrink
from tests.oracle.strategies import FEW

PROMPT = 32
BUDGET = 48  # where tokens are evicted
BLOCK = 100  # steps that are averaged: a single step's error is a draw of chance
FAMILIES = ["demo", "Llama-3.2-1B", "Gemma-2-2b", "Gemma-3-1b-it", "pythia-14m", "Qwen3-0.6B", "latent"]


@dataclass
class Case:
    """One model in both precisions, a text, and what both make of it without a cache."""

    name: str
    model: GPT
    exact: GPT
    tokens: Tensor  # (1, T)
    truth: Tensor  # (T, V) float64
    plain: Tensor  # (T,) error of the cacheless bfloat16 pass
    narrow: Tensor  # (T,) the same where every layer has a sliding window of BUDGET: as much context as a small cache

    @classmethod
    @torch.no_grad()
    def of(cls, name: str, steps: int, seed: int = 0) -> Case:
        length = PROMPT + steps
        generator = torch.Generator().manual_seed(seed)
        config = config_of(name, length)
        if name == "demo":
            fabric, text = (
                checkpoint.fabric_for("32-true", "cpu"),
                (Path(__file__).parents[1] / "oracle" / "reference.py").read_text(),
            )
            model = checkpoint.load_model(checkpoint.DEMO, config, fabric)
            tokens = checkpoint.load_tokenizer(checkpoint.DEMO).encode(text)[None, :length].long()
        else:
            model = fill(GPT(config), seed).eval()
            tokens = torch.randint(config.vocab_size, (1, length), generator=generator)
        model.requires_grad_(False).to(torch.bfloat16)
        model.cos, model.sin = model.rope_cache()  # as a checkpoint is loaded: tables stay float32
        exact = GPT(config).eval().requires_grad_(False)
        exact.load_state_dict(model.state_dict())
        exact = lift(exact)
        truth = exact(tokens)[0]
        plain = error(model(tokens)[0], truth)
        if config.latent_attention:  # which has no windows
            return cls(name, model, exact, tokens, truth, plain, plain)
        with windowed(model), windowed(exact):
            narrow = error(model(tokens)[0], exact(tokens)[0])
        return cls(name, model, exact, tokens, truth, plain, narrow)


@contextmanager
def windowed(model: GPT) -> Iterator[None]:
    """The same model with sliding windows no longer than BUDGET."""
    specs = [block.attn.spec for block in model.transformer.h]
    for block, own in zip(model.transformer.h, specs):
        block.attn.spec = replace(own, window=min(own.window or BUDGET, BUDGET))
    yield
    for block, own in zip(model.transformer.h, specs):
        block.attn.spec = own


def config_of(name: str, length: int) -> Config:
    """A small model's config with room for `length` tokens, or the shipped one's, whose context may be shorter."""
    if name == "demo":
        return checkpoint.load_config(checkpoint.DEMO)
    if name in SYNTHETIC:
        return replace(SYNTHETIC[name], block_size=length)
    window = dict(sliding_window_size=64) if shrink(name).sliding_window_size else {}
    return shrink(name, block_size=length, **window)


def error(logits: Tensor, truth: Tensor) -> Tensor:
    """Root mean square over the vocabulary, (T,)."""
    return (logits.double() - truth).square().mean(-1).sqrt()


@torch.no_grad()
def decoded(model: GPT, tokens: Tensor, args: KVCacheArgs) -> Tensor:
    """Logits (T, V) after each token from the prompt's last on."""
    cache = KVCache.build(model, args, max_tokens=tokens.size(1))
    logits = [model(tokens[:, :PROMPT], cache, torch.tensor([PROMPT]))]
    logits += [model(tokens[:, i : i + 1], cache)[:, 0] for i in range(PROMPT, tokens.size(1))]
    return torch.cat(logits)


@dataclass
class Found:
    """Errors from the prompt's last token on: cached, cacheless, and their worst ratio over blocks of steps."""

    cached: Tensor
    plain: Tensor

    @property
    def ratio(self) -> float:
        return max(float(c.mean() / p.mean()) for c, p in zip(self.cached.split(BLOCK), self.plain.split(BLOCK)))

    @property
    def worst(self) -> float:
        """The largest error of any step in terms of the cacheless pass's largest."""
        return float(self.cached.max() / self.plain.max())


def measure(case: Case, args: KVCacheArgs, evicting: bool = False) -> Found:
    """Compares decoding in bfloat16 with the text itself or, when evicting, with the same evictions in float64.

    A cache of few tokens averages over few, so its errors are compared with those of a sliding window of that size.
    """
    truth = decoded(case.exact, case.tokens, args) if evicting else case.truth[PROMPT - 1 :]
    plain = case.narrow if evicting else case.plain
    return Found(error(decoded(case.model, case.tokens, args), truth), plain[PROMPT - 1 :])


def settings(steps: int) -> list[tuple[str, KVCacheArgs, bool]]:
    """Every strategy with room for all, and those whose evictions do not hang on rounding with a small budget."""
    found = []
    for name in FEW:
        strategy = registry.get("strategy", name)
        budget = PROMPT + steps if strategy.evicts else None
        for positions in ("absolute", "cache"):
            found.append((f"{name}, {positions}", KVCacheArgs(name, budget, positions=positions), False))
            if strategy.evicts and strategy.recency:
                args = KVCacheArgs(name, BUDGET, positions=positions)
                found.append((f"{name}, {positions}, budget {BUDGET}", args, True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | cache | cacheless error | cached error | worst ratio of 100 steps | largest to largest |")
    print("|---|---|---|---|---|---|")
    bad = False
    for name in options.families:
        steps = min(options.steps, config_of(name, PROMPT + options.steps).block_size - PROMPT)
        case = Case.of(name, steps)
        for what, args, evicting in settings(steps):
            found = measure(case, args, evicting)
            row = f"{found.plain.mean():.2e} | {found.cached.mean():.2e} | {found.ratio:.2f} | {found.worst:.2f}"
            print(f"| {name}, {steps} steps | {what} | {row} |", flush=True)
            bad |= max(found.ratio, found.worst) > 2
    raise SystemExit(bad)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
