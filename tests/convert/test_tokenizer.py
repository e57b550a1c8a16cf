"""Converted tokenizers give the tokens of the tokenizers that the files were made of, or of a plain SentencePiece."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from gguf import TokenType
from tokenizers import Regex, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from litgpt_kv.convert.gguf_file import GGUFFile
from litgpt_kv.convert.pre_tokenizers import SPLITTINGS
from litgpt_kv.convert.tokenizer import SPACE, Vocabulary, tokenizer_of
from tests.convert.tiny import make_tokenizer

PIECES = [
    "def f(x):\n    return x*1234567 + 0x1F\n",
    "The year 1984, 2024-05-06 and 3.14159.",
    "🙂👍🏽👨‍👩‍👧‍👦 emoji",
    "中文测试，一二三 4567",  # noqa: RUF001
    "日本語のテキスト",
    "naïve café e\u0301",
    "  spaces   and\ttabs\n\n\nlines ",
    "<|im_start|>user\nHi<|im_end|>\n",
    "it's we'll I'd they'VE",
    "٣٤٥ १२३",
    "https://a.b/c?d=e&f=1",
    "\r\n\r\n",
]
# What the makers' own tokenizer.json has, written out here from its description.
ORIGINAL = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}


def texts(count: int) -> list[str]:
    """Texts with digits, code, emoji, Chinese and Japanese, cut and joined at random."""
    rng = random.Random(0)
    made = list(PIECES)
    while len(made) < count:
        parts = [rng.choice(PIECES)[rng.randrange(3) : rng.randrange(4, 30)] for _ in range(rng.randrange(1, 6))]
        made.append(rng.choice(["", " ", "7", "\n"]).join(parts))
    return made


def described(tokens: list[str], kinds: list[int], **more: object) -> GGUFFile:
    """A file that has nothing but a tokenizer's metadata."""
    file = GGUFFile.__new__(GGUFFile)
    file.metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    file.metadata |= {f"tokenizer.ggml.{name}": value for name, value in more.items()}
    return file


