"""Questions about long synthetic texts, in the families of RULER (Hsieh et al. 2024, arXiv 2404.06654), from a seed.

The families are RULER's; texts, words and counts are our own, so that figures are not those of its leaderboard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from litgpt_kv.config import shown
from litgpt_kv.evaluate.haystack import HAYSTACKS, Haystack, hide

Count = Callable[[str], int]

COLOURS = (
    *("amber", "azure", "coral", "crimson", "golden", "hazel", "indigo", "ivory"),
    *("jade", "lilac", "maroon", "olive", "pearl", "ruby", "silver", "violet"),
)
THINGS = (
    *("anchor", "basket", "bridge", "candle", "castle", "compass", "feather", "garden", "hammer", "island"),
    *("kettle", "ladder", "lantern", "mirror", "needle", "orchard", "paddle", "pillow", "rocket", "saddle"),
    *("shovel", "spindle", "statue", "teapot", "thimble", "tunnel", "umbrella", "violin", "wagon", "whistle"),
)


@dataclass(frozen=True)
class Example:
    """One question about a text.

    Attributes:
        context: The text.
        question: What is asked about it.
        lead: The words with which the answer begins.
        answers: What must be in the answer.
        new_tokens: The longest answer.
        depth: Where in the text the answer is, 0 to 1; None: in several places.
    """

    context: str
    question: str
    lead: str
    answers: tuple[str, ...]
    new_tokens: int
    depth: float | None = None

    def score(self, text: str) -> float:
        """The share of the answers that a text has."""
        return sum(answer.lower() in text.lower() for answer in self.answers) / len(self.answers)


def examples(
    task: str,
    number: int,
    tokens: int,
    count: Count,
    seed: int = 0,
    haystack: Haystack = "prose",
    depths: Sequence[float] | None = None,
) -> list[Example]:
    """Return examples of a task, the same ones for the same seed.

    Args:
        task: One of `TASKS`.
        number: How many examples.
        tokens: The length of each text.
        count: A function that counts the tokens of a text.
        haystack: "prose", "noise", or sentences of a text; tasks that count words have none.
        depths: Where answers are hidden, 0 to 1, in turns; None: spread evenly.

    Raises:
        ValueError: If there is no such task, haystack or depth, or a task cannot make so long a text.
    """
    check_task(task, haystack)
    check_depths(depths)
    made = []
    for i in range(number):
        random = Random(f"{seed} {task} {i}")
        at = depths[i % len(depths)] if depths else depth(i, number)
        made.append(TASKS[task](random, at, tokens, haystack, count))
    return made


def depth(i: int, number: int) -> float:
    """Depth of an example: all are spread evenly, and so are those of any part of them, as far as possible."""
    step = next(n for n in range(round(0.618 * number), 2 * number) if math.gcd(n, number) == 1)
    return (i * step % number + 0.5) / number


def check_task(task: str, haystack: Haystack = "prose") -> None:
    """Raise ValueError if there is no such task or haystack."""
    if task not in TASKS:
        raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {shown(task)}.")
    if isinstance(haystack, str) and haystack not in HAYSTACKS:
        raise ValueError(f"haystack must be one of {', '.join(HAYSTACKS)}, got {shown(haystack)}.")


def check_depths(depths: Sequence[float] | None) -> None:
    """Raise ValueError unless depths are numbers from 0 to 1."""
    for value in depths or ():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"depths must be numbers from 0 (the beginning) to 1 (the end), got {shown(value)}.")


def _keys(random: Random, number: int) -> list[str]:
    pairs = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    return random.sample(pairs, number)


def _digits(random: Random, length: int = 7) -> str:
    return str(random.randrange(10 ** (length - 1), 10**length))


def _needle(key: str, value: str) -> str:
    return f"The secret number of the {key} is {value}."


def _needles(keys: int, values: int, asked: int) -> Callable[..., Example]:
    """Sentences with numbers in a text: how many keys there are, values of the first key, keys that are asked for."""

    def make(random: Random, depth: float, tokens: int, haystack: Haystack, count: Count) -> Example:
        names = _keys(random, keys)
        wanted = [(names[0], _digits(random)) for _ in range(values)]
        others = [(name, _digits(random)) for name in names[1:]]
        wanted += others[: asked - 1]
        facts = [_needle(*fact) for fact in dict.fromkeys(wanted + others)]
        context = hide(facts, depth, tokens, haystack, random, count)
        key = " and of the ".join(dict.fromkeys(name for name, _ in wanted))
        what = "is the secret number" if len(wanted) == 1 else "are all the secret numbers"
        lead = f"The secret number{'' if len(wanted) == 1 else 's'} of the {key} {what.split()[0]}"
        question = f"What {what} of the {key}?"
        values_wanted = tuple(value for _, value in wanted)
        new_tokens = 10 if len(wanted) == 1 else 12 * len(wanted)
        return Example(context, question, lead, values_wanted, new_tokens, depth if len(wanted) == 1 else None)

    return make


def _variables(random: Random, depth: float, tokens: int, haystack: Haystack, count: Count) -> Example:
    """A value goes through a chain of five variables; a second chain distracts."""
    names = ["".join(random.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 4)) for _ in range(10)]
    chains, values = (names[:5], names[5:]), (_digits(random, 5), _digits(random, 5))
    told = [
        iter([f"The variable {c[0]} is {v}.", *(f"The variable {b} is the same as {a}." for a, b in pairwise(c))])
        for c, v in zip(chains, values)
    ]
    order = random.sample([0, 1], 10, counts=[5, 5])
    facts = [next(told[which]) for which in order]
    context = hide(facts, None, tokens, haystack, random, count)
    question = f"Which five variables have the value {values[0]} in the text above, directly or through others?"
    return Example(context, question, f"The variables with the value {values[0]} are", tuple(chains[0]), 40)


def _common_words(random: Random, depth: float, tokens: int, haystack: Haystack, count: Count) -> Example:
    """Among words that stand there three times, find five that stand there six to thirty times."""
    common, words = random.sample(THINGS, 5), []
    times = max(6, min(30, tokens // 130))
    rare = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS if thing not in common]
    random.shuffle(rare)
    words += [w for w in common for _ in range(times)]
    while count(_numbered(words)) < tokens:
        if not rare:
            raise ValueError(f"common-words has words for {count(_numbered(words)):,} tokens, got lengths {tokens:,}.")
        words += 3 * [rare.pop()]
    random.shuffle(words)
    context = _numbered(words)
    question = "Which five words stand most often in the list above?"
    return Example(context, question, "The five most common words are", tuple(common), 30)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def _frequent_words(random: Random, depth: float, tokens: int, haystack: Haystack, count: Count) -> Example:
    """Made-up words whose frequency falls as 1/rank squared: find the first three."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    vocabulary = list(dict.fromkeys("".join(random.choices(syllables, k=3)) for _ in range(40)))
    weights = [(rank + 1) ** -2.0 for rank in range(len(vocabulary))]
    words: list[str] = []
    while count(" ".join(words)) < tokens:
        words += random.choices(vocabulary, weights, k=16)
    ranked = sorted(vocabulary, key=lambda w: -words.count(w))
    question = "Which three words stand most often in the text above?"
    return Example(" ".join(words), question, "The three most frequent words are", tuple(ranked[:3]), 24)


TASKS: dict[str, Callable[[Random, float, int, Haystack, Count], Example]] = {
    "needle": _needles(keys=1, values=1, asked=1),
    "multi-key": _needles(keys=8, values=1, asked=1),
    "multi-value": _needles(keys=4, values=3, asked=1),
    "multi-query": _needles(keys=6, values=1, asked=3),
    "variables": _variables,
    "common-words": _common_words,
    "frequent-words": _frequent_words,
}
