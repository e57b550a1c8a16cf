"""A prompt and its settings (`Request`), its state (`Sequence`), and the new tokens of a step (`Output`)."""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from litgpt_kv.arguments import check_count, check_flag, check_new_tokens
from litgpt_kv.config import SamplingArgs, check_type, shown
from litgpt_kv.generate.stopping import StopMatcher
from litgpt_kv.generate.text import TextStream, stop_texts

ANSWER = ("tokens", "text", "reason", "error", "start_time", "first_token_time", "end_time", "_logprobs", "_tops")
MOST_LOGPROBS = 100  # the most alternatives of a token
Top = list[tuple[int, float]]  # the most probable tokens in place of one, with their log-probabilities, best first


@dataclass(frozen=True)
class Request:
    """A prompt and its settings.

    Args:
        prompt: Token ids, 1-D.
        max_new_tokens: The most new tokens.
        min_new_tokens: Stop sequences and stop texts only count after so many new tokens.
        sampling: How tokens are chosen; each setting has one value.
        stop: Token sequences that end the answer; they are not part of it.
        stop_texts: Texts that end the answer, if the engine decodes it; they are not part of it.
        past: Tokens that the cache has before the prompt, for the repetition penalty.
        id: The request's number, which must not be in use; None: the engine's next number.
        logprobs: Keep the log-probability of every new token, and so many of the most probable tokens in its place;
            None: as the engine does.
        prompt_logprobs: Keep the same of the prompt's tokens, as the cache gives them while it reads the prompt; this
            needs a second pass over the tokens of a prompt's first pass.
    """

    prompt: Tensor | abc.Sequence[int]
    max_new_tokens: int = 50
    min_new_tokens: int = 0
    sampling: SamplingArgs = field(default_factory=SamplingArgs)
    stop: abc.Sequence[abc.Sequence[int]] = ()
    past: abc.Sequence[int] = ()
    stop_texts: abc.Sequence[str] = ()
    id: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        check_new_tokens(self.max_new_tokens, self.min_new_tokens)
        check_type("sampling", self.sampling, SamplingArgs, "SamplingArgs")
        if many := [name for name, value in vars(self.sampling).items() if isinstance(value, (list, tuple))]:
            raise ValueError(f"A request has one value for each sampling setting, got a list for {many[0]}.")
        if not isinstance(self.stop, abc.Sequence) or not all(map(_is_tokens, self.stop)):
            raise ValueError(
                f"stop must be a list of stop sequences of at least one token, [[2], [5, 7]], got {shown(self.stop)}."
            )
        stop_texts(self.stop_texts)
        for name in ("prompt", "past"):
            tokens = getattr(self, name)
            check_type(name, tokens, (abc.Sequence, Tensor), "a list of token ids")
            if isinstance(tokens, Tensor) and tokens.dim() == 0:
                raise ValueError(f"{name} must be a list of token ids, got {shown(tokens)}.")
        if self.id is not None:
            check_count("id", self.id, 0, 2**63 - 1)
        if self.logprobs is not None:
            check_count("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        check_flag("prompt_logprobs", self.prompt_logprobs)

    @property
    def cache_tokens(self) -> int:
        """The most tokens that it puts into a cache: the last new token is never read."""
        return len(self.prompt) + self.max_new_tokens - 1


def _is_tokens(stop: Any) -> bool:
    if not isinstance(stop, abc.Sequence) or isinstance(stop, str) or not stop:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in stop)


@dataclass(eq=False)
class PromptGroup:
    """Sequences with the same prompt. `leader`: reads it; those that have a row by then get a copy of its row."""

    leader: Sequence


