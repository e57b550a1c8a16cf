"""What the bodies of requests may say: OpenAI's fields that are supported, and ours.

A field that is not here is refused by its name; so is one of OpenAI's that asks for what is not there.
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from litgpt_kv.config import SamplingArgs

B = TypeVar("B", bound="Body")
MOST_STOPS = 16

UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # OpenAI's fields that are not supported: the values that ask for nothing
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "logit_bias": ({},),
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


class Refused(Exception):
    """A request that gets an error: its HTTP status, and the field that is at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    """A body without unknown fields; null is as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @classmethod
    def read(cls: type[B], data: bytes) -> B:
        """The body in some bytes.

        Raises:
            Refused: With the name of the field that is at fault.
        """
        try:
            values = json.loads(data.decode("utf-8"), parse_constant=_no_number)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(f"The body is no JSON: {error}") from error
        except ValueError as error:  # Python reads whole numbers of at most some thousand digits
            raise Refused("The body has a number with too many digits.") from error
        if not isinstance(values, dict):
            raise Refused("The body must be a JSON object.")
        known = {*cls.model_fields, *UNSUPPORTED}
        values = {name: value for name, value in values.items() if value is not None or name not in known}
        for name, neutral in UNSUPPORTED.items():
            if name in values and name not in cls.model_fields:
                if values[name] not in neutral:
                    raise Refused(f"{name} is not supported here.", name)
                del values[name]
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _refused(error) from error


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False  # random padding of OpenAI's: there is none here


def scalar(hint: Any) -> Any:
    """The type of one value, of a setting that may also have one a row."""
    return next(kind for kind in (float, int, bool, str) if kind in (hint, *get_args(hint)))


HINTS = get_type_hints(SamplingArgs)  # a new field is a field of requests, too
Sampling = create_model("Sampling", __base__=Body, **{name: (scalar(HINTS[name]) | None, None) for name in HINTS})


class Sampled(Sampling):  # type: ignore[valid-type,misc]
    """What both kinds of completions take. Without a value, the server's own setting counts."""

    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    kv_cache: str | None = None
    # allowed, and of no effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool = False
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None  # openai's client sends what it got
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """All parts together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Sampled):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    conversation: str | None = None


class CompletionBody(Sampled):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None


class TokenizeBody(Body):
    """`POST /tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[int]


def _no_number(name: str) -> None:
    raise Refused(f"The body is no JSON: {name} is no number.")


def _refused(error: ValidationError) -> Refused:
    """The first field at fault, in plain words."""
    found = error.errors(include_url=False)
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    where = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    name = str(first["loc"][0])[:100]
    if first["type"] == "extra_forbidden":
        return Refused(f"Unknown field {where[:100]!r}.", name, code="unknown_parameter")
    if first["type"] == "missing":
        return Refused(f"{where} is missing.", name, code="missing_required_parameter")
    value = repr(first.get("input"))
    return Refused(f"{where[:100]}: {first['msg'][:200]}, got {value[:60]}.", name)


def _is_branch(part: Any) -> bool:
    """Whether a part of a place is pydantic's name for a branch of a union."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)
