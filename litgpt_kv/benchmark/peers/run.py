"""Measure our caches and other libraries' in one interleaved run: the same weights, tokens and number of threads.

1. Each variant reads the prompts, `prefills` times in turns; then it holds the context.
2. A first round of decode steps warms up (and compiles). Its logits say whether all run the same model.
3. In each further round every variant decodes `steps` tokens, one variant after the other.

The context grows by `steps` tokens a round, for all variants alike.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from litgpt_kv import registry
from litgpt_kv.benchmark.peers.base import Job, Peer, Unable, Variant
from litgpt_kv.benchmark.peers.ours import our_variants
from litgpt_kv.benchmark.processor import now
from litgpt_kv.generate.compiled import MOST_GRAPHS
from litgpt_kv.llm.safe_load import one_line

SPREAD = 10  # the longest of ragged rows has so many times the tokens of the shortest
LONG = 4096  # tokens; longer prompts are read once by default


@dataclass
class Measured:
    """A variant and its measurements.

    Attributes:
        library: Whose it is. variant: None if the library cannot run; then `problem` says why.
        prefill_seconds: Of each time that the prompts were read; empty if a twin read them.
        step_seconds: Of each round, the mean over its steps.
        top: The most probable token (B,) after the prompt (0) and after each warm-up step (1, 2, ...), where known.
    """

    library: str
    variant: Variant | None = None
    problem: str = ""
    prefill_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    top: dict[int, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.library if self.variant is None else f"{self.library} {self.variant.name}"

    def agreement(self, first: Measured) -> float | None:
        """The share of tokens that are the most probable ones of the first variant too; None: nothing was run."""
        common = self.top.keys() & first.top.keys()
        if not common:
            return None
        return statistics.mean(float((self.top[i] == first.top[i]).double().mean()) for i in common)

    def fail(self, error: BaseException) -> None:
        """Note why the variant cannot go on, and give up its memory."""
        self.close()
        self.problem = f"{self.variant.name}: {one_line(error)}"
        self.variant = None

    def close(self) -> None:
        if self.variant is not None:
            self.variant.close()


def row_lengths(context: int, rows: int, ragged: bool) -> tuple[int, ...]:
    """Return the tokens of each row: `context`, or evenly spread from a tenth of it up to it."""
    if not ragged or rows == 1:
        return (context,) * rows
    shortest = max(1, context // SPREAD)
    return tuple(round(shortest + (context - shortest) * row / (rows - 1)) for row in range(rows))


def named_peers(peers: str | Sequence[str]) -> list[str]:
    """Return the names of libraries, given as a list or in one text with commas.

    Raises:
        ValueError: For an unknown name.
    """
    listed = peers.split(",") if isinstance(peers, str) else peers
    found = list(dict.fromkeys(name.strip() for name in listed if name.strip()))
    for name in found:
        registry.get("peer", name)
    return found


def collect(job: Job, peers: Sequence[str], strategies: Sequence[str], chunk: int | None) -> list[Measured]:
    """Build all variants of a job, ours first; a library that cannot run it gives an entry that says why."""
    found = [Measured("litgpt_kv", variant) for variant in our_variants(job, strategies, chunk)]
    for name in peers:
        peer: Peer = registry.build("peer", name)
        try:
            peer.check_installed()
            for variant in peer.variants(job):
                refused = isinstance(variant, Unable)
                made = Measured(peer.title, problem=str(variant)) if refused else Measured(peer.title, variant)
                found.append(made)
        except Unable as error:
            found.append(Measured(peer.title, problem=str(error)))
        except Exception as error:  # another library may raise anything; its row says what
            found.append(Measured(peer.title, problem=one_line(error)))
    return found


def measure(entries: list[Measured], tokens: list[Tensor], job: Job, steps: int, repeats: int, prefills: int) -> None:
    """Run all variants in turns, and add the measurements to them.

    Args:
        entries: Ours first.
        tokens: Of each row, (length + new tokens,) int64.
        job: What is run.
        steps: Of a round. repeats: Rounds. prefills: Times that prompts are read.
    """
    prompts = [row[:length] for row, length in zip(tokens, job.lengths)]
    later = torch.stack([row[length:] for row, length in zip(tokens, job.lengths)], dim=1)  # (new tokens, B)
    turns = sum(map(_runs, entries)) * (prefills + repeats + 1)
    shown: dict[str, Any] = {"file": sys.stderr, "disable": None, "leave": False}
    with tqdm(total=turns, **shown) as bar, torch.inference_mode(), many_graphs(job.compiled):
        for i in range(prefills):
            for entry in filter(_runs, entries):
                bar.set_postfix_str(f"{entry.name}, prompt")
                with reported(entry):
                    read_prompts(entry, prompts, last=i + 1 == prefills)
                bar.update()
        for i in range(repeats + 1):
            part = later[i * steps : (i + 1) * steps]
            for entry in filter(_runs, entries):
                bar.set_postfix_str(f"{entry.name}, {'warm-up' if i == 0 else 'steps'}")
                with reported(entry):
                    decode(entry, part, warm_up=i == 0)
                bar.update()


def _runs(entry: Measured) -> bool:
    """Whether a variant can run; it may have failed a moment ago."""
    return entry.variant is not None


def read_prompts(entry: Measured, prompts: list[Tensor], last: bool) -> None:
    """Read the prompts; a variant with a twin only goes on after the twin's last time."""
    if entry.variant.twin is not None:
        if last:
            entry.variant.follow()
        return
    device = prompts[0].device
    began = now(device)
    logits = entry.variant.prefill(prompts)
    entry.prefill_seconds.append(now(device) - began)
    _note_top(entry, 0, logits)


def _note_top(entry: Measured, step: int, output: Tensor | None) -> None:
    if output is not None:
        entry.top[step] = output.argmax(dim=-1) if output.is_floating_point() else output


def decode(entry: Measured, tokens: Tensor, warm_up: bool) -> None:
    """Decode tokens (steps, B)."""
    given = [row.clone() for row in tokens]  # compiled models want tensors that begin at aligned addresses
    began = now(tokens.device)
    if warm_up:
        for i, row in enumerate(given):
            _note_top(entry, i + 1, entry.variant.step(row))
        return
    for row in given:
        entry.variant.step(row)
    entry.step_seconds.append((now(tokens.device) - began) / len(given))


@contextlib.contextmanager
def reported(entry: Measured) -> Iterator[None]:
    """Turn an error of another library into the text of its row; errors of ours are raised."""
    try:
        yield
    except Exception as error:
        if entry.library == "litgpt_kv":
            raise
        entry.fail(error)


@contextlib.contextmanager
def many_graphs(compiled: bool) -> Iterator[None]:
    """Allow for one graph of each library and context; beyond torch's limit, steps would run eagerly unnoticed."""
    if not compiled:
        yield
        return
    import torch._dynamo as dynamo  # takes a second

    with dynamo.config.patch(recompile_limit=MOST_GRAPHS):
        yield
