"""OpenAI's batch format: read lines with `custom_id` and `body`, write lines with `custom_id` and `response`.

Bodies for `/v1/chat/completions` (messages) and `/v1/completions` (prompt) are read. As in vLLM, the body may also have
settings that OpenAI does not know (`top_k`, `min_p`, `repetition_penalty`, `min_new_tokens`, ...).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litgpt_kv.config import shown
from litgpt_kv.llm.text_request import TextRequest

URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}
UNUSED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
ONLY: Mapping[str, tuple[Any, ...]] = {  # the supported values of these settings
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "logit_bias": ({},),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
}


@dataclass(frozen=True)
class BatchLine:
    """The fields of a batch line that its answer needs: `custom_id`, the model's name, and whether it is a chat."""

    custom_id: str
    model: str
    is_chat: bool


def is_batch_line(record: Any) -> bool:
    """Return whether a line is in OpenAI's batch format."""
    return isinstance(record, Mapping) and "body" in record


def read_batch_line(record: Mapping[str, Any], defaults: TextRequest) -> tuple[TextRequest, BatchLine]:
    """Read the request in a batch line; `defaults` has the settings that the line does not give.

    Raises:
        ValueError: If the line or its body is malformed, or has a setting that is not supported.
    """
    if unknown := sorted(record.keys() - {"custom_id", "method", "url", "body"}):
        raise ValueError(f"unknown {unknown[0]!r}; a line of a batch has custom_id, method, url and body")
    custom_id, body, url = record.get("custom_id"), record["body"], record.get("url")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id must be a text, got {shown(custom_id)}")
    if record.get("method", "POST") != "POST":
        raise ValueError(f"method must be POST, got {shown(record['method'])}")
    if not isinstance(body, Mapping):
        raise ValueError(f"body must be an object, got {shown(body)}")
    if url is not None and (not isinstance(url, str) or url not in URLS):
        raise ValueError(f"url must be one of {', '.join(URLS)}, got {shown(url)}")
    if url is not None and URLS[url] not in body:
        raise ValueError(f"the body of {url} needs {URLS[url]!r}")
    for name, allowed in ONLY.items():
        value = body.get(name)
        if value is not None and (value not in allowed or (isinstance(value, bool) and allowed[0] is not False)):
            raise ValueError(f"{name} must be {allowed[0]!r}, got {shown(value)}: other values are not supported")
    fields: dict[str, Any] = {"id": custom_id}
    for name, value in body.items():
        if value is None or name in ONLY or name in UNUSED:
            continue
        target = RENAMED.get(name, name)
        if target in fields:
            raise ValueError(f"{name!r} is given twice, under two names")
        fields[target] = value
    if isinstance(prompt := fields.get("prompt"), list):
        if len(prompt) != 1:
            raise ValueError(f"prompt must be one text, got a list of {len(prompt)}: write one line for each")
        fields["prompt"] = prompt[0]
    model = body.get("model")
    if not isinstance(model, (str, type(None))):
        raise ValueError(f"model must be a text, got {shown(model)}")
    return defaults.read(fields), BatchLine(custom_id, model or "", "messages" in fields)


def batch_answer(line: BatchLine, answer: Mapping[str, Any], number: str) -> dict[str, Any]:
    """Return the fields of OpenAI's batch answer.

    Args:
        line: The fields of the batch line.
        answer: Our answer, with `text`, `finish_reason`, `prompt_tokens` and `new_tokens`.
        number: A text that is different for each answer of the run, for its ids.
    """
    ids = {"id": f"batch_req_{number}", "custom_id": line.custom_id}
    if answer["finish_reason"] == "error":
        error = {"code": "server_error", "message": answer.get("error") or "The answer ended with an error."}
        return {**ids, "response": None, "error": error}
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": answer["finish_reason"]}
    text = answer["text"]
    choice |= {"message": {"role": "assistant", "content": text}} if line.is_chat else {"text": text}
    read, made = answer["prompt_tokens"], answer["new_tokens"]
    body = {
        "id": f"{'chatcmpl' if line.is_chat else 'cmpl'}-{number}",
        "object": "chat.completion" if line.is_chat else "text_completion",
        "created": int(time.time()),
        "model": line.model,
        "choices": [choice],
        "usage": {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made},
    }
    response = {"status_code": 200, "request_id": f"req_{number}", "body": body}
    return {**ids, "response": response, "error": None}
