"""`GeneratedText`: the text of an answer, which also has its tokens and their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable


class GeneratedText(str):
    """The text of an answer.

    Attributes:
        tokens: The ids of its tokens, without the stop sequence.
        logprobs: With `logprobs=True`, the log-probability of each token under the model's own distribution, before
            temperature and all other settings; else empty.
        finish_reason: "stop" or "length".
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None

    def __new__(
        cls,
        text: str,
        tokens: Iterable[int] = (),
        logprobs: Iterable[float] = (),
        finish_reason: str | None = None,
    ) -> GeneratedText:
        made = super().__new__(cls, text)
        made.tokens, made.logprobs, made.finish_reason = list(tokens), list(logprobs), finish_reason
        return made
