"""Read one text with several caches and with a full one, and note after every token what each cache has lost.

N tokens of the text · S states · L layers · G key/value heads · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from litgpt_kv.arguments import check_count
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.cache.spec import layer_spec
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.evaluate import fidelity
from litgpt_kv.evaluate.shadow import Shadow, kl_divergence, log_softmax, lost_by_layer
from litgpt_kv.generate import generate
from litgpt_kv.generate.text import TextStream
from litgpt_kv.llm.llm import LLM

NEVER = 65_535  # in `CacheRecord.left`: the head holds the token to the end
BEST = 3  # most probable next tokens that are noted
MOST_ENTRIES = 2**25  # tokens x layers x heads of one cache: with more, browsers take seconds to open the page


@dataclass(frozen=True)
class CacheRecord:
    """What one cache held and lost, state by state: state 0 follows the prompt, state i follows i more tokens.

    Attributes:
        name: The name of the cache.
        allocated: The bytes of the cache.
        left: (L, G, N) uint16, the first state in which a key/value head has no longer a token that it could have;
            `NEVER` where it never loses the token.
        kl: (S,) float32, divergence of the next token's distribution from the full cache's, in nats.
        lost: (S, L) float32, the share of the newest token's attention in the full cache that went to tokens that this
            cache has lost; the mean over heads.
        best: (S, BEST) int64, the most probable next tokens.
        odds: (S, BEST) float32, their probabilities.
    """

    name: str
    allocated: int
    left: np.ndarray
    kl: np.ndarray
    lost: np.ndarray
    best: np.ndarray
    odds: np.ndarray


@dataclass(frozen=True)
class Record:
    """A text that several caches have read.

    Attributes:
        model: The model's name.
        ids: (N,) int64 the text.
        texts: The text of each token.
        start: How many tokens are the prompt, which was read in one pass and then compressed.
        best, odds, allocated: As in `CacheRecord`, of the full cache.
        words: Texts of all tokens in `best`, by id.
        caches: A record for each cache, in the order in which they were given.
    """

    model: str
    ids: Tensor
    texts: list[str]
    start: int
    best: np.ndarray
    odds: np.ndarray
    allocated: int
    words: dict[int, str]
    caches: list[CacheRecord]

    @property
    def states(self) -> int:
        """S, one more than the tokens after the prompt."""
        return len(self.ids) - self.start + 1

    def cache(self, name: str) -> CacheRecord:
        """Return the record of one cache; ValueError if there is none of this name."""
        for one in self.caches:
            if one.name == name:
                return one
        raise ValueError(f"There is no cache {name!r}; there are {', '.join(repr(one.name) for one in self.caches)}.")

    def kept(self, name: str, state: int) -> np.ndarray:
        """Return which tokens each head of a cache holds in a state, (L, G, N) bool, as `KVCache.inspect` says it."""
        check_count("state", state, 0, self.states - 1)
        left = self.cache(name).left
        return (left > state) & (np.arange(left.shape[-1]) < self.start + state)


def answer_of(llm: LLM, prompt: str, new_tokens: int) -> tuple[Tensor, int]:
    """Let a full cache answer a prompt, taking the most probable token each time.

    Args:
        prompt: Put into the model's prompt style.
        new_tokens: The most tokens of the answer.

    Returns:
        Token ids (N,) of prompt and answer, and how many are the prompt.

    Raises:
        ValueError: If both do not fit the model's context.
    """
    check_count("new_tokens", new_tokens, 1, 2**31 - 1)
    ids, context = llm.encode(prompt), llm.model.max_seq_length
    if len(ids) + new_tokens > context:
        raise ValueError(
            f"The prompt has {len(ids):,} tokens; with {new_tokens:,} new ones it is over the model's context of "
            f"{context:,}, and a full cache to compare with holds no more."
        )
    greedy = SamplingArgs(temperature=0)
    (new,) = generate(llm.model, [ids], max_new_tokens=new_tokens, sampling=greedy, stop=llm.ends(), prefill="full")
    return torch.cat((ids, new.to(ids.device))), len(ids)


@torch.inference_mode()
def record(
    llm: LLM,
    ids: Tensor,
    start: int,
    candidates: Mapping[str, KVCacheArgs],
    on_state: Callable[[int], None] = lambda state: None,
) -> Record:
    """Read a text token by token with a full cache and with others, and note what each of the others has lost.

    Args:
        llm: The model and its tokenizer, on one device.
        ids: (N,) int64 the text, at most as long as the model's context.
        start: How many tokens are the prompt, read in one pass and then compressed.
        candidates: Caches by name; a share of a budget is taken of the whole text.
        on_state: Called with the number of each state, from 0 to N - start.

    Raises:
        ValueError: If the text is too short or too long, or a cache cannot be built.
    """
    if not candidates:
        raise ValueError("There is no cache to look at.")
    total, config = len(ids), llm.model.config
    check_count("start", start, 1, total)
    if total > llm.model.max_seq_length:
        raise ValueError(
            f"The text has {total:,} tokens: a full cache to compare with holds at most the model's context of "
            f"{llm.model.max_seq_length:,}."
        )
    check_count("The number of tokens after the prompt", total - start, 0, NEVER - 1)
    entries = config.n_layer * layer_spec(config, 0).groups * total
    if entries > MOST_ENTRIES:
        raise ValueError(
            f"A page with {entries:,} entries (tokens times layers times heads) is too large to open: "
            f"{MOST_ENTRIES:,} are allowed, {MOST_ENTRIES * total // entries:,} tokens of this model."
        )
    for args in candidates.values():
        fidelity.check(llm, args, total, start)
    shadow = Shadow(llm.model, ids[:start], candidates, total)
    notes = {name: _Notes(cache, total) for name, cache in shadow.caches.items()}
    best, odds = [], []
    for state in range(total - start + 1):
        expected = log_softmax(shadow.full_logits)
        for each, noted in zip(_best(expected), (best, odds)):
            noted.append(each)
        for name, note in notes.items():
            note.add(state, shadow.full, log_softmax(shadow.logits[name]), expected)
        on_state(state)
        if state < total - start:
            token = ids[start + state].view(1)
            shadow.read_full(token)
            for name in notes:
                shadow.read(name, token)
    records = [note.record(name) for name, note in notes.items()]
    best, odds = np.concatenate(best), np.concatenate(odds)
    words = {int(id): token_text(llm, int(id)) for id in np.unique([best, *(one.best for one in records)])}
    dense = KVCache.nbytes(llm.model.config, KVCacheArgs(), 1, total, shadow.full.dtype)["total"]
    return Record(config.name, ids.cpu(), token_texts(llm, ids), start, best, odds, dense, words, records)


def _best(logprobs: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The most probable tokens of log-probabilities (1, V), best first, and their probabilities: (1, BEST) each."""
    odds, tokens = logprobs.exp().topk(min(BEST, logprobs.size(-1)))
    return tokens.cpu().numpy(), odds.float().cpu().numpy()


