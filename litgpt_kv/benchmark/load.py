"""Clients that send requests to a server and note when tokens come."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LONGEST_LINE = 2**24  # bytes


@dataclass
class Timing:
    """One request: seconds (`time.perf_counter`) when it was sent, had its first text and ended.

    Attributes:
        gaps: Seconds between two events with text. tokens: New tokens. text: Of the answer. status: HTTP status.
    """

    sent: float
    first: float = 0.0
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""
    status: int = 0


async def ask(url: str, body: dict[str, Any]) -> Timing:
    """Send one request and read its answer, a stream of events or a JSON object."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=LONGEST_LINE)
    try:
        data = json.dumps(body).encode()
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        timing = Timing(time.perf_counter())
        writer.write(head.encode() + data)
        timing.status = int((await reader.readline()).split()[1])
        while (line := await reader.readline()) not in (b"\r\n", b""):
            pass
        last, rest = 0.0, []
        while line := await reader.readline():
            now = time.perf_counter()
            if not line.startswith(b"data: {"):
                rest.append(line)
                continue
            event = json.loads(line[6:])
            text = event["choices"][0]["text"] if event.get("choices") else ""
            if text:
                timing.first = timing.first or now
                timing.gaps += [now - last] if last else []
                timing.text, last = timing.text + text, now
            timing.tokens = (event.get("usage") or {}).get("completion_tokens", timing.tokens)
        timing.ended = time.perf_counter()
        if not timing.first:  # no stream: everything came at once
            found = json.loads(next((line for line in rest if line.startswith(b"{")), b"{}"))
            timing.first, timing.text = timing.ended, str(found.get("output", ""))
        return timing
    finally:
        writer.close()


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
