"""A request for one text: the schema of prompt files, chat and the server.

A record is flat JSON, `{"prompt": ..., "max_new_tokens": 9, "temperature": 0}`: its keys are the fields of
`TextRequest`, `StoppingArgs` and `SamplingArgs`. A new field of one of these is a new key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from litgpt_kv.arguments import StoppingArgs
from litgpt_kv.config import SamplingArgs, shown
from litgpt_kv.registry import did_you_mean

STOPPING = [f.name for f in fields(StoppingArgs)]
SAMPLING = [f.name for f in fields(SamplingArgs)]
NULL_IS_A_VALUE = ("top_k",)  # null means the default, except for top_k, where it means all tokens


@dataclass(frozen=True)
class TextRequest:
    """A prompt and its settings.

    Args:
        prompt: The text to continue. A request without a prompt has the default settings of other requests.
        messages: A conversation instead of a prompt: mappings of "role" (system, user, assistant) and "content".
        id: The caller's id for it.
        sys_prompt: The system prompt; refused where the prompt style has no place for one.
        stopping: When the text ends.
        sampling: How its tokens are chosen; each setting has one value.
    """

    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    id: str | int | None = None
    sys_prompt: str | None = None
    stopping: StoppingArgs = field(default_factory=StoppingArgs)
    sampling: SamplingArgs = field(default_factory=SamplingArgs)

    def __post_init__(self) -> None:
        for name in ("prompt", "sys_prompt"):
            value = getattr(self, name)
            if value is not None:
                check_text(name, value)
        if isinstance(self.id, bool) or not isinstance(self.id, (str, int, type(None))):
            raise ValueError(f"id must be a text or a whole number, got {shown(self.id)}.")
        if isinstance(self.id, str):
            check_text("id", self.id)
        if self.messages is not None:
            _check_messages(self.messages)
        for text in self.stopping.stops:
            check_text("stop", text)
        if many := [name for name in SAMPLING if isinstance(getattr(self.sampling, name), (list, tuple))]:
            raise ValueError(f"{many[0]} must be one value, got {shown(getattr(self.sampling, many[0]))}.")

    def read(self, record: Any) -> TextRequest:
        """Return the request in a record; this request has the settings that the record does not give.

        Raises:
            ValueError: If the record is not a mapping, has an unknown key or no prompt, or a value is out of range.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"it must be an object with a prompt, got {shown(record)}")
        known = [*OWN, *STOPPING, *SAMPLING]
        if unknown := [name for name in record if name not in known]:
            hint = did_you_mean(unknown[0], known)
            raise ValueError(f"unknown {', '.join(map(shown, unknown))}.{hint} A request may have {', '.join(known)}")
        given = {name: value for name, value in record.items() if value is not None or name in NULL_IS_A_VALUE}
        if not given.get("prompt") and not given.get("messages"):
            raise ValueError("it has no prompt")
        if given.get("prompt") and given.get("messages"):
            raise ValueError("it has both prompt and messages: give one of them")
        if isinstance(given.get("messages"), list):
            given["messages"] = tuple(given["messages"])
        return replace(
            self,
            **{name: value for name, value in given.items() if name in OWN},
            stopping=replace(self.stopping, **{k: v for k, v in given.items() if k in STOPPING}),
            sampling=replace(self.sampling, **{k: v for k, v in given.items() if k in SAMPLING}),
        )

    def sample(self, number: int) -> TextRequest:
        """Return the request for sample `number`, from 0: the same with seed + number."""
        return replace(self, sampling=self.sampling.shifted(number)) if number else self


OWN = [f.name for f in fields(TextRequest) if f.name not in ("stopping", "sampling")]
ROLES = ("system", "developer", "user", "assistant")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, tuple) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {shown(messages)}.")
    for message in messages:
        if not isinstance(message, Mapping) or set(message) - {"name"} != {"role", "content"}:
            raise ValueError(f"a message has 'role' and 'content', got {shown(message)}.")
        if message["role"] not in ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {shown(message['role'])}.")
        check_text("a message's content", message["content"])
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message must be the user's, got {shown(messages[-1]['role'])}.")


def check_text(name: str, value: Any) -> None:
    """Check that a value is text that can be encoded.

    Raises:
        TypeError: If it is not a str.
        ValueError: If it has half of a surrogate pair, which cannot be encoded.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {shown(value)}.")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name} {shown(value)} has half of a surrogate pair, which is not valid text.")
