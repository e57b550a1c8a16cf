"""A conversation: the cache stays between turns, so that only what is new is read."""

from __future__ import annotations

import copy
from collections import abc
from collections.abc import Iterator, Mapping
from typing import Any

from litgpt.prompts import ChatML, Gemma, Phi4, Phi4Mini, PromptStyle
from litgpt_kv.arguments import RunArgs, StoppingArgs, check_count, grouped
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Engine, Request, Sequence, Stats
from litgpt_kv.generate.limits import Limits
from litgpt_kv.llm.beginning import encode_later
from litgpt_kv.llm.text_model import TextModel
from litgpt_kv.llm.text_request import TextRequest
from litgpt_kv.llm.turns import Turns

REPLY_ENDS = {ChatML: "<|im_end|>\n", Gemma: "<end_of_turn>\n", Phi4: "<|im_end|>", Phi4Mini: "<|end|>"}
ROOM = 8192  # tokens: what a conversation may have unless more is asked for


class Chat:
    """Turns of one conversation with an `LLM`, on one cache of one row.

    Args:
        llm: The model and its tokenizer.
        sys_prompt: For prompt styles that have one; it stands before the first turn.
        kv_cache: A strategy's name, or all of `KVCacheArgs`.
        budget: Tokens kept, instead of that of `kv_cache`.
        max_tokens: How many tokens the conversation may have: the size of a dense cache, and the budget where none is
            given. None: the model's context, at most 8,192.
        prefill: How the first turn is read, "min-length" or "full"; later ones are read in blocks where that changes
            nothing (dense, window, sink), else one token at a time.
        settings: The fields of `StoppingArgs` (of a reply, which is shorter where no more fits; 256 tokens by default)
            and `SamplingArgs` by name; `seed` is that of the first turn, each turn has the next one.

    Attributes:
        cache: Everything the model remembers. stats: The last turn's. turns: How many there were.
        interrupted: Whether a step of the last reply failed or was interrupted: it may be half in the cache, so that
            the conversation goes on only after `reset`.
    """

    def __init__(
        self,
        llm: TextModel,
        sys_prompt: str | None = None,
        *,
        kv_cache: str | KVCacheArgs = "dense",
        budget: int | str | None = None,
        max_tokens: int | None = None,
        prefill: str = "min-length",
        **settings: Any,
    ) -> None:
        if llm.parallel is not None and llm.parallel.divides_prompts:
            raise ValueError("A conversation has one row: nothing is to be divided among the processes.")
        self.llm, self.sys_prompt, self.prefill = llm, sys_prompt, prefill
        stopping, sampling = grouped("chat", {"max_new_tokens": 256, **settings}, StoppingArgs, SamplingArgs)
        self.asked = TextRequest(sys_prompt=sys_prompt, stopping=stopping, sampling=sampling.resolved(llm.temperature))
        RunArgs(prefill=prefill)  # raises for what is out of range
        args = KVCacheArgs.of(kv_cache, budget)
        if args is None:
            raise ValueError("Without a cache nothing is kept between turns: choose a strategy.")
        RunArgs(prefill=prefill)  # raises for an unknown one
        if max_tokens is not None:
            check_count("max_tokens", max_tokens, 1, 2**31 - 1)
        room = min(ROOM, llm.model.max_seq_length) if max_tokens is None else max_tokens
        self.cache = llm.build_cache(args, 1, room)
        self.limit = Limits.of(llm.model, args, prefill, room).limit  # a cache for compiled steps may be larger
        self.stats, self.turns, self.interrupted = Stats(), 0, False
        self._reply: Sequence | None = None
        self._text: list[int] = []  # all tokens of the conversation, for the repetition penalty

    def reset(self) -> None:
        """Forgets everything."""
        self.cache.reset()
        self.turns, self._reply, self._text, self.interrupted = 0, None, [], False

    def say(self, text: str) -> Iterator[str]:
        """The reply to a turn, piece by piece as it is made. One that is not read to its end stays as it is.

        The turn is read when the first piece is asked for; finish or drop a reply before the next turn.

        Raises:
            ValueError: If the turn is empty or no longer fits; the conversation can then go on with another one. If a
                step was interrupted: it can go on after `reset`.
        """
        if self.interrupted:
            raise ValueError(
                "The last reply was interrupted in the middle of a step, which may be half in the cache: reset() "
                "starts anew (/reset in the chat command)."
            )
        ids = self.turn(text)
        if self._reply is not None and self._reply.last >= 0:
            last = self._reply.last  # drawn, but not read yet; a style that ends the reply itself need not do so twice
            ids = ids if ids[0] == last and [last] in self.llm.ends() else [last, *ids]
        room = self.asked.stopping.max_new_tokens
        if self.limit is not None:
            room = min(room, self.limit + 1 - self.cache.seen[0] - len(ids))
            if room < 1:
                raise ValueError(
                    f"After {self.cache.seen[0]:,} tokens, {len(ids)} more do not fit the {self.limit:,} of this "
                    f"conversation: {self.cache.why}. Start anew (/reset in the chat command)."
                )
        return self._pieces(ids, room)

    def _pieces(self, ids: list[int], room: int) -> Iterator[str]:
        stopping, sampling, llm = self.asked.stopping, self.asked.sampling.shifted(self.turns), self.llm
        ends = () if stopping.ignore_eos else llm.ends()
        least = min(stopping.min_new_tokens, room)
        request = Request(ids, room, least, sampling, ends, past=self._text, stop_texts=stopping.stops, id=0)
        if llm.parallel is not None:
            (request,) = llm.parallel.own_requests([request])  # all processes draw alike
        engine = Engine(llm.model, self.cache, prefill=self.prefill, decoder=llm.decoder, decode_text=llm.decode)
        self.turns, self.stats, self._text = self.turns + 1, engine.stats, [*self._text, *ids]
        engine.add(request, row=0)
        reply = self._reply = engine.sequence(0)
        drawn: int | None = None
        while engine.unfinished:
            try:
                outputs = engine.step()
            except BaseException:
                self.interrupted = self._reply is reply
                raise
            for output in outputs:
                if drawn is not None:
                    self._text.append(drawn)  # it is read by now
                drawn = reply.last
                yield output.text
                if self._reply is not reply:
                    raise ValueError("This reply was dropped: another turn began before it ended.")
        if reply.error is not None:
            raise ValueError(f"{reply.error} Start anew (/reset in the chat command).")

    @property
    def full(self) -> bool:
        """Whether the last reply ended because no more tokens fit."""
        return self.limit is not None and self.cache.seen[0] >= self.limit

    def ask(self, text: str) -> str:
        """The whole reply to a turn."""
        return "".join(self.say(text))

    def turn(self, text: str) -> list[int]:
        """The tokens of a turn in the model's prompt style: the first one with system prompt and beginning of text."""
        first = self.llm.encode(text, self.sys_prompt).tolist()
        if self._reply is None:
            return first
        ids = encode_later(self.llm.tokenizer, later_turn(self.llm.prompt_style, text))
        if not ids:
            raise ValueError(f"The prompt {text!r} has no tokens.")
        return ids


