"""Clients that send requests to a server and note when tokens come."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PART = 2**16  # bytes that are read at a time
SHOWN = 200  # characters of an error


@dataclass
class Timing:
    """One request: seconds (`time.perf_counter`) when it was sent and ended, and when text came.

    Attributes:
        times: Of each event with text. tokens: New tokens; None if the server does not say. text: Of the answer.
        status: HTTP status; 0 if there was none. error: Why there is no answer.
    """

    sent: float
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: int | None = None
    text: str = ""
    status: int = 0
    error: str = ""

    @property
    def first(self) -> float:
        """When the first text came."""
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds between two events with text."""
        return [after - before for before, after in zip(self.times, self.times[1:])]

    @property
    def good(self) -> bool:
        """Whether there is an answer."""
        return self.status == 200 and not self.error and bool(self.times)

    def note(self, line: bytes, now: float) -> None:
        """Take a line of an answer: an event of OpenAI's streams, or an object of litgpt's server."""
        found = json.loads(line.removeprefix(b"data: "))
        if (error := found.get("error")) is not None:
            self.error = str(error.get("message", error) if isinstance(error, dict) else error)[:SHOWN]
        choices = found.get("choices") or [{}]
        if text := found.get("output") or choices[0].get("text"):
            self.text += text
            self.times.append(now)
        self.tokens = (found.get("usage") or {}).get("completion_tokens", self.tokens)


async def ask(url: str, body: dict[str, Any]) -> Timing:
    """Send one request and read its answer, a stream of events or of JSON objects."""
    timing = Timing(time.perf_counter())
    try:
        await _ask(url, body, timing)
    except (OSError, EOFError, ValueError, IndexError) as error:
        timing.error = f"{type(error).__name__} {error}".strip()[:SHOWN]
    timing.ended = time.perf_counter()
    if not timing.times and not timing.error:
        timing.error = f"status {timing.status}, no text"
    return timing


async def _ask(url: str, body: dict[str, Any], timing: Timing) -> None:
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        data = json.dumps(body).encode()
        head = f"POST {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        timing.status = int((await reader.readline()).split()[1])
        is_chunked, rest = False, b""
        while (line := await reader.readline()) not in (b"\r\n", b""):
            is_chunked = is_chunked or line.lower().split() == [b"transfer-encoding:", b"chunked"]
        async for part in _parts(reader, is_chunked):
            now = time.perf_counter()
            if timing.status != 200:
                rest += part
                continue
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith((b"data: {", b"{")):
                    timing.note(line, now)
        if timing.status != 200:
            timing.error = f"status {timing.status}: {rest.decode(errors='replace')[:SHOWN]}"
        elif rest.startswith(b"{"):
            timing.note(rest, time.perf_counter())
    finally:
        writer.close()


async def _parts(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    """The body of an answer as it comes."""
    while not is_chunked and (part := await reader.read(PART)):
        yield part
    while is_chunked and (size := int((await reader.readline()).split(b";")[0], 16)):
        yield (await reader.readexactly(size + 2))[:-2]


async def run(url: str, bodies: Sequence[dict[str, Any]], clients: int, rate: float | None, seed: int) -> list[Timing]:
    """Send all requests: `clients` at a time, or at random times (Poisson), on average `rate` a second."""
    if rate is None:
        slots = asyncio.Semaphore(clients)

        async def in_turn(body: dict[str, Any]) -> Timing:
            async with slots:
                return await ask(url, body)

        return list(await asyncio.gather(*map(in_turn, bodies)))
    rng, at, tasks = random.Random(seed), time.perf_counter(), []
    for body in bodies:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(url, body)))
        at += rng.expovariate(rate)
    return list(await asyncio.gather(*tasks))


def busy_gaps(timings: Sequence[Timing], rows: int) -> list[float]:
    """The seconds between two events of an answer, all through which at least `rows` answers were being made.

    An answer is made from its first to its last event, so that a prompt that is read counts for nothing.
    """
    changes = sorted(change for t in timings if t.gaps for change in ((t.times[0], 1), (t.times[-1], -1)))
    spans: list[tuple[float, float]] = []  # in which at least `rows` are made
    made, began = 0, 0.0
    for at, change in changes:
        if made < rows <= made + change:
            began = at
        elif made + change < rows <= made:
            spans.append((began, at))
        made += change
    gaps, span = [], 0
    for before, after in sorted(pair for t in timings for pair in zip(t.times, t.times[1:])):
        while span < len(spans) and spans[span][1] <= before:
            span += 1
        if span < len(spans) and spans[span][0] <= before and after <= spans[span][1]:
            gaps.append(after - before)
    return gaps
