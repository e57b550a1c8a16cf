"""Texts with passkeys that are recalled at the end, as DuoAttention tells retrieval heads by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def passkey_text(
    filler: Sequence[int], length: int, encode: Callable[[str], list[int]], seed: int, keys: int = 8
) -> tuple[list[int], int]:
    """Return a text of `length` tokens or fewer in which passkeys are told, spread over it, and then recalled.

    Args:
        filler: Token ids of the text around them.
        encode: A function from a sentence to its token ids.
        seed: The seed of the digits and of the order in which they are recalled.
        keys: How many passkeys, at most 8.

    Returns:
        The token ids, and how many of the last ones recall passkeys.

    Raises:
        ValueError: If there is no room for them.
    """
    random = Random(seed)
    told = [f"The {ORDINALS[i]} passkey is {random.randrange(10**6, 10**7)}." for i in range(keys)]
    recalled = encode(" " + " ".join(random.sample(told, keys)))
    sentences = [encode(f" {sentence} ") for sentence in told]
    room = min(len(filler), length - len(recalled) - sum(map(len, sentences)))
    if room < keys:
        raise ValueError(f"length must be at least {length - room + keys} for {keys} passkeys, got {length}.")
    ids: list[int] = []
    for i, sentence in enumerate(sentences):
        ids += [*filler[room * i // keys : room * (i + 1) // keys], *sentence]
    return ids + recalled, len(recalled)
