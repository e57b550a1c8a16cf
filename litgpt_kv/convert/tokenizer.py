"""The `tokenizers` library's tokenizer from the tokens, merges and scores of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from litgpt_kv.config import shown
from litgpt_kv.convert.gguf_file import GGUFFile
from litgpt_kv.convert.pre_tokenizers import SPLITTINGS
from litgpt_kv.llm.safe_load import one_line

KEY = "tokenizer.ggml."
SPACE = "\u2581"  # what SentencePiece writes for a space
ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
MOST_PIECE = 2_000  # characters of a piece that is cut in two everywhere to find its merges


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokens. kinds: `TokenType`s. begin, end, turn_end, unknown: ids, None if absent."""

    tokens: list[str]
    kinds: list[int]
    begin: int | None
    end: int | None
    turn_end: int | None
    unknown: int | None
    add_begin: bool

    @classmethod
    def of(cls, file: GGUFFile) -> Vocabulary:
        """The tokens of a file.

        Raises:
            ValueError: If they are missing or contradict each other.
        """
        tokens = file.texts(KEY + "tokens")
        if not tokens:
            raise ValueError("it has no tokens")
        if len(set(tokens)) != len(tokens):
            raise ValueError(f"{len(tokens) - len(set(tokens)):,} of its tokens stand twice")
        kinds = file.get(KEY + "token_type", list, [int(TokenType.NORMAL)] * len(tokens))
        if len(kinds) != len(tokens) or not all(isinstance(kind, int) for kind in kinds):
            raise ValueError(f"it has {len(kinds):,} token types for {len(tokens):,} tokens")

        def one(name: str) -> int | None:
            value = file.get(f"{KEY}{name}_token_id", int)
            if value is not None and not 0 <= value < len(tokens):
                if value in (2**32 - 1, -1):  # how some files write "none"
                    return None
                raise ValueError(f"{KEY}{name}_token_id is {value}; there are {len(tokens):,} tokens")
            return value

        begin, spm = one("bos"), file.get(KEY + "model", str) == "llama"
        add = file.get(KEY + "add_bos_token", bool, spm) and begin is not None
        return cls(tokens, kinds, begin, one("eos"), one("eot"), one("unknown"), add)

    def text(self, id: int | None) -> str:
        """A token's text, "" for None."""
        return "" if id is None else self.tokens[id]


def tokenizer_of(file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer of a file. It adds no beginning or end of text itself: litgpt's and ours do, once.

    Raises:
        ValueError: If its kind is not known here, or merges and tokens do not fit together.
    """
    model = file.need(KEY + "model", str)
    try:
        if model == "gpt2":
            tokenizer = _byte_level(file, vocabulary)
        elif model == "llama":
            tokenizer = _sentencepiece(file, vocabulary)
        else:
            raise ValueError(f"its tokenizer is {shown(model)}; gpt2 and llama (SentencePiece) are converted")
        _add_tokens(tokenizer, vocabulary)
    except ValueError:
        raise
    except BaseException as error:  # the library raises plain Exception, and Rust's panic is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(f"its tokens and merges do not make a tokenizer: {one_line(error)}") from error
    return tokenizer


def _byte_level(file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    pre = file.get(KEY + "pre", str, "gpt-2")
    if pre not in SPLITTINGS:
        raise ValueError(f"its text is split as {shown(pre)}, which is none of {', '.join(SPLITTINGS)}")
    splitting = SPLITTINGS[pre]
    merges = [tuple(merge.split(" ")) for merge in file.texts(KEY + "merges") or []]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError("a merge is not two tokens with a space between")
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(BPE(ids, merges, fuse_unk=False, ignore_merges=splitting.whole))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece(file: GGUFFile, vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: the pair whose whole has the highest score is merged first; what is no token is bytes."""
    scores = file.get(KEY + "scores", list)
    if scores is None or len(scores) != len(vocabulary.tokens) or not all(isinstance(s, float) for s in scores):
        raise ValueError("it has no score for each token")
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    normal = {t for t, kind in zip(vocabulary.tokens, vocabulary.kinds) if kind == TokenType.NORMAL}
    merges = []
    for whole in normal:
        if len(whole) > MOST_PIECE:
            raise ValueError(f"it has a token of {len(whole):,} characters, over the limit of {MOST_PIECE:,}")
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in normal and right in normal:
                merges.append((-scores[ids[whole]], ids[left], ids[right]))
    pairs = [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in sorted(merges)]
    unknown = vocabulary.tokens[vocabulary.unknown] if vocabulary.unknown is not None else None
    bytes_there = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    tokenizer = Tokenizer(BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_there))
    prefix = file.get(KEY + "add_space_prefix", bool, True)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Tokens that are found in a text before it is split: control tokens, and those that its makers added."""
    added = [
        AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED)
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds)
        if kind in ADDED and token
    ]
    for tokens, add in (
        ([t for t in added if t.special], tokenizer.add_special_tokens),
        ([t for t in added if not t.special], tokenizer.add_tokens),
    ):
        if tokens:
            add(tokens)
