"""What is asked for a prompt (`Request`), its answer so far (`Sequence`), what one step added to it (`Output`)."""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from litgpt_kv.arguments import check_count, check_flag, check_new_tokens
from litgpt_kv.config import SamplingArgs, check_type, shown
from litgpt_kv.generate.stopping import StopMatcher
from litgpt_kv.generate.text import TextStream, stop_texts

ANSWER = ("tokens", "text", "reason", "error", "began", "first", "ended", "_logprobs", "_tops")
MOST_LOGPROBS = 100  # alternatives of a token
Top = list[tuple[int, float]]  # the most probable tokens at a place, and their log-probabilities, best first


@dataclass(frozen=True)
class Request:
    """A prompt and what is asked for it.

    Args:
        prompt: Token ids, 1-D.
        max_new_tokens: The most new tokens.
        min_new_tokens: A stop sequence or stop text only counts after so many new tokens.
        sampling: How tokens are chosen; one value each.
        stop: Token sequences that end the answer; they are not part of it.
        stop_texts: Texts that end the answer, where it is made into text; they are not part of it.
        past: Tokens that the cache has before the prompt, for the repetition penalty.
        id: Its number, which must not be in use; None: the next one of the engine.
        logprobs: Keep the log-probability of every new token, and so many of the most probable tokens at its place;
            None: as the engine does.
        prompt_logprobs: Keep the same of the prompt's tokens, as the cache gives them while it reads the prompt; that
            costs a second pass over what a prompt's first pass reads.
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
            raise ValueError(f"A request has one value of each sampling setting, got a list for {many[0]}.")
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
    def sees(self) -> int:
        """The most tokens that a cache has to take for it; the last new one is never read."""
        return len(self.prompt) + self.max_new_tokens - 1


def _is_tokens(stop: Any) -> bool:
    if not isinstance(stop, abc.Sequence) or isinstance(stop, str) or not stop:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in stop)


@dataclass(eq=False)
class Sequence:
    """One request's answer so far. Holds back tokens that may turn out to begin a stop sequence, which is never shown.

    Attributes:
        request: What it answers, number `index` of its engine.
        stream: Makes its text and finds stop texts in it; None where only tokens are wanted.
        row: Of the cache; -1 while it waits for one.
        continues: Whether it goes on with what its row holds, `past` tokens.
        state: What its row holds when it begins, a cache of one row; None: nothing, or what the row has.
        prompt: The prompt's token ids; `read` of them were read.
        tokens: All tokens released so far, and `new` those of the last push. A stop text takes back the tokens in which
            it began; the text itself is held back until it is certain.
        text: All text released so far, and `piece` that of the last push.
        last: The last token pushed, shown or not; it is the one that no cache has read yet.
        reason: Why it ended: "stop", "length", "abort", or "error" if no token could be drawn; None while it runs.
        error: With "error", what was wrong.
        elsewhere: Whether another process answered it.
        prompt_scores: If asked for, of each token of the prompt but the first its log-probability and the most probable
            tokens at its place.
        began, first, ended: Seconds (`time.perf_counter`) when it was admitted, had its first token, and ended.
    """

    request: Request
    index: int = 0
    stream: TextStream | None = None
    row: int = -1
    continues: bool = False
    state: Any = None
    past: int = 0
    prompt: list[int] = field(default_factory=list)
    read: int = 0
    tokens: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    piece: str = ""
    last: int = -1
    reason: str | None = None
    error: str | None = None
    began: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    elsewhere: bool = False
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
        """What it came to, for another process' sequence of the same request."""
        return {name: getattr(self, name) for name in ANSWER}

    @answer.setter
    def answer(self, values: abc.Mapping[str, Any]) -> None:
        for name in ANSWER:
            setattr(self, name, values[name])
        self.new, self.piece, self.elsewhere = list(self.tokens), self.text, True

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
        """Whether its whole prompt was read."""
        return self.read >= len(self.prompt)

    @property
    def made(self) -> int:
        """New tokens so far, those that are held back too."""
        return len(self.tokens) + len(self._held)

    @property
    def logprobs(self) -> list[float]:
        """Of each token in `tokens` its log-probability, if it was asked for."""
        return self._logprobs[: len(self.tokens)]

    @property
    def top_logprobs(self) -> list[Top]:
        """Of each token in `tokens` the most probable ones at its place, if they were asked for."""
        return self._tops[: len(self.tokens)]

    def push(self, token: int, logprob: float | None = None, top: Top | None = None) -> list[int]:
        """Takes the next token; returns those that are now certain to belong to the output."""
        self.last = token
        if logprob is not None:
            self._logprobs.append(logprob)
        if top is not None:
            self._tops.append(top)
        self._held.append(token)
        made = self.made
        complete = [n for n in self._stops.push(token) if made - n >= self.request.min_new_tokens]
        keep = 0
        if complete:
            self.reason, keep = "stop", max(complete)
        elif made >= self.request.max_new_tokens:
            self.reason = "length"
        else:
            keep = self._stops.begun
        return self._release(len(self._held) - keep)

    def fail(self, error: str) -> None:
        """Ends it: no token can be drawn. What was made before stays."""
        self.reason, self.error = "error", error
        self._release(len(self._held))

    def _release(self, count: int) -> list[int]:
        self.new = [self._held.popleft() for _ in range(count)]
        if self.reason is not None:
            self._held.clear()
        self.tokens += self.new
        if self.stream is not None:
            self._read_text(self.stream)
        return self.new

    def _read_text(self, stream: TextStream) -> None:
        before = len(self.tokens) - len(self.new)
        free = max(0, self.request.min_new_tokens - before)
        self.piece = stream.push(self.new[:free], watch=False) if free and self.new else ""
        if self.new[free:] or self.reason:
            self.piece += stream.push(self.new[free:], last=self.reason is not None)
        if self.piece:
            self._pieces.append(self.piece)
        if stream.stopped:  # of the tokens stay those whose text lies wholly before the stop
            self.reason, self.error = "stop", None
            del self.tokens[stream.tokens_within(len(self.text)) :]
            self.new = self.tokens[before:]


@dataclass(slots=True)
class Output:
    """What one step added to an answer.

    Attributes:
        id: Of the request.
        tokens, text: What is now certain and was not before; `text` needs an engine that decodes.
        finish_reason: "stop", "length" or "error" if this was its last step, else None.
        sequence: All of the answer so far.
    """

    id: int
    tokens: list[int]
    text: str
    finish_reason: str | None
    sequence: Sequence
