"""Which cache for this model, context and memory: caches that fit, measured on a text, and three to choose from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs, shown
from litgpt_kv.evaluate import fidelity
from litgpt_kv.evaluate.answering import Questions
from litgpt_kv.evaluate.candidates import Candidate, candidates
from litgpt_kv.evaluate.tasks import examples
from litgpt_kv.llm.llm import LLM

FULL = ["dense", "dense@int8", "dense@k8v4", "dense@int4-hadamard"]
EVICTING = ["keydiff:pool", "keydiff:pool@int8", "sink"]
LARGEST = 50  # the larger share that evicting caches keep, in percent; the other one is half of it
SAME_TOKEN = {"balanced": 0.95, "smallest": 0.85}  # least share of tokens for which the most probable one is the same
FORGOTTEN = {"balanced": 0.125, "smallest": 0.375}  # most numbers that are not found, of those that a full cache finds
NEEDLES = 8
PIECES = 5
QUESTION = 64  # tokens that a question and its answer have at most
UNITS = {"": 1, "k": 1024, "m": 1024**2}
BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_tokens(text: str | int) -> int:
    """Tokens of "32k" (32 times 1,024) or "5000".

    Raises:
        ValueError: For anything else.
    """
    match = re.fullmatch(r"(\d{1,9})([km]?)", str(text).strip().lower())
    if isinstance(text, bool) or match is None or int(match[1]) < 1:
        raise ValueError(f"context must be a number of tokens, as 32k or 5000, got {shown(text)}.")
    return int(match[1]) * UNITS[match[2]]


def parse_bytes(text: str | int | float) -> int:
    """Bytes of "24GB" (24 times 10^9), "512MiB" or a number of GB.

    Raises:
        ValueError: For anything else.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([KMGT]?I?B)?", str(text).strip().upper())
    size = 0 if match is None or isinstance(text, bool) else int(float(match[1]) * BYTES.get(match[2] or "GB", 0))
    if size < 1:
        raise ValueError(f"memory must be a size, as 24GB or 512MiB, got {shown(text)}.")
    return size


@dataclass(frozen=True)
class Measured:
    """A cache that fits, and what it costs.

    Attributes:
        candidate: The cache. bytes: Of the whole cache, for all rows of the asked context.
        kl: Mean divergence from the full cache, in nats a token. top1: Share of tokens for which the most probable one
            is the full cache's. found: Numbers hidden in the text that were found, of `NEEDLES`.
        seconds: A decode step took, here, of a few rows.
    """

    candidate: Candidate
    bytes: int
    kl: float
    top1: float
    found: int
    seconds: float


@dataclass(frozen=True)
class Request:
    """What is asked for: tokens of a row, rows, bytes of memory for weights and cache."""

    context: int
    batch_size: int
    memory: int


def fitting(llm: LLM, asked: Request) -> tuple[list[tuple[Candidate, int]], list[tuple[str, str]]]:
    """The caches that fit into memory beside the weights, with their bytes; the others and why, largest first."""
    weights = weights_bytes(llm)
    dtype = llm.model.transformer.wte.weight.dtype
    fit, refused, large = [], [], []
    base = KVCacheArgs()
    for candidate in [*candidates(FULL, [], base), *candidates(EVICTING, shares(llm, asked.context), base)]:
        args = candidate.args.resolved(asked.context)
        try:
            fidelity.check(llm, args, asked.context, 1)
            size = KVCache.nbytes(llm.model.config, args, asked.batch_size, asked.context, dtype)["total"]
        except ValueError as error:
            refused.append((candidate.name, str(error)))
            continue
        if weights + size > asked.memory:
            large.append((size, candidate.name, f"it needs {(weights + size) / 1e9:.3f} GB with the weights"))
        else:
            fit.append((candidate, size))
    return fit, refused + [(name, why) for _, name, why in sorted(large, reverse=True)]


def shares(llm: LLM, context: int) -> list[int | str]:
    """Return the budgets of caches that evict, smaller where rows are much longer than the model's context.

    Raises:
        ValueError: If no share of so many tokens is inside the model's context.
    """
    own = llm.model.max_seq_length
    most = min(LARGEST, math.floor(1000 * own / context) / 10)
    if most < 2:
        raise ValueError(f"context must be at most {50 * own:,}: the model's is {own:,} tokens, got {context:,}.")
    return [f"{share:g}%" for share in (most, math.floor(5 * most) / 10)]


