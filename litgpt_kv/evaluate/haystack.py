"""Long texts in which something is hidden: free prose, or the same few sentences again and again."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from random import Random

NOISE = (
    "Rain fell on the hills during the night.",
    "A cart went slowly along the road.",
    "The shop on the corner opens at nine.",
    "Some birds were sitting on the wire.",
    "It was quiet in the yard all afternoon.",
)
HAYSTACKS = ("prose", "noise")
Haystack = str | tuple[str, ...]


@cache
def prose() -> tuple[str, ...]:
    """The sentences of the reference manual that every Python carries (`pydoc_data.topics`, PSF license)."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(p.split()) for name in sorted(topics) for p in topics[name].split("\n\n"))
    sentences = (s for p in paragraphs for s in re.split(r"(?<=[.!?]) ", p))
    plain = re.compile(r"[A-Z][\w ,;:'()\"-]+[.]")
    return tuple(dict.fromkeys(s for s in sentences if 40 <= len(s) <= 240 and plain.fullmatch(s)))


def sentences_of(kind: Haystack, random: Random) -> Callable[[], str]:
    """A source of sentences: a text goes on from a random sentence, noise is drawn anew each time."""
    if kind == "noise":
        return lambda: random.choice(NOISE)
    text = prose() if kind == "prose" else kind
    at = random.randrange(len(text))

    def following() -> str:
        nonlocal at
        at = (at + 1) % len(text)
        return text[at]

    return following


def hide(needles: list[str], depth: float | None, tokens: int, kind: Haystack, random: Random, count: Callable) -> str:
    """A text of about `tokens` tokens with sentences hidden in it.

    Args:
        needles: The sentences. depth: Where the first one is, from 0 (the beginning) to 1 (the end), the others being
            anywhere; None: all are anywhere, in their order.
        tokens: Length of the text, the needles included. kind: "prose", "noise", or sentences of a text.
        random: Decides everything. count: Tokens of a text.
    """
    left = tokens - sum(count(" " + needle) for needle in needles)
    source, text = sentences_of(kind, random), []
    while True:
        sentence = source()
        left -= count(" " + sentence)
        if left < 0 and text:
            break
        text.append(sentence)
    shares = [random.random() for _ in needles]
    hidden = list(zip(sorted(shares), needles)) if depth is None else sorted(zip([depth, *shares[1:]], needles))
    size = len(text)
    for share, needle in reversed(hidden):
        text.insert(round(share * size), needle)
    return " ".join(text)
