"""When a row ends and what of it is certain: stop sequences of tokens, stop texts, the least and most new tokens."""

import functools
import operator
import random

import pytest
import torch

from litgpt_kv import SamplingArgs
from litgpt_kv.generate.request import Request, Sequence
from litgpt_kv.generate.stopping import StopMatcher
from litgpt_kv.generate.text import TextStream


def row_of(stop, most, least=0, stream=None):
    return Sequence(Request([0], most, least, stop=stop), stream=stream)


def pushed(row, tokens):
    out = []
    for token in tokens:
        if row.reason is None:
            out += row.push(token)
    return out


def letters(ids):
    return "".join(chr(97 + i) for i in ids)


def test_stop_sequences_of_several_tokens():
    row = row_of([[1, 2]], 10)
    out = [row.push(t) for t in (7, 1, 1, 2)]  # litgpt starts anew after the second 1 and misses the stop
    assert row.reason == "stop"
    assert functools.reduce(operator.iadd, out, []) == row.tokens == [7, 1]
    row = row_of([[1, 2, 3]], 10)
    out = [row.push(t) for t in (1, 2, 4, 1)]
    assert out == [[], [], [1, 2, 4], []]  # what was no stop is not lost
    assert row.reason is None
    row = row_of([[1, 2, 3], [2, 4]], 10)
    assert pushed(row, (1, 2, 4)) == [1]
    assert row.reason == "stop"
    row = row_of([[1, 2]], 2)
    assert pushed(row, (5, 1)) == [5, 1]  # held back, and out of room
    assert row.reason == "length"


@pytest.mark.parametrize("least", [0, 7])
def test_stop_sequences_against_a_search_in_the_whole_output(least):
    g = torch.Generator().manual_seed(0)
    for trial in range(300):
        tokens = torch.randint(3, (30,), generator=g).tolist()
        stops = [torch.randint(3, (n,), generator=g).tolist() for n in (2, 3, 1 + trial % 4)][: 1 + trial % 3]
        row = row_of(stops, 25, least)
        out = pushed(row, tokens)
        found = [
            (n, n - len(s)) for n in range(1, 26) for s in stops if tokens[:n][-len(s) :] == s and n - len(s) >= least
        ]
        if found:
            first = min(end for end, _ in found)
            assert out == tokens[: min(begin for end, begin in found if end == first)], (tokens, stops)
            assert row.reason == "stop"
        else:
            assert out == tokens[:25]
            assert row.reason == "length"
        assert row.tokens == out


def test_logprobs_stay_beside_their_tokens():
    row = row_of([[1, 2]], 9)
    for n, token in enumerate((5, 1, 4, 1, 2)):
        row.push(token, -float(n))
    assert (row.tokens, row.logprobs) == ([5, 1, 4], [0.0, -1.0, -2.0])


def test_stop_texts_against_a_search_in_the_whole_text():
    rng = random.Random(1)
    alphabet = ["a", "b", "ab", "ba", "c", "abc"]

    def decode(ids):
        return "".join(alphabet[i] for i in ids)

    for trial in range(400):
        tokens = [rng.randrange(6) for _ in range(20)]
        stops = ["".join(rng.choice("abc") for _ in range(n)) for n in (2, 3, 5)][: 1 + trial % 3]
        row = row_of([], 20, stream=TextStream(decode, [4, 2], stops=stops))
        pieces, steps = "", 0
        for token in tokens:
            if row.reason is None:
                row.push(token)
                pieces += row.new_text
                steps += 1
        text, whole = decode(tokens[:steps]), decode(tokens)
        ends = [n for n in range(1, len(whole) + 1) if any(whole[:n].endswith(s) for s in stops)]
        if not ends:
            assert (row.text, row.reason, row.tokens) == (whole, "length", tokens)
            continue
        expected = whole[: ends[0] - max(len(s) for s in stops if whole[: ends[0]].endswith(s))]
        assert (row.text, pieces, row.reason) == (expected, expected, "stop"), (whole, stops)
        assert len(text) >= ends[0] > len(decode(tokens[: steps - 1])), "it ended at the token that completed the stop"
        assert expected.startswith(decode(row.tokens)) and row.tokens == tokens[: len(row.tokens)]
        assert len(decode(tokens[: len(row.tokens) + 1])) > len(expected)


def test_stop_texts_count_after_the_least_number_of_tokens():
    row = row_of([], 9, 3, TextStream(letters, stops=["bc"]))
    pushed(row, [1, 2, 1, 2, 0])
    assert (row.text, row.tokens, row.reason) == ("bcbca", [1, 2, 1, 2, 0], None)  # "bc" begins inside the first three
    pushed(row, [1, 2])
    assert (row.text, row.tokens, row.reason) == ("bcbca", [1, 2, 1, 2, 0], "stop")


