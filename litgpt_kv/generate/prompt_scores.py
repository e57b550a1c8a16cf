"""Log-probabilities of a prompt's own tokens, as the cache gives them while it reads the prompt.

A first pass over a prompt is causal attention without a cache, of which only the last logits are computed. A dense
cache of one row that reads the same tokens in blocks gives all of them.

T tokens · V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.compat.input_pos import GPT
from litgpt_kv.generate.request import Sequence, Top
from litgpt_kv.generate.sampling import logprobs_of, top_logprobs

BLOCK = 128  # tokens; the logits of a block are (1, BLOCK, V)


class FirstPassScores:
    """Scores the tokens that the first pass over a prompt reads.

    Args:
        model: The `GPT`. length: Tokens of the first pass. dtype: Of keys and values.
    """

    def __init__(self, model: GPT, length: int, dtype: torch.dtype) -> None:
        self.model, self.cache = model, KVCache.build(model, "dense", 1, length, dtype)

    def read(self, sequence: Sequence, start: int, stop: int) -> None:
        """Read the prompt's tokens `start` to `stop` - 1 and note the scores of those that follow each."""
        size = min(BLOCK, self.cache.longest_block)  # layers with a window hold no more tokens than it has
        for at in range(start, stop, size):
            tokens = torch.tensor([sequence.prompt[at : min(at + size, stop)]], device=self.cache.pos.device)
            note_scores(sequence, at, self.model(tokens, self.cache)[0])


def note_scores(sequence: Sequence, start: int, logits: Tensor) -> None:
    """Note the scores of the prompt's tokens `start` + 1, ..., given the logits (T, V) after `start`, ..."""
    following = sequence.prompt[start + 1 : start + 1 + logits.size(0)]
    if not following:
        return
    logits = logits[: len(following)]
    odds = logprobs_of(logits, torch.tensor(following, device=logits.device)).tolist()
    count = sequence.request.logprobs
    sequence.prompt_scores += list(zip(odds, tops_of(logits, count) if count else [[] for _ in odds]))


def tops_of(logits: Tensor, count: int) -> list[Top]:
    """The most probable tokens of each row of logits (B, V), on the host."""
    values, tokens = (x.tolist() for x in top_logprobs(logits, min(count, logits.size(-1))))
    return [list(zip(*row)) for row in zip(tokens, values)]