def later_turn(style: PromptStyle, text: str) -> str:
    """What a prompt style puts between a reply and the next one.

    Styles that know conversations (`Turns`, Llama 3, R1) say it themselves. The others' single turn is used, after what
    ends a reply in the styles of `REPLY_ENDS`, and without its system prompt where they can leave it out; Llama 2,
    TinyLlama, Phi 3 and a few more repeat theirs.
    """
    if isinstance(style, Turns):
        return style.later(text)
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
    return next((end for cls, end in REPLY_ENDS.items() if isinstance(style, cls)), "") + style.apply(text)


def conversation_text(
    style: PromptStyle, messages: abc.Sequence[Mapping[str, str]], sys_prompt: str | None = None
) -> str:
    """A conversation in a prompt style, up to where the model's next reply begins.

    Args:
        messages: Mappings of "role" and "content": system messages first, then the user's and the assistant's in turns,
            the user's last.
        sys_prompt: The system prompt where no message gives one.

    Raises:
        ValueError: If the roles come in another order.
    """
    systems = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    turns = messages[len(systems) :]
    if any(m["role"] != ("assistant" if n % 2 else "user") for n, m in enumerate(turns)) or not turns:
        order = ", ".join(m["role"] for m in messages)
        raise ValueError(f"messages must be system messages, then user and assistant in turns, got {order[:200]}.")
    system = "\n\n".join(systems) if systems else sys_prompt
    if isinstance(style, Turns):
        return style.conversation([turn["content"] for turn in turns], system)
    text = style.apply(turns[0]["content"], sys_prompt=system)
    for reply, turn in zip(turns[1::2], turns[2::2]):
        text += reply["content"] + later_turn(style, turn["content"])
    return text
