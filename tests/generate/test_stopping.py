"""When a row ends and what of it is certain: stop sequences of tokens, stop texts, the least and most new tokens."""

import functools
import operator
import random

import pytest
import torch

from litgpt_kv import SamplingArgs
from litgpt_kv.generate.stopping import Request, Row
from litgpt_kv.generate.text import TextStream


def row_of(stop, most, least=0, stream=None):
    return Row(Request([0], most, least, stop=stop), stream=stream)


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
                pieces += row.piece
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
        ({"sampling": SamplingArgs(temperature=[0.0, 1.0])}, "one value of each sampling setting, got a list for temp"),
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
