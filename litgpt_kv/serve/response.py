"""One call's answers on their way to the client, whole or as a stream; a client that leaves ends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from litgpt_kv.serve.bodies import Bodies
from litgpt_kv.serve.loop import ENDING, EngineLoop, Event, Ticket, Usage
from litgpt_kv.serve.schemas import Refused

LEFT = Event(-1, reason="abort")
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientLeft(Exception):
    """The client closed its connection."""


class AnswerResponse(Response):
    """Sends the answers of one call.

    Args:
        loop: Makes them. tickets: Of this call, submitted already. bodies: Make the JSON. is_stream: Send server-sent
            events as the tokens come.
    """

    def __init__(self, loop: EngineLoop, tickets: Sequence[Ticket], bodies: Bodies, is_stream: bool) -> None:
        super().__init__()
        self.loop, self.tickets, self.bodies, self.is_stream = loop, tickets, bodies, is_stream
        self.events = tickets[0].events
        self.ended: dict[int, Event] = {}  # the last event of each answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        about = scope.setdefault("litgpt_kv", {})
        about["id"] = self.bodies.id
        try:
            await (self._stream(send) if self.is_stream else self._whole(send))
        except ClientLeft:
            about["left"] = True
        finally:
            watcher.cancel()
            if running := [ticket for ticket in self.tickets if ticket.number not in self.ended]:
                self.loop.cancel(running)
            about["tickets"], about["ended"] = self.tickets, self.ended

    async def _watch(self, receive: Receive) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await receive())["type"] != "http.disconnect":
                pass
            self.loop.cancel(self.tickets)
            self.events.put_nowait(LEFT)

    async def _next(self) -> list[Event]:
        """All events that are there, at least one."""
        events = [await self.events.get()]
        while not self.events.empty():
            events.append(self.events.get_nowait())
        for event in events:
            if event is LEFT:
                raise ClientLeft
            if event.reason is not None:
                self.ended[event.number] = event
        return events

    @property
    def _usages(self) -> list[Usage | None]:
        return [event.usage for event in self.ended.values()]

    @property
    def _error(self) -> Refused | None:
        error = next((event.error for event in self.ended.values() if event.reason == "error"), None)
        return None if error is None else Refused(error, status=503 if error == ENDING else 500, code="server_error")

    async def _whole(self, send: Send) -> None:
        events: dict[int, list[Event]] = {ticket.number: [] for ticket in self.tickets}
        while len(self.ended) < len(self.tickets) and self._error is None:
            for event in await self._next():
                events[event.number].append(event)
        await (send_json(send, self.bodies.whole(events)) if self._error is None else send_error(send, self._error))

    async def _stream(self, send: Send) -> None:
        events = await self._next()
        if self._error is not None:  # nothing was sent yet: the status can say it
            await send_error(send, self._error)
            return
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        while True:
            done = len(self.ended) == len(self.tickets)
            data = self.bodies.pieces(events) if self._error is None else b""
            if self._error is not None:
                data += f"data: {json.dumps(self._error.body)}\n\n".encode()
            elif done:
                data += self.bodies.end(self._usages)
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if done or self._error is not None:
                await send({"type": "http.response.body", "body": b""})
                return
            events = await self._next()


async def send_json(send: Send, body: Any, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Send a JSON body."""
    data = json.dumps(body).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": about})
    await send({"type": "http.response.body", "body": data})


async def send_error(send: Send, error: Refused) -> None:
    """Send an error in OpenAI's form."""
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send_json(send, error.body, error.status, headers)
