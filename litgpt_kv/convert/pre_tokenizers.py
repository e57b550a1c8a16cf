"""How byte-level tokenizers split text before they merge, by the names that GGUF files have for it."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

# Words with what stands before them, digits (in groups of up to three or singly), other signs, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _cased(digits: str, ending: str) -> str:
    """Words that also end where small letters are followed by a capital one."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ending}"
        rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclass(frozen=True)
class Splitting:
    """How text is split.

    Attributes:
        pattern: What is a piece; None: GPT-2's, which is the library's own. single_digits: Every digit stands alone
            before the pattern is tried. whole: A piece that is a token is taken whole, whatever the merges say.
        nfc: Text is brought to Unicode's composed form first.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole: bool = False
    nfc: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        """The library's pre-tokenizer."""
        if self.pattern is None:
            parts = [ByteLevel(add_prefix_space=False, use_regex=True)]
        else:
            parts = [Split(Regex(self.pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        parts = [Digits(individual_digits=True), *parts] if self.single_digits else parts
        return parts[0] if len(parts) == 1 else Sequence(parts)


GPT2 = Splitting()
SINGLE_DIGITS = Splitting(single_digits=True)
LLAMA3 = Splitting(WORDS.format(digits="{1,3}"), whole=True)
CL100K = Splitting(WORDS.format(digits="{1,3}"))
QWEN2 = Splitting(WORDS.format(digits=""), nfc=True)

SPLITTINGS = {
    **dict.fromkeys(["gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion"], GPT2),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"], SINGLE_DIGITS),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"], LLAMA3),
    **dict.fromkeys(["dbrx", "smaug-bpe"], CL100K),  # phi-4
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "megrez"], QWEN2),
    "tekken": Splitting(_cased("", ""), whole=True),
    "gpt-4o": Splitting(_cased("{1,3}", ENDINGS)),  # Phi-4-mini
}
