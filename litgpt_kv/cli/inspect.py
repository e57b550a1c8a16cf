"""`litgpt_kv inspect`: one HTML page that shows which tokens caches keep, and what that costs, step by step."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

from tqdm import tqdm

from litgpt_kv.arguments import DeviceArgs, check_count
from litgpt_kv.cli.evaluate import MOST, ONE_DEVICE, text_of
from litgpt_kv.cli.loading import load
from litgpt_kv.config import KVCacheArgs
from litgpt_kv.disk import check_target
from litgpt_kv.evaluate.candidates import candidates
from litgpt_kv.inspect import Record, answer_of, record, write_page

CACHE = KVCacheArgs("h2o", budget="25%")


def inspect(
    checkpoint_dir: str,
    prompt: list[str] | str | None = None,
    *,
    text: str | None = None,
    text_tokens: int = 1000,
    text_prompt: int | None = None,
    max_new_tokens: int = 100,
    strategies: list[str] | None = None,
    out: str = "inspect.html",
    kv_cache: KVCacheArgs = CACHE,
    device: Annotated[DeviceArgs, ONE_DEVICE] = DeviceArgs(),
) -> None:
    """Show which tokens caches keep and what is lost, step by step, in one HTML page that needs no network.

    The same tokens are read by a full cache and by each cache that is compared: a prompt with the answer that the full
    cache gives, or a text file.

    Args:
        checkpoint_dir: A checkpoint folder in litgpt's layout, or "demo" for the shipped model.
        prompt: The prompt, in the model's prompt style.
        text: A text file to read instead; "prose" is Python's manual.
        text_tokens: How much of it; at most the model's context.
        text_prompt: How many tokens of that are the prompt, read at once and then compressed (default: half).
        max_new_tokens: The most tokens of the answer to the prompt.
        strategies: Caches to show side by side (default: the one of --kv-cache): NAME, NAME:pool, NAME@STORAGE,
            my_file.py:MyStrategy; the other settings are those of --kv-cache.
        out: The page to write.
        kv_cache: What the cache keeps (default: h2o with a budget of 25%); a share is taken of the whole text.
        device: Where to run.
    """
    check_count("text_tokens", text_tokens, 2, MOST)
    check_count("max_new_tokens", max_new_tokens, 1, MOST)
    if (prompt is None) == (text is None):
        raise ValueError("Give either --prompt or --text.")
    prompts = [prompt] if isinstance(prompt, str) else prompt or []
    if len(prompts) > 1:
        raise ValueError("A page shows one text: give --prompt once.")
    compared = caches_of(strategies, kv_cache)
    words = None if text is None else text_of(text)
    check_target(out)
    llm = load(checkpoint_dir, device)
    if words is None:
        ids, start = answer_of(llm, prompts[0], max_new_tokens)
    else:
        ids = llm.encode_text(words)[:text_tokens]
        start = len(ids) // 2 if text_prompt is None else text_prompt
        if len(ids) < 2 or not 1 <= start < len(ids):
            raise ValueError(
                f"text_prompt must be 1 to {len(ids) - 1} (the text has {len(ids):,} tokens), got {start}."
            )
    of = "the cache" if len(compared) == 1 else f"{len(compared)} caches"
    after = f"then {len(ids) - start:,} tokens one by one, with {of} and a full one"
    print(f"Reading the first {start:,} tokens at once, {after}.", file=sys.stderr)
    with tqdm(total=len(ids) - start, unit="token", disable=None, file=sys.stderr) as bar:
        found = record(llm, ids, start, compared, on_state=lambda state: bar.update(state - bar.n))
    print(summary(found))
    size = write_page(found, out)
    print(f"Written to {out}: {size / 1e6:.2f} MB.", file=sys.stderr)


def caches_of(strategies: list[str] | None, kv_cache: KVCacheArgs) -> dict[str, KVCacheArgs]:
    """Return the caches to show by name: the one of the settings, or one for each of some strategies.

    Raises:
        ValueError: For an unknown name, or settings that keep nothing.
    """
    if kv_cache.strategy == "none":
        raise ValueError("kv_cache 'none' keeps nothing: choose a cache.")
    budget = CACHE.budget if kv_cache.budget is None else kv_cache.budget
    budget = tuple(budget) if isinstance(budget, list) else budget
    if strategies is None and not isinstance(kv_cache.strategy, str):
        return {"mixed": replace(kv_cache, budget=budget)}
    if strategies is not None and not strategies:
        raise ValueError("strategies is an empty list: name at least one.")
    found = candidates(strategies or [kv_cache.strategy], [budget], kv_cache)
    return {candidate.name: candidate.args for candidate in found}


def summary(found: Record) -> str:
    """Return a table of the means over all steps, one line a cache."""
    layout = "{:<24}{:>14}{:>14}{:>18}{:>16}"
    lines = [layout.format("cache", "KL in nats", "same token", "attention lost", "tokens kept")]
    for one in found.caches:
        same = (one.best[:, 0] == found.best[:, 0]).mean()
        kept = found.kept(one.name, found.states - 1).sum(-1).mean()
        of = f"{kept:,.0f} of {len(found.ids):,}"
        lines.append(layout.format(one.name, f"{one.kl.mean():.4f}", f"{same:.0%}", f"{one.lost.mean():.1%}", of))
    return "\n".join(lines)
