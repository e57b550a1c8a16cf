"""From the body of a request to the engine's requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from litgpt_kv.arguments import MOST_NEW_TOKENS, StoppingArgs, check_count
from litgpt_kv.config import SamplingArgs, shown
from litgpt_kv.generate import Request
from litgpt_kv.generate.limits import Limits
from litgpt_kv.generate.request import MOST_LOGPROBS
from litgpt_kv.llm.beginning import encode_later
from litgpt_kv.llm.chat import conversation_text, later_turn
from litgpt_kv.llm.llm import LLM
from litgpt_kv.llm.text_request import check_text
from litgpt_kv.serve.conversations import Conversations, KeptState, Messages
from litgpt_kv.serve.schemas import MOST_STOPS, ChatBody, CompletionBody, Message, Refused, Sampled

T = TypeVar("T")
NEW_TOKENS = 16  # of /v1/completions, where nothing is said, as at OpenAI
LONGEST_ID = 200  # characters of a conversation's id


@dataclass(frozen=True)
class Asked:
    """What one call asks for: engine requests, `n` a prompt and side by side, for one cache.

    Attributes:
        prompt_tokens: Of each prompt once. echo: Whether answers begin with their prompt; new_tokens: whether any
            new token is wanted. kept: The state to go on from. messages: The conversation before the reply.
    """

    cache: str
    requests: list[Request]
    n: int
    prompt_tokens: int
    echo: bool = False
    new_tokens: bool = True
    kept: KeptState | None = None
    conversation: str | None = None
    messages: Messages = ()


class Reader:
    """Reads bodies.

    Args:
        llm: The model and its tokenizer. limits: What requests must fit, by the names of caches, the default one first.
        sampling, stopping: What counts where a request says nothing. most: The most answers of a call, by cache.
    """

    def __init__(
        self,
        llm: LLM,
        limits: Mapping[str, Limits],
        sampling: SamplingArgs,
        stopping: StoppingArgs,
        most: Callable[[str], int],
        conversations: Conversations,
    ) -> None:
        self.llm, self.limits, self.most, self.conversations = llm, limits, most, conversations
        self.sampling, self.stopping = sampling.resolved(llm.temperature), stopping

    def chat(self, body: ChatBody) -> Asked:
        """What a chat asks for.

        Raises:
            Refused: If it does not fit, or a value is out of range.
        """
        cache = self._cache(body)
        messages = self._messages(body.messages)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise Refused("Give either max_tokens or max_completion_tokens.", "max_tokens")
        logprobs = body.top_logprobs or 0 if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise Refused("top_logprobs goes with logprobs: true.", "top_logprobs")
        kept = None
        if body.conversation is not None:
            self._check_conversation(body, cache)
            kept = self.conversations.find(body.conversation, cache, messages)
        ids = self._turn(kept, messages) if kept is not None else self.chat_tokens(body.messages)
        asked_for = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
        seen = 0 if kept is None else kept.seen
        new = self._room(cache, seen + len(ids)) if asked_for is None else asked_for
        past = () if kept is None else kept.text
        requests = self._requests(body, cache, [ids], new, logprobs, seen, past=past)
        messages_kept = messages if body.conversation is not None else ()
        return Asked(cache, requests, body.n, len(ids), False, True, kept, body.conversation, messages_kept)

    def completion(self, body: CompletionBody) -> Asked:
        """What a completion asks for.

        Raises:
            Refused: If it does not fit, or a value is out of range.
        """
        cache = self._cache(body)
        if body.best_of is not None and body.best_of != body.n:
            raise Refused("best_of is not supported here.", "best_of")
        prompts = self._prompts(body.prompt)
        new = NEW_TOKENS if body.max_tokens is None else body.max_tokens
        if new == 0 and not body.echo:
            raise Refused("max_tokens must be at least 1, or 0 with echo: true.", "max_tokens")
        scored = body.echo and body.logprobs is not None
        requests = self._requests(body, cache, prompts, new or 1, body.logprobs, 0, prompt_logprobs=scored)
        return Asked(cache, requests, body.n, sum(map(len, prompts)), body.echo, new > 0)

    def chat_tokens(self, messages: list[Message]) -> list[int]:
        """A conversation as token ids, up to where the reply begins."""
        given = [{"role": message.role, "content": message.text} for message in messages]
        text = _said("messages", lambda: conversation_text(self.llm.prompt_style, given))
        return self.text_tokens(text, "messages")

    def text_tokens(self, text: str, name: str) -> list[int]:
        """A text as token ids."""
        _said(name, lambda: check_text(name, text))
        return _said(name, lambda: self.llm.encode_text(text).tolist())

    def _cache(self, body: Sampled) -> str:
        if body.kv_cache is None:
            return next(iter(self.limits))
        if body.kv_cache not in self.limits:
            names = ", ".join(self.limits)
            raise Refused(
                f"kv_cache must be one that this server has ({names}), got {body.kv_cache!r:.60}.", "kv_cache"
            )
        return body.kv_cache

    def _messages(self, messages: list[Message]) -> Messages:
        if not messages or messages[-1].role != "user":
            raise Refused("messages must be at least one, the last of them the user's.", "messages")
        for message in messages:
            _said("messages", lambda message=message: check_text("a message's content", message.text))
        return tuple((message.role, message.text) for message in messages)

    def _check_conversation(self, body: ChatBody, cache: str) -> None:
        if not body.conversation or len(body.conversation) > LONGEST_ID:
            raise Refused(f"conversation must be a text of 1 to {LONGEST_ID} characters.", "conversation")
        if body.n != 1:
            raise Refused(f"A conversation has one reply a turn: n must be 1, got {body.n}.", "n")
        if not self.limits[cache].plans:
            raise Refused(f"The cache {cache!r} keeps nothing between turns.", "conversation")

    def _turn(self, kept: KeptState, messages: Messages) -> list[int]:
        """The tokens of a turn that goes on from a state, as in `Chat`: the last token of the reply is not read yet."""
        text = later_turn(self.llm.prompt_style, messages[-1][1])
        ids = _said("messages", lambda: encode_later(self.llm.tokenizer, text))
        if not ids:
            raise Refused("The last message has no tokens.", "messages")
        ends_itself = ids[0] == kept.last and [kept.last] in self.llm.ends()
        return ids if ends_itself else [kept.last, *ids]

    def _prompts(self, prompt: Any) -> list[list[int]]:
        given = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not given:
            raise Refused("prompt must be a text, token ids, or a list of these; it is empty.", "prompt")
        return [self.text_tokens(one, "prompt") if isinstance(one, str) else one for one in given]

    def _room(self, cache: str, tokens: int) -> int:
        """New tokens of an answer where nothing is said: the server's setting, or what fits."""
        limit = self.limits[cache].limit
        room = self.stopping.max_new_tokens
        return room if limit is None else max(1, min(room, limit + 1 - tokens))

    def _requests(
        self,
        body: Sampled,
        cache: str,
        prompts: list[list[int]],
        new: int,
        logprobs: int | None,
        seen: int,
        **options: Any,
    ) -> list[Request]:
        if body.n < 1 or body.n * len(prompts) > self.most(cache):
            most = self.most(cache)
            asked = f"{body.n} answers to {len(prompts)} prompts"
            raise Refused(f"One call may ask for 1 to {most} answers (rows and queue), got {asked}.", "n")
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise Refused(f"logprobs must be 0 to {MOST_LOGPROBS}, got {logprobs}.", "logprobs")
        if body.stream_options is not None and not body.stream:
            raise Refused("stream_options goes with stream: true.", "stream_options")
        name = "max_tokens" if getattr(body, "max_completion_tokens", None) is None else "max_completion_tokens"
        _said(name, lambda: check_count(name, new, 1, MOST_NEW_TOKENS))
        if body.min_tokens is not None and not 0 <= body.min_tokens <= new:
            raise Refused(f"min_tokens must be 0 to {new} ({name}), got {shown(body.min_tokens)}.", "min_tokens")
        sampling, stops = self._sampling(body), self._stops(body)
        ignore_eos = body.ignore_eos or self.stopping.ignore_eos
        least = body.min_tokens if body.min_tokens is not None else min(self.stopping.min_new_tokens, new)
        common = dict(stop=() if ignore_eos else self.llm.ends(), stop_texts=stops, logprobs=logprobs, **options)
        requests = []
        for number, prompt in enumerate(prompts):
            which = "The prompt" if len(prompts) == 1 else f"Prompt {number}"
            request = _said(name, lambda prompt=prompt: Request(prompt, new, least, sampling, **common))
            _said("prompt", lambda request=request, which=which: self.limits[cache].check(request, which, seen))
            requests += [replace(request, sampling=sampling.shifted(sample)) for sample in range(body.n)]
        return requests

    def _sampling(self, body: Sampled) -> SamplingArgs:
        given = {f.name: getattr(body, f.name) for f in fields(SamplingArgs) if getattr(body, f.name) is not None}
        if given.get("top_k") in (0, -1):  # as in vLLM: all
            given["top_k"] = None
        for name, value in given.items():
            _said(name, lambda name=name, value=value: SamplingArgs(**{name: value}))
        return replace(self.sampling, **given)

    def _stops(self, body: Sampled) -> list[str]:
        if body.stop is None:
            return self.stopping.stops
        stops = [body.stop] if isinstance(body.stop, str) else body.stop
        if len(stops) > MOST_STOPS:
            raise Refused(f"stop may have {MOST_STOPS} texts, got {len(stops)}.", "stop")
        for stop in stops:
            _said("stop", lambda stop=stop: (check_text("stop", stop), StoppingArgs(stop=stop)))
        return stops


def _said(param: str, work: Callable[[], T]) -> T:
    """Do something; what is wrong with a value refuses the request."""
    try:
        return work()
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(str(error), param) from error
