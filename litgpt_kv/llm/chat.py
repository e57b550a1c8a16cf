"""Chat with a model: the cache stays between turns, so only the new turn is read."""

from __future__ import annotations

import copy
from collections import abc
from collections.abc import Iterator, Mapping
from typing import Any

from litgpt.prompts import ChatML, Gemma, Phi4, Phi4Mini, PromptStyle
from litgpt_kv.arguments import RunArgs, StoppingArgs, check_count, grouped
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Engine, Request, Sequence, Stats
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.generate.limits import Limits
from litgpt_kv.llm.beginning import encode_later
from litgpt_kv.llm.text_model import TextModel
from litgpt_kv.llm.text_request import TextRequest, check_text
from litgpt_kv.llm.threads import cpu_threads
from litgpt_kv.llm.turns import Turns, check_system_prompt

REPLY_ENDS = {ChatML: "<|im_end|>\n", Gemma: "<end_of_turn>\n", Phi4: "<|im_end|>", Phi4Mini: "<|end|>"}
MAX_TOKENS = 8192  # the default limit of a conversation


class Chat:
    """One conversation with an `LLM`, on a cache with one row.

    Args:
        llm: The model and its tokenizer.
        sys_prompt: The system prompt, before the first turn; ValueError if the prompt style has no place for it.
        kv_cache: A strategy's name, options by name as in a YAML file, or `KVCacheArgs`.
        budget: Replaces the budget of `kv_cache`.
        max_tokens: The most tokens of the conversation: the size of a dense cache, and the default budget. None: the
            model's context, but at most 8,192.
        prefill: How the first turn is read, "min-length" or "full". Later turns are read in blocks if that does not
            change results (dense, window, sink), else one token at a time.
        settings: The fields of `StoppingArgs` (for each reply, by default 256 tokens; a reply also ends when the
            conversation is full) and `SamplingArgs`, by name. The first turn has `seed`, each turn the next one.

    Attributes:
        cache: The cache.
        stats: Those of the last turn.
        turns: The number of turns so far.
        interrupted: Whether a step of the last reply failed or was interrupted. Half of its token may be in the cache,
            so `say` raises an error until `reset` is called.
    """

    def __init__(
        self,
        llm: TextModel,
        sys_prompt: str | None = None,
        *,
        kv_cache: str | Mapping[str, Any] | KVCacheArgs = "dense",
        budget: int | float | str | None = None,
        max_tokens: int | None = None,
        prefill: str = "min-length",
        **settings: Any,
    ) -> None:
        if llm.parallel is not None and llm.parallel.divides_prompts:
            raise ValueError("A chat has one row, which data_parallel cannot divide among processes.")
        self.llm, self.sys_prompt, self.prefill = llm, sys_prompt, prefill
        if sys_prompt is not None:
            check_text("sys_prompt", sys_prompt)
            check_system_prompt(llm.prompt_style, sys_prompt)
        stopping, sampling = grouped("chat", {"max_new_tokens": 256, **settings}, StoppingArgs, SamplingArgs)
        sampling = sampling.resolved(llm.temperature)
        self.defaults = TextRequest(sys_prompt=sys_prompt, stopping=stopping, sampling=sampling)
        RunArgs(prefill=prefill)  # raises ValueError for an unknown method
        args = KVCacheArgs.of(kv_cache, budget)
        if args is None:
            raise ValueError("A chat needs a cache: choose a strategy.")
        if max_tokens is not None:
            check_count("max_tokens", max_tokens, 1, 2**31 - 1)
        max_tokens = min(MAX_TOKENS, llm.model.max_seq_length) if max_tokens is None else max_tokens
        self.cache = llm.build_cache(args, 1, max_tokens)
        if isinstance(llm.decoder, CompiledDecoder):
            with cpu_threads(llm.threads):
                llm.decoder.warm_up(self.cache)
        self.limit = Limits.of(llm.model, args, prefill, max_tokens).limit  # a cache for compiled steps may be larger
        self.stats, self.turns, self.interrupted = Stats(), 0, False
        self._reply: Sequence | None = None
        self._text: list[int] = []  # all tokens of the conversation, for the repetition penalty

    def reset(self) -> None:
        """Start a new conversation: empty the cache and forget all turns."""
        self.cache.reset()
        self.turns, self._reply, self._text, self.interrupted = 0, None, [], False

    def say(self, text: str) -> Iterator[str]:
        """Answer a turn: yield the reply piece by piece while it is generated.

        The turn is read when the first piece is requested. If the caller stops early, the reply ends there. The next
        call of `say` ends the reply before it.

        Raises:
            ValueError: If the turn is empty or does not fit; the conversation can then continue with another turn. If
                the last reply was interrupted in the middle of a step; then call `reset` first.
        """
        if self.interrupted:
            raise ValueError(
                "The last reply was interrupted in the middle of a step, which may be half in the cache: reset() "
                "starts a new conversation (/reset in the chat command)."
            )
        ids = self.turn(text)
        if self._reply is not None and self._reply.last >= 0:
            last = self._reply.last  # it is not in the cache yet; skip it if the prompt style repeats it
            ids = ids if ids[0] == last and [last] in self.llm.ends() else [last, *ids]
        room = self.defaults.stopping.max_new_tokens
        if self.limit is not None:
            room = min(room, self.limit + 1 - self.cache.seen[0] - len(ids))
            if room < 1:
                raise ValueError(
                    f"After {self.cache.seen[0]:,} tokens, {len(ids)} more do not fit the {self.limit:,} of this "
                    f"conversation: {self.cache.why}. Start a new one (/reset in the chat command)."
                )
        return self._pieces(ids, room)

    def _pieces(self, ids: list[int], room: int) -> Iterator[str]:
        stopping, sampling, llm = self.defaults.stopping, self.defaults.sampling.shifted(self.turns), self.llm
        ends = () if stopping.ignore_eos else llm.ends()
        least = min(stopping.min_new_tokens, room)
        request = Request(ids, room, least, sampling, ends, past=self._text, stop_texts=stopping.stops, id=0)
        if llm.parallel is not None:
            (request,) = llm.parallel.own_requests([request])  # all processes draw the same tokens
        engine = Engine(llm.model, self.cache, prefill=self.prefill, decoder=llm.decoder, decode_text=llm.decode)
        self.turns, self.stats, self._text = self.turns + 1, engine.stats, [*self._text, *ids]
        engine.add(request, row=0)
        reply = self._reply = engine.sequence(0)
        last: int | None = None
        while engine.unfinished:
            try:
                with cpu_threads(llm.threads):
                    outputs = engine.step()
            except BaseException:
                self.interrupted = self._reply is reply
                raise
            for output in outputs:
                if last is not None:
                    self._text.append(last)  # this step has read it
                last = reply.last
                yield output.text
                if self._reply is not reply:
                    raise ValueError("This reply was ended by a new turn.")
        if reply.error is not None:
            raise ValueError(f"{reply.error} Start a new conversation (/reset in the chat command).")

    @property
    def full(self) -> bool:
        """Whether no more tokens fit into the conversation."""
        return self.limit is not None and self.cache.seen[0] >= self.limit

    def ask(self, text: str) -> str:
        """Answer a turn: return the whole reply."""
        return "".join(self.say(text))

    def turn(self, text: str) -> list[int]:
        """Return the tokens of a turn in the prompt style; the first turn has the system prompt and the BOS token."""
        first = self.llm.encode(text, self.sys_prompt).tolist()
        if self._reply is None:
            return first
        ids = encode_later(self.llm.tokenizer, later_turn(self.llm.prompt_style, text))
        if not ids:
            raise ValueError(f"The prompt {text!r} has no tokens.")
        return ids