@dataclass(eq=False)
class Sequence:
    """The state of one request.

    Tokens that may be the start of a stop sequence are held back, because a stop sequence is never part of the answer.

    Attributes:
        request: The request; its id is `index`.
        stream: Decodes the tokens and finds stop texts; None if only tokens are wanted.
        row: The row of the cache; -1 while it waits for one.
        continues: Whether it continues after `past` tokens that its row already has.
        state: The cache of one row that it continues; None: its row is empty, or has what it continues.
        group: The sequences that share its prompt; None: it reads its prompt by itself.
        prompt: The prompt's token ids. `read`: how many of them were read.
        tokens: All tokens released so far. `new_tokens`: those of the last push. A stop text removes tokens that belong
            to it, even released ones.
        text: All text released so far. `new_text`: that of the last push.
        last: The last token pushed, released or not. No cache has read it yet. -1 before the first one.
        reason: Why it ended: "stop", "length", "abort", or "error" if a step failed or no token could
            be drawn; None while it runs.
        error: With "error", the message.
        remote: Whether another process answered it.
        prompt_scores: If asked for, of each token of the prompt but the first its log-probability and the most probable
            tokens in its place.
        start_time, first_token_time, end_time: Seconds (`time.perf_counter`) when it got a row, got its first token,
            and ended.
    """

    request: Request
    index: int = 0
    stream: TextStream | None = None
    row: int = -1
    continues: bool = False
    state: Any = None
    group: PromptGroup | None = None
    past: int = 0
    prompt: list[int] = field(default_factory=list)
    read: int = 0
    tokens: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    new_text: str = ""
    last: int = -1
    reason: str | None = None
    error: str | None = None
    start_time: float = 0.0
    first_token_time: float = 0.0
    end_time: float = 0.0
    remote: bool = False
    prompt_scores: list[tuple[float, Top]] = field(default_factory=list)
    _held: deque[int] = field(default_factory=deque)
    _logprobs: list[float] = field(default_factory=list)
    _tops: list[Top] = field(default_factory=list)
    _pieces: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        prompt = self.request.prompt
        self.prompt = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        self._stops = StopMatcher(self.request.stop)

    @property
    def answer(self) -> dict[str, Any]:
        """The result, to be copied to another process' sequence of the same request."""
        return {name: getattr(self, name) for name in ANSWER}

    @answer.setter
    def answer(self, values: abc.Mapping[str, Any]) -> None:
        for name in ANSWER:
            setattr(self, name, values[name])
        self.new_tokens, self.new_text, self.remote = list(self.tokens), self.text, True

    @property
    def text(self) -> str:
        """All text released so far."""
        self._pieces[:] = ["".join(self._pieces)]
        return self._pieces[0]

    @text.setter
    def text(self, text: str) -> None:
        self._pieces[:] = [text]

    @property
    def ready(self) -> bool:
        """Whether the whole prompt was read."""
        return self.read >= len(self.prompt)

    @property
    def num_generated(self) -> int:
        """The number of new tokens so far, including those that are held back."""
        return len(self.tokens) + len(self._held)

    @property
    def logprobs(self) -> list[float]:
        """The log-probability of each token in `tokens`, if the engine keeps them."""
        return self._logprobs[: len(self.tokens)]

    @property
    def top_logprobs(self) -> list[Top]:
        """The most probable tokens in place of each token in `tokens`, if the request asked for them."""
        return self._tops[: len(self.tokens)]

    def push(self, token: int, logprob: float | None = None, top: Top | None = None) -> list[int]:
        """Add the next token; return the tokens that now certainly belong to the answer."""
        self.last = token
        if logprob is not None:
            self._logprobs.append(logprob)
        if top is not None:
            self._tops.append(top)
        self._held.append(token)
        count = self.num_generated
        complete = [n for n in self._stops.push(token) if count - n >= self.request.min_new_tokens]
        keep = 0
        if complete:
            self.reason, keep = "stop", max(complete)
        elif count >= self.request.max_new_tokens:
            self.reason = "length"
        else:
            keep = self._stops.partial
        return self._release(len(self._held) - keep)

    def fail(self, error: str) -> None:
        """End the sequence with an error; earlier tokens stay."""
        self.reason, self.error = "error", error
        self._release(len(self._held))

    def _release(self, count: int) -> list[int]:
        self.new_tokens = [self._held.popleft() for _ in range(count)]
        if self.reason is not None:
            self._held.clear()
        self.tokens += self.new_tokens
        if self.stream is not None:
            self._decode(self.stream)
        return self.new_tokens

    def _decode(self, stream: TextStream) -> None:
        """Set `new_text`, and end the sequence if a stop text is complete."""
        before, new = len(self.tokens) - len(self.new_tokens), self.new_tokens
        early = max(0, self.request.min_new_tokens - before)  # so many of the new tokens come before min_new_tokens
        self.new_text = stream.push(new[:early], match_stops=False) if early and new else ""
        if new[early:] or self.reason:
            self.new_text += stream.push(new[early:], last=self.reason is not None)
        if self.new_text:
            self._pieces.append(self.new_text)
        if stream.stopped:  # keep the tokens whose text is completely before the stop text
            self.reason, self.error = "stop", None
            del self.tokens[stream.tokens_within(len(self.text)) :]
            self.new_tokens = self.tokens[before:]


@dataclass(slots=True)
class Output:
    """The new tokens of one request in one step.

    Attributes:
        id: The request's id.
        tokens, text: The newly released tokens and text; `text` is empty if the engine has no `decode_text`.
        finish_reason: "stop", "length" or "error" if the request ended in this step, else None.
        sequence: The whole answer so far.
    """

    id: int
    tokens: list[int]
    text: str
    finish_reason: str | None
    sequence: Sequence
