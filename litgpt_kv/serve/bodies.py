"""What answers look like: OpenAI's objects, whole and in pieces."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from litgpt_kv.generate.request import Top
from litgpt_kv.serve.asked import Asked
from litgpt_kv.serve.loop import Event, Scored, Usage

Decode = Callable[[Sequence[int]], str]


class Bodies:
    """Makes the JSON of one call's answers.

    Args:
        asked: What was asked for. is_chat: Whether it was a chat. model: The model's name. decode: Token ids to text.
        with_usage: Whether a stream ends with the usage.

    Attributes:
        id: Of the call.
    """

    def __init__(self, asked: Asked, is_chat: bool, model: str, decode: Decode, with_usage: bool = False) -> None:
        self.asked, self.is_chat, self.decode, self.with_usage = asked, is_chat, decode, with_usage
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        kind = ("chat.completion" if is_chat else "text_completion", "chat.completion.chunk" if is_chat else None)
        self.head = {"id": self.id, "object": kind[0], "created": int(time.time()), "model": model}
        head = json.dumps({**self.head, "object": kind[1] or kind[0]})
        self._before, self._after = f'data: {head[:-1]}, "choices": [', "]}\n\n"
        if with_usage:
            self._after = '], "usage": null}\n\n'
        self._offsets: dict[int, int] = {}  # characters of each answer that logprobs were given for
        self._begun: set[int] = set()

    # -- whole -------------------------------------------------------------------------------------------------------

    def whole(self, events: Mapping[int, Sequence[Event]]) -> dict[str, Any]:
        """The answer to a call, from the events of each of its answers."""
        choices = [self._choice(number, list(own)) for number, own in sorted(events.items())]
        return {**self.head, "choices": choices, "usage": self.usage([own[-1].usage for own in events.values()])}

    def _choice(self, number: int, events: list[Event]) -> dict[str, Any]:
        new = self.asked.new_tokens
        text = "".join(event.text for event in events) if new else ""
        tokens = [scored for event in events for scored in event.tokens] if new else []
        prompt = next((event.prompt for event in events if event.prompt), ())
        choice: dict[str, Any] = {"index": number, "finish_reason": events[-1].reason}
        choice["logprobs"] = self._logprobs(number, tokens, prompt, first=True)
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = self._echoed(number) + text
        return choice

    def usage(self, usages: Sequence[Usage | None]) -> dict[str, Any]:
        """What a call cost; `kv` sums over its answers."""
        known = [usage for usage in usages if usage is not None]
        read = self.asked.prompt_tokens
        made = sum(usage.new for usage in known) if self.asked.new_tokens else 0
        kv = {"cache": self.asked.cache}
        for name, field in (("kept", "kept"), ("seen", "seen"), ("bytes", "nbytes"), ("reused", "reused")):
            kv[name] = sum(getattr(usage, field) for usage in known)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made, "kv": kv}

    # -- in pieces ---------------------------------------------------------------------------------------------------

    def pieces(self, events: Sequence[Event]) -> bytes:
        """Some events as server-sent events; those of one answer come in one piece."""
        out, by_number = [], {}
        for event in events:
            by_number.setdefault(event.number, []).append(event)
        for number, own in by_number.items():
            out += self._piece(number, own)
        return "".join(out).encode()

    def _piece(self, number: int, events: list[Event]) -> list[str]:
        out, new = [], self.asked.new_tokens
        first = number not in self._begun
        self._begun.add(number)
        if first and self.is_chat:
            out.append(self._chunk(number, '"delta": {"role": "assistant", "content": ""}'))
        text = "".join(event.text for event in events) if new else ""
        text = self._echoed(number) + text if first and not self.is_chat else text
        tokens = [scored for event in events for scored in event.tokens] if new else []
        prompt = next((event.prompt for event in events if event.prompt), ())
        logprobs = self._logprobs(number, tokens, prompt, first)
        if text or tokens or prompt:
            said = json.dumps(text)
            out.append(
                self._chunk(number, f'"delta": {{"content": {said}}}' if self.is_chat else f'"text": {said}', logprobs)
            )
        if (reason := events[-1].reason) is not None:
            out.append(self._chunk(number, '"delta": {}' if self.is_chat else '"text": ""', None, reason))
        return out

    def _chunk(self, number: int, said: str, logprobs: Any = None, reason: str | None = None) -> str:
        odds = "null" if logprobs is None else json.dumps(logprobs)
        why = "null" if reason is None else f'"{reason}"'
        return f'{self._before}{{"index": {number}, {said}, "logprobs": {odds}, "finish_reason": {why}}}{self._after}'

    def end(self, usages: Sequence[Usage | None]) -> bytes:
        """What a stream ends with."""
        if not self.with_usage:
            return b"data: [DONE]\n\n"
        usage = json.dumps(self.usage(usages))
        return f'{self._before}], "usage": {usage}}}\n\ndata: [DONE]\n\n'.encode()

    # -- both --------------------------------------------------------------------------------------------------------

    def _prompt(self, number: int) -> list[int]:
        return list(self.asked.requests[number].prompt)

    def _echoed(self, number: int) -> str:
        return self.decode(self._prompt(number)) if self.asked.echo else ""

    def _logprobs(self, number: int, tokens: list[Scored], prompt: Sequence[tuple[float, Top]], first: bool) -> Any:
        if self.asked.requests[number].logprobs is None:
            return None
        if self.is_chat:
            return {"content": [self._chat_token(*scored) for scored in tokens], "refusal": None}
        before: list[Any] = []
        if first and self.asked.echo:
            ids = self._prompt(number)
            before = [(ids[0], None, None), *((id, odds, top) for id, (odds, top) in zip(ids[1:], prompt))]
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for id, odds, top in [*before, *tokens]:
            text = self.decode([id])
            out["tokens"].append(text)
            out["token_logprobs"].append(odds)
            out["top_logprobs"].append(None if odds is None else self._by_text(id, odds, top))
            at = self._offsets.get(number, 0)
            out["text_offset"].append(at)
            self._offsets[number] = at + len(text)
        return out

    def _by_text(self, id: int, odds: float, top: Top) -> dict[str, float]:
        """Log-probabilities by the tokens' texts, the token's own too; of tokens with one text the likeliest counts."""
        found: dict[str, float] = {}
        for other, value in [*top, (id, odds)]:
            found.setdefault(self.decode([other]), value)
        return found

    def _chat_token(self, id: int, odds: float | None, top: Top) -> dict[str, Any]:
        tops = [self._one_token(other, value) for other, value in top]
        return {**self._one_token(id, odds), "top_logprobs": tops}

    def _one_token(self, id: int, odds: float | None) -> dict[str, Any]:
        text = self.decode([id])
        return {"token": text, "logprob": odds, "bytes": list(text.encode())}