@pytest.mark.parametrize("pre", ORIGINAL)
def test_byte_level_tokens_are_the_originals(pre: str) -> None:
    split = ORIGINAL[pre]
    if isinstance(split, str):
        split = Sequence([Split(Regex(split), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    original = make_tokenizer(split)
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    tokens = [token for token, _ in sorted(original.get_vocab().items(), key=lambda item: item[1])]
    merges = [" ".join(merge) for merge in json.loads(original.to_str())["model"]["merges"]]
    kinds = [int(TokenType.CONTROL)] * 3 + [int(TokenType.NORMAL)] * (len(tokens) - 3)
    file = described(tokens, kinds, model="gpt2", pre=pre, merges=merges, bos_token_id=0, eos_token_id=1)
    ours = tokenizer_of(file, Vocabulary.of(file))
    made = texts(500)
    for text in made:
        assert ours.encode(text).ids == original.encode(text).ids, text
        assert ours.decode(ours.encode(text).ids) == original.decode(original.encode(text).ids)
    differs = [name for name in ORIGINAL if any(_split(name, text) != _split(pre, text) for text in made)]
    assert differs == [name for name in ORIGINAL if name != pre], "these texts tell the ways to split apart"


def _split(pre: str, text: str) -> list[str]:
    text = normalizers.NFC().normalize_str(text) if SPLITTINGS[pre].nfc else text
    return [piece for piece, _ in SPLITTINGS[pre].pre_tokenizer().pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_no_way_to_split_loses_text(pre: str) -> None:
    for text in texts(40):
        whole = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        pieces = SPLITTINGS[pre].pre_tokenizer().pre_tokenize_str(text)
        assert "".join(piece for piece, _ in pieces) == "".join(piece for piece, _ in whole)


def test_words_of_mixed_case_are_split_where_the_case_changes() -> None:
    for pre, text, pieces in (
        ("gpt-4o", "parseJSONFile it's 12345", ["parse", "JSONFile", "Ġit's", "Ġ", "123", "45"]),
        ("tekken", "parseJSONFile it's 12", ["parse", "JSONFile", "Ġit", "'s", "Ġ", "1", "2"]),
        ("llama-bpe", "parseJSONFile it's 12345", ["parseJSONFile", "Ġit", "'s", "Ġ", "123", "45"]),
    ):
        assert _split(pre, text) == pieces


# -- SentencePiece -----------------------------------------------------------------------------------------------------

WORDS = [
    "the",
    "then",
    "hen",
    "he",
    "en",
    "in",
    "th",
    f"{SPACE}the",
    f"{SPACE}th",
    f"{SPACE}t",
    "ab",
    "ba",
    "aba",
    "bab",
]
LETTERS = [*"abehint", SPACE, "é"]


def pieces_of(tokens: list[str], scores: list[float], text: str, prefix: bool) -> list[int]:
    """SentencePiece's BPE, plainly: merge the neighbours whose whole scores highest, the leftmost first."""
    ids = {token: id for id, token in enumerate(tokens)}
    text = (SPACE if prefix else "") + text.replace(" ", SPACE)
    parts = list(text)
    while True:
        found = [
            (-scores[ids[left + right]], at)
            for at, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in ids
        ]
        if not found:
            break
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_the_plain_algorithm(prefix: bool) -> None:
    special = ["<unk>", "<s>", "</s>", "<end>", "[mine]"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, *LETTERS]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED]
    kinds += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * (len(tokens) - 261)
    order = random.Random(1).sample(range(len(WORDS)), len(WORDS))
    scores = [0.0] * 261 + [-1.0 - rank for rank in order] + [-100.0 - n for n in range(len(LETTERS))]
    ids = dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    file = described(tokens, [int(k) for k in kinds], model="llama", scores=scores, add_space_prefix=prefix, **ids)
    vocabulary = Vocabulary.of(file)
    assert vocabulary.add_begin and (vocabulary.begin, vocabulary.end, vocabulary.turn_end) == (1, 2, None)
    ours = tokenizer_of(file, vocabulary)
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choice("aabbtthheenni  é") for _ in range(rng.randrange(1, 25)))
        text += rng.choice(["", "🙂", "zq"])
        assert ours.encode(text).ids == pieces_of(tokens, scores, text, prefix), text
        assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode("<s>the[mine]he</s>").ids == [
        1,
        *pieces_of(tokens, scores, "the", prefix),
        4,
        *pieces_of(tokens, scores, "he", prefix),
        2,
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(model="bert"), "gpt2 and llama"),
        (dict(pre="poro-chat"), "split as 'poro-chat'"),
        (dict(merges=["a"]), "two tokens with a space"),
        (dict(merges=["a zzz"]), "do not make a tokenizer"),
        (dict(tokens=["a", "a"], token_type=[1, 1]), "stand twice"),
        (dict(token_type=[1]), "1 token types for 3"),
        (dict(bos_token_id=9), "bos_token_id is 9; there are 3"),
        (dict(tokens=[]), "no tokens"),
        (dict(tokens=[1, 2, 3]), "must hold texts"),
        (dict(model="llama"), "score for each"),
        (dict(model="llama", scores=[0.0, 0.0, 0.0], tokens=["a", "b", "x" * 5000]), "5,000 characters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_tokenizers_that_are_refused(change: dict, says: str) -> None:
    given = {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"], **change}
    tokens, kinds = given.pop("tokens", ["a", "b", "ab"]), given.pop("token_type", [1, 1, 1])
    with pytest.raises(ValueError, match=says):
        file = described(tokens, kinds, **given)
        tokenizer_of(file, Vocabulary.of(file))


def test_a_beginning_that_some_files_write_as_none() -> None:
    file = described(["a"], [1], model="gpt2", bos_token_id=2**32 - 1, add_bos_token=True)
    assert Vocabulary.of(file).begin is None and not Vocabulary.of(file).add_begin
    assert tokenizer_of(file, Vocabulary.of(file)).encode("a").ids == [0]