def test_a_stop_text_and_a_stop_token_together():
    row = row_of([[5, 6]], 9, stream=TextStream(letters, stops=["dd"]))
    pushed(row, [0, 5, 3, 5, 6])
    assert (row.text, row.reason) == ("afd", "stop")
    row = row_of([[5, 6]], 9, stream=TextStream(letters, stops=["fd"]))
    pushed(row, [0, 5, 3, 1])
    assert (row.text, row.tokens, row.reason) == ("a", [0], "stop")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, r"min_new_tokens must be 0 to 4 \(max_new_tokens\), got 5"),
        ({"stop": [2]}, "stop sequences of at least one token"),
        ({"stop": ["ab"]}, "stop sequences of at least one token"),
        ({"stop": [[]]}, "stop sequences of at least one token"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"sampling": SamplingArgs(temperature=[0.0, 1.0])}, "one value for each sampling setting, got a list for"),
    ],
)
def test_what_a_request_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        Request([1], **given)


def test_text_never_breaks_inside_a_character():
    data = "naïve café — 漢字 🎉 end".encode()
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"), list(b"> "))
    pieces = [stream.push([byte]) for byte in data]
    pieces.append(stream.push([], last=True))
    assert "".join(pieces) == data.decode()
    assert not any("\ufffd" in piece for piece in pieces)
    cut = TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert cut.push(list(data[:4])) + cut.push([], last=True) == data[:4].decode(errors="replace")


class Counted(list):
    """A list that counts how often an element is read."""

    reads = 0

    def __getitem__(self, at):
        Counted.reads += 1
        return super().__getitem__(at)


def test_the_matcher_against_a_search_at_every_element():
    rng = random.Random(2)
    for trial in range(500):
        text = [rng.randrange(2 + trial % 2) for _ in range(60)]
        stops = [[rng.randrange(2) for _ in range(rng.randrange(1, 9))] for _ in range(1 + trial % 4)]
        matcher = StopMatcher(stops)
        for n, element in enumerate(text, 1):
            ends = [len(stop) for stop in stops if text[:n][-len(stop) :] == stop]
            assert sorted(matcher.push(element)) == sorted(ends)
            begun = [k for stop in stops for k in range(1, min(n + 1, len(stop))) if text[n - k : n] == stop[:k]]
            assert matcher.partial == max(begun, default=0)
            if trial % 5 == 0 and n == 30:
                matcher.reset()
                text[:n] = [9] * n  # what was before does not count


def test_the_work_is_linear_in_the_text():
    stops = [Counted([0] * 20_000 + [1]), Counted([0, 1] * 10_000), Counted([0] * 5_000 + [2])]
    matcher, rng = StopMatcher(stops), random.Random(0)
    Counted.reads, pushed = 0, 0
    for _ in range(8):
        for element in [0] * rng.randrange(10_000) + [1, 0] * rng.randrange(3_000) + [2]:
            pushed += 1
            assert not [n for n in matcher.push(element) if n > 5_001]
    assert pushed > 20_000 and Counted.reads < 20 * pushed


def test_stop_texts_of_ten_million_characters():
    alphabet = ["ab" * 20, "ab", "c"]
    decode = lambda ids: "".join(alphabet[i] for i in ids)  # noqa: E731
    long, short = "ab" * 5_000_000, "ab" * 30_000 + "cc"
    row = row_of([], 10_000, stream=TextStream(decode, stops=[long, short]))
    for token in [0] * 3_000 + [2, 1] + [0] * 2_000:
        row.push(token)
    assert row.text == "ab" * 60_000 + "c" and row.reason is None, "the rest may yet be the long one"
    for token in (2, 2):
        row.push(token)
    assert row.reason == "stop" and len(row.text) == 2 * 60_000 + 1 + 2 * (1 + 40_000 - 30_000)
    assert decode(row.tokens) == row.text[: len(decode(row.tokens))] and len(row.text) - len(decode(row.tokens)) < 40


@pytest.mark.parametrize("stops", [[], ["zz"]])
@pytest.mark.parametrize("data", [b"words " * 500, "漢字".encode() * 500, b"\xff\xfe" * 1500])
def test_text_is_decoded_a_few_tokens_at_a_time(data, stops):
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return bytes(ids).decode("utf-8", errors="replace")

    row = row_of([], len(data) + 1, stream=TextStream(decode, list(b"prompt" * 900), stops=stops))
    tokens = row.tokens
    for byte in data:
        row.push(byte)
    assert row.tokens is tokens and len(tokens) == len(data), "no copy at every token"
    row.push(32)
    assert row.text == data.decode(errors="replace") + " "
    assert max(sizes) <= 40 and len(sizes) < 1.3 * len(data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 10**5000}, "max_new_tokens must be at most 2,147,483,647, got a value of type int"),
        ({"max_new_tokens": -(10**400)}, "max_new_tokens must be at least 1, got -1000"),
        ({"min_new_tokens": 10**5000}, "min_new_tokens must be 0 to 50"),
        ({"stop": [[10**400], [True]]}, "stop sequences of at least one token"),
        ({"stop": 5}, "stop sequences of at least one token"),
        ({"stop": None}, "stop sequences of at least one token"),
    ],
)
def test_huge_and_strange_values_are_refused_in_our_words(given, message):
    with pytest.raises(ValueError, match=message):
        Request([1], **given)
