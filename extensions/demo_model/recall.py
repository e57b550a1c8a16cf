"""Long-range documents: values defined first, asked for again hundreds of tokens later.

Between the two stands other real code. Whoever answers without the definitions guesses, so these are the places where
what a cache threw away shows.
"""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer
from vocabulary import END_ID

_WORDS = """
address anchor archive backend border branch bridge bucket buffer button canvas carrier channel circle client
cluster column command corner counter cursor cycle damper device digest domain driver duration edge engine
event factor field filter finder folder frame garden gateway glyph grammar grid group handle header hidden
history holder image index input item kernel label lantern layer layout ledger level library limit line link
local marker master matrix member memory message meter method mirror model module monitor mount needle network
node number object offset option order origin output owner packet page panel parser path pattern phase pixel
plugin point policy pool port prefix price process profile project prompt proxy queue quota radius range rate
reader record region remote repair report request result root route rule sample scale schema scope score
screen section seed segment server session shadow signal slot socket source space stack stage state station
status step store stream string suffix switch symbol system table target task thread ticket timer title token
topic total trace track trigger tunnel unit user value vector version view volume weight widget window worker
writer zone
"""
WORDS = _WORDS.split()


@dataclass(frozen=True)
class Document:
    ids: list[int]
    answers: list[tuple[int, int, int]]  # first token, end, and distance in tokens back to the same value's definition


class _Text:
    """Text under construction, with the character spans of its values."""

    def __init__(self) -> None:
        self.text = ""
        self.spans: list[tuple[int, int, int]] = []  # start, end, start of the definition's value
        self.defined: dict[str, int] = {}

    def add(self, before: str, value: str, after: str, name: str) -> None:
        start = len(self.text) + len(before)
        self.text += before + value + after
        if name in self.defined:
            self.spans.append((start, start + len(value), self.defined[name]))
        else:
            self.defined[name] = start


def _names(rng: random.Random, count: int) -> list[str]:
    pairs: set[str] = set()
    while len(pairs) < count:
        pairs.add("_".join(rng.sample(WORDS, 2)))
    return rng.sample(sorted(pairs), count)


def _value(rng: random.Random) -> str:
    """Values start with their space: so the same text is the same tokens in a definition and in a use."""
    return f" {rng.randrange(10, 1000)}" if rng.random() < 0.5 else f' "{rng.choice(WORDS)}"'


def _excerpt(rng: random.Random, texts: list[str], tokenizer: Tokenizer, tokens: int) -> str:
    """Whole lines of one module, about `tokens` long."""
    lines = rng.choice(texts).splitlines(keepends=True)
    start = rng.randrange(len(lines))
    piece = "".join(lines[start : start + tokens // 4 + 1])
    offsets = tokenizer.encode(piece).offsets
    if len(offsets) > tokens:
        piece = piece[: offsets[tokens][0]]
        piece = piece[: piece.rfind("\n") + 1]
    return piece


def make_document(rng: random.Random, texts: list[str], tokenizer: Tokenizer, length: int) -> Document:
    """`length` tokens, the first of them the document's start."""
    out = _Text()
    table, subject = rng.sample(WORDS, 2)
    names = _names(rng, rng.randrange(8, 14))
    kinds = {name: rng.choice(("constant", "entry", "function")) for name in names}
    values = {name: _value(rng) for name in names}
    by_kind = {kind: [n for n in names if kinds[n] == kind] for kind in ("constant", "entry", "function")}

    out.text += f'"""Settings of the {subject}."""\n\n'
    for name in by_kind["constant"]:
        out.add(f"{name.upper()} =", values[name], "\n", name)
    out.text += f"\n{table} = {{\n"
    for name in by_kind["entry"]:
        out.add(f'    "{name}":', values[name], ",\n", name)
    out.text += "}\n"
    for name in by_kind["function"]:
        out.add(f"\ndef {name}():\n    return", values[name], "\n", name)

    def filler(low: int, high: int) -> None:
        wanted, start = rng.randrange(low, high), len(out.text)
        while wanted > 30 and len(out.text) - start < 3 * wanted:
            out.text += "\n" + _excerpt(rng, texts, tokenizer, wanted)

    filler(60, 400)
    rng.shuffle(names)
    middle = rng.randrange(len(names) // 4, len(names) // 2)
    for part, asked in enumerate((names[:middle], names[middle:])):
        if part:
            filler(40, 120)
        out.text += f"\ndef test_{subject}_{part + 1}():\n"
        for name in asked:
            use = {"constant": name.upper(), "entry": f'{table}["{name}"]', "function": f"{name}()"}[kinds[name]]
            out.add(f"    assert {use} ==", values[name], "\n", name)
    while len(tokenizer.encode(out.text).ids) < length - 1:
        out.text += "\n" + _excerpt(rng, texts, tokenizer, 400)
    return _finish(out, tokenizer, length)


def _finish(out: _Text, tokenizer: Tokenizer, length: int) -> Document:
    encoding = tokenizer.encode(out.text)
    starts = {start: index + 1 for index, (start, _) in enumerate(encoding.offsets)}  # + 1: the start token
    ends = {end: index + 2 for index, (_, end) in enumerate(encoding.offsets)}
    answers = []
    for start, end, definition in out.spans:
        first, last, origin = starts.get(start), ends.get(end), starts.get(definition)
        if first is not None and last is not None and origin is not None and last <= length:
            answers.append((first, last, first - origin))
    return Document([END_ID, *encoding.ids][:length], answers)