def measure(
    llm: LLM,
    fit: Sequence[tuple[Candidate, int]],
    text: str,
    tokens: int,
    prompt: int,
    on_part: Callable[[str], None] = lambda what: None,
) -> list[Measured]:
    """Measure caches on a text: token by token, and with numbers hidden in it.

    Args:
        text: Of the kind that the model will read. tokens: How many are read one by one, in up to `PIECES` pieces.
        prompt: How many are read at once before each piece. Needles are hidden in as many.
        on_part: Called with what is done next.

    Raises:
        ValueError: If the text is too short, or its pieces are longer than the model's context.
    """
    ids, context = llm.encode_text(text), llm.model.max_seq_length
    for rows in range(PIECES, 0, -1):  # as many pieces as there are, side by side: that is faster
        size = prompt + -(-tokens // rows) + 1
        if len(ids) >= rows * size:
            break
    else:
        raise ValueError(
            f"The text has {len(ids):,} tokens: {size:,} are needed, or a smaller text_prompt or text_tokens."
        )
    if (longest := max(size, prompt + QUESTION)) > context:
        raise ValueError(
            f"The text is read in pieces of up to {longest:,} tokens, over the model's context of {context:,}: give a "
            f"smaller text_prompt (now {prompt:,}) or text_tokens (now {tokens:,})."
        )
    on_part("reading the text")
    caches = {}
    for candidate, _ in fit:
        try:
            fidelity.check(llm, candidate.args, size, prompt)
        except ValueError as error:  # a share of a few tokens
            raise ValueError(
                f"{candidate.name} cannot be measured on {size:,} tokens: {error} A larger text_prompt may help."
            ) from error
        caches[candidate.name] = candidate.args
    text_rows, new = ids[: rows * size].view(rows, size), size - prompt - 1
    read = fidelity.measure(
        llm, text_rows, prompt, caches, lambda done: on_part(f"reading the text, step {done - prompt} of {new}")
    )
    made = examples("needle", NEEDLES, prompt, lambda t: len(llm.tokenizer.encode(t, bos=False)), 1, sentences(text))
    questions = Questions(llm, made, NEEDLES)
    found = dict.fromkeys(caches, 0.0)
    for start in range(0, NEEDLES, questions.rows):
        reading = questions.read(start, min(start + questions.rows, NEEDLES))
        for name, args in caches.items():
            on_part(f"needles, {name}")
            found[name] += sum(reading.answer(args, seen=False).scores)
    out = []
    for candidate, whole in fit:
        one, count = read[candidate.name], round(found[candidate.name])
        kl, top1 = sum(one.kl) / len(one.kl), sum(one.agrees) / len(one.agrees)
        out.append(Measured(candidate, whole, max(0.0, kl), top1, count, one.seconds / new))
    return out


def choose(measured: Sequence[Measured]) -> dict[str, Measured]:
    """Three caches: "safest", "balanced" and "smallest".

    Safest loses least. The others are the smallest that lose little enough, see `SAME_TOKEN` and `FORGOTTEN`; of
    numbers only where the safest finds half of them, as small models do not. If none is good enough, it is the safest.
    """
    safest = min(measured, key=lambda m: (m.kl > 1e-6, m.kl if m.kl > 1e-6 else 0.0, m.bytes))
    chosen = {"safest": safest}
    counts = 2 * safest.found >= NEEDLES
    for name, least in SAME_TOKEN.items():
        enough = (1 - FORGOTTEN[name]) * safest.found if counts else 0
        good = [m for m in measured if m.top1 >= least and m.found >= enough and m.bytes <= safest.bytes]
        chosen[name] = min(good, key=lambda m: m.bytes, default=safest)
    return chosen


def sentences(text: str) -> tuple[str, ...]:
    """A text as sentences, or as lines where it has none."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n+", text))
    return tuple(part for part in parts if part)


def options(candidate: Candidate, context: int) -> str:
    """A cache as options of a command line."""
    args = candidate.args.resolved(context)
    words = [f"--kv-cache {args.strategy}"]
    given = {"budget": args.budget, "select": args.select, "storage": None if args.storage == "plain" else args.storage}
    words += [f"--kv-cache.{name} {value}" for name, value in given.items() if value is not None]
    return " ".join(words)


def weights_bytes(llm: LLM) -> int:
    """Bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in llm.model.parameters())