class _Notes:
    """What is noted of one cache while it reads.

    Attributes:
        left: (L, G, N) int32 on the cache's device, as in `CacheRecord`.
    """

    def __init__(self, cache: KVCache, tokens: int) -> None:
        self.cache, self.tokens = cache, tokens
        held = cache.by_token(0, tokens)
        self.left = torch.full(held.shape, NEVER, dtype=torch.int32, device=held.device)
        self.kl: list[Tensor] = []
        self.lost: list[Tensor] = []
        self.best: list[np.ndarray] = []
        self.odds: list[np.ndarray] = []

    def add(self, state: int, full: KVCache, logprobs: Tensor, expected: Tensor) -> None:
        """Note a state, in which the next token has log-probabilities (1, V), `expected` ones with a full cache."""
        held = self.cache.by_token(0, self.tokens)
        held[..., self.cache.seen[0] :] = True  # not read yet
        self.left.masked_fill_(~held & (self.left == NEVER), state)
        self.kl.append(kl_divergence(expected, logprobs))
        self.lost.append(lost_by_layer(full, self.cache))
        for each, noted in zip(_best(logprobs), (self.best, self.odds)):
            noted.append(each)

    def record(self, name: str) -> CacheRecord:
        return CacheRecord(
            name,
            self.cache.allocated()["total"],
            self.left.cpu().numpy().astype(np.uint16),
            torch.cat(self.kl).clamp(min=0).float().cpu().numpy(),
            torch.stack(self.lost).float().cpu().numpy(),
            np.concatenate(self.best),
            np.concatenate(self.odds),
        )


def token_texts(llm: LLM, ids: Tensor) -> list[str]:
    """The text of each token of a text; together they are the text.

    A character of several tokens is the last one's; special tokens, which have no text, are shown by their name.
    """
    stream, out = TextStream(llm.decode), []
    for id in ids.tolist():
        piece = stream.push([id])
        out.append(piece or ("" if llm.decode([id]) else _name(llm, id)))
    out[-1] += stream.push([], last=True)
    return out


def token_text(llm: LLM, id: int) -> str:
    """The text of a token alone, or the name of a special token."""
    return llm.decode([id]) or _name(llm, id)


def _name(llm: LLM, id: int) -> str:
    """The name of a token in the tokenizer's vocabulary; "" for one that it does not have."""
    vocabulary = llm.tokenizer.processor
    if llm.tokenizer.backend == "huggingface":
        return vocabulary.id_to_token(id) or ""
    return vocabulary.id_to_piece(id) if id < vocabulary.vocab_size() else ""
