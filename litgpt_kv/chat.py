"""A conversation: the cache stays between turns, so that only what is new is read. Floor 6."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from litgpt.prompts import PromptStyle
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Request, Stats
from litgpt_kv.generate.base import run_rows, runner
from litgpt_kv.generate.stopping import Row
from litgpt_kv.generate.text import TextStream

if TYPE_CHECKING:
    from litgpt_kv.api import LLM

ROOM = 8192  # tokens: what a conversation may have unless more is asked for


class Chat:
    """Turns of one conversation with an `LLM`, on one cache of one row.

    Args:
        llm: The model and its tokenizer.
        sys_prompt: For prompt styles that have one; it stands before the first turn.
        kv_cache: A strategy's name, or all of `KVCacheArgs`.
        max_tokens: How many tokens the conversation may have: the size of a dense cache, and the budget where none is
            given. None: the model's context, at most 8,192.
        max_new_tokens: The most tokens of a reply; fewer where no more fit.
        temperature, top_k, top_p, repetition_penalty: See `SamplingArgs`.
        seed: Of the first turn; each turn has the next one. None: torch's global generator.
        stop: Texts that end a reply.
        prefill: How the first turn is read, "min-length" or "full"; later ones are read in blocks where that changes
            nothing (dense, window, sink), else one token at a time.

    Attributes:
        cache: Everything the model remembers. stats: The last turn's. turns: How many there were.
    """

    def __init__(
        self,
        llm: LLM,
        sys_prompt: str | None = None,
        *,
        kv_cache: str | KVCacheArgs = "dense",
        max_tokens: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        prefill: str = "min-length",
    ) -> None:
        self.llm, self.sys_prompt = llm, sys_prompt
        self.max_new_tokens, self.seed, self.prefill = max_new_tokens, seed, prefill
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        self.sampling = (temperature, top_k, top_p), repetition_penalty
        args = KVCacheArgs(kv_cache) if isinstance(kv_cache, str) else kv_cache
        self.cache = llm.build_cache(args, 1, max_tokens or min(ROOM, llm.model.max_seq_length))
        self.stats, self.turns = Stats(), 0
        self._row: Row | None = None

    def reset(self) -> None:
        """Forgets everything."""
        self.cache.reset()
        self.turns, self._row = 0, None

    def say(self, text: str) -> Iterator[str]:
        """The reply to a turn, piece by piece as it is made. One that is not read to its end stays as it is.

        Raises:
            ValueError: If the turn is empty or no longer fits; the conversation can then go on with another one.
        """
        ids = self.turn(text)
        if self._row is not None:
            last = self._row.last  # drawn, but not read yet; a style that ends the reply itself need not do so twice
            ids = ids if ids[0] == last and [last] in self.llm.ends() else [last, *ids]
        room = self.max_new_tokens
        if self.cache.limit is not None:
            room = min(room, self.cache.limit + 1 - self.cache.seen[0] - len(ids))
            if room < 1:
                raise ValueError(
                    f"After {self.cache.seen[0]:,} tokens, {len(ids)} more do not fit the {self.cache.limit:,} of this "
                    f"conversation: {self.cache.why}. Start anew (/reset in the chat command)."
                )
        (temperature, top_k, top_p), penalty = self.sampling
        seed = None if self.seed is None else self.seed + self.turns
        sampling = SamplingArgs(temperature, top_k, top_p, seed, penalty)
        request = Request(ids, room, sampling=sampling, stop=self.llm.ends())
        row, self.stats = Row(request, 0, TextStream(self.llm.decode, list(ids), self.stop)), Stats()
        run = runner(self.llm.model, self.cache, 1, self.prefill, None, self.llm.decoder)
        steps = run_rows(run, [row], (), self.stats)
        self.turns += 1
        return self._pieces(steps, row)

    def ask(self, text: str) -> str:
        """The whole reply to a turn."""
        return "".join(self.say(text))

    def _pieces(self, steps: Iterator[list[Row]], row: Row) -> Iterator[str]:
        for _ in steps:
            self._row = row
            yield row.piece

    def turn(self, text: str) -> list[int]:
        """The tokens of a turn in the model's prompt style: the first one with system prompt and beginning of text."""
        if not text:
            raise ValueError("The prompt is empty.")
        if self._row is None:
            return self.llm.encode(text, self.sys_prompt).tolist()
        ids = self.llm.tokenizer.encode(later_turn(self.llm.prompt_style, text), bos=False).tolist()
        if not ids:
            raise ValueError(f"The prompt {text!r} has no tokens.")
        return ids


def later_turn(style: PromptStyle, text: str) -> str:
    """What a prompt style puts between a reply and the next one.

    Styles that know conversations (Llama 3, R1) say it themselves. The others' single turn is used, without its system
    prompt where they can leave it out; Llama 2, TinyLlama, Phi 3 and a few more repeat theirs.
    """
    reply = "\x00"
    turns = [{"role": r, "content": c} for r, c in (("user", "?"), ("assistant", reply), ("user", text))]
    try:
        whole = style.apply(turns)
    except (TypeError, ValueError, AttributeError):
        whole = ""
    if reply in whole and "'role'" not in whole:  # a style for texts alone prints the list as it is
        return whole.partition(reply)[2]
    style = copy.copy(style)
    style.system_message = None
    return style.apply(text)