def later_turn(style: PromptStyle, text: str) -> str:
    """Return a later user turn in a prompt style: all text between a reply and the next one.

    Styles for conversations (`Turns`, Llama 3, R1) define it. For others, their single turn is used, after the end of a
    reply from `REPLY_ENDS`, and without the system prompt if the style can leave it out; Llama 2, TinyLlama, Phi 3 and
    a few more repeat theirs.
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
    """Return a conversation as text in a prompt style, up to the model's next reply.

    Args:
        messages: Mappings of "role" and "content": system messages first, then user and assistant messages in turns,
            the last one from the user.
        sys_prompt: The system prompt if no message has one.

    Raises:
        ValueError: If the roles are in another order, or the style has no place for a system prompt.
    """
    systems = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    turns = messages[len(systems) :]
    if any(m["role"] != ("assistant" if n % 2 else "user") for n, m in enumerate(turns)) or not turns:
        order = ", ".join(m["role"] for m in messages)
        raise ValueError(f"messages must be system messages, then user and assistant in turns, got {order[:200]}.")
    system = "\n\n".join(systems) if systems else sys_prompt
    check_system_prompt(style, system)
    if isinstance(style, Turns):
        return style.conversation([turn["content"] for turn in turns], system)
    text = style.apply(turns[0]["content"], sys_prompt=system)
    for reply, turn in zip(turns[1::2], turns[2::2]):
        text += reply["content"] + later_turn(style, turn["content"])
    return text
