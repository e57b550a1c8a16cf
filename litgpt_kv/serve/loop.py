"""The thread that owns the engines: nothing else touches a model or a cache while the server runs.

Between two steps it takes requests, cancellations and questions from a queue; after each step it hands what was made to
the event loop of the HTTP side, in one call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.generate import Engine, Request
from litgpt_kv.generate import Sequence as Answer
from litgpt_kv.generate.request import Top
from litgpt_kv.serve.conversations import Conversations, KeptState, Messages
from litgpt_kv.serve.metrics import Metrics

T = TypeVar("T")
log = logging.getLogger("litgpt_kv.serve")
Scored = tuple[int, float | None, Top]  # a token, its log-probability, the most probable tokens at its place


class QueueFull(Exception):
    """No more answers may wait. `seconds`: after which a client should try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"The queue is full; try again in {seconds} s.")
        self.seconds = seconds


ENDING = "The server is ending."


@dataclass(frozen=True)
class Usage:
    """What an answer cost: tokens read and made; tokens that its row kept of those it saw; bytes of the row."""

    prompt: int
    new: int
    kept: int = 0
    seen: int = 0
    nbytes: int = 0
    reused: int = 0


@dataclass(frozen=True)
class Event:
    """What a step added to an answer.

    Attributes:
        number: Of the answer in its call. text: New text. tokens: New tokens with their scores, if asked for.
        reason, error, usage: Of the last event; `reason` is None before.
        prompt: Of the first event: the scores of the prompt's tokens but the first, if asked for.
    """

    number: int
    text: str = ""
    tokens: Sequence[Scored] = ()
    reason: str | None = None
    error: str | None = None
    usage: Usage | None = None
    prompt: Sequence[tuple[float, Top]] = ()


@dataclass(eq=False)
class Ticket:
    """One answer that is asked for, and where its events go.

    Attributes:
        cache: The name of the cache. request: For the engine. number: Of the answer in its call.
        events: Takes the events, on the event loop. received: When the request came (`time.perf_counter`).
        kept: The state that it goes on from. conversation, messages: Keep a state under this id at the end.
        sequence: The engine's answer, once it has it. sent: Tokens told of. last: When the last one was drawn.
        drawn: All tokens drawn; all but the last are in the cache.
    """

    cache: str
    request: Request
    number: int
    events: asyncio.Queue[Event]
    received: float
    kept: KeptState | None = None
    conversation: str | None = None
    messages: Messages = ()
    sequence: Answer | None = None
    sent: int = 0
    last: float = 0.0
    drawn: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Served:
    """An engine and the tickets that it works on, by the engine's ids."""

    engine: Engine
    cache: KVCache | None
    tickets: dict[int, Ticket] = field(default_factory=dict)
    row_bytes: int = 0


class EngineLoop:
    """Runs engines in a thread of its own.

    Args:
        engines: By the names of their caches; each with its cache.
        most_waiting: Answers that may wait for a row of each engine.
        metrics: Are filled. conversations: Take the states of turns that end.
    """

    def __init__(
        self,
        engines: Mapping[str, tuple[Engine, KVCache | None]],
        most_waiting: int,
        metrics: Metrics,
        conversations: Conversations,
    ) -> None:
        self.metrics, self.conversations, self.most_waiting = metrics, conversations, most_waiting
        self._served = {name: _Served(*pair) for name, pair in engines.items()}
        for name, served in self._served.items():
            size = 0 if served.cache is None else served.cache.allocated()["total"]
            served.row_bytes = size // served.engine.runner.size
            metrics.cache_bytes.labels(name).set(size)
            metrics.rows.labels(name).set(served.engine.runner.size)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open = dict.fromkeys(engines, 0)  # answers that wait or run
        self._lock = threading.Lock()
        self._seconds = 1.0  # that an answer takes, smoothed
        self._http: asyncio.AbstractEventLoop | None = None
        self._events: list[tuple[Ticket, Event]] = []
        self._thread = threading.Thread(target=self._run, name="litgpt_kv engine", daemon=True)

    # -- called by the HTTP side -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; what is made goes to the running event loop."""
        self._http = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End what runs, and the thread."""
        self._commands.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """Answers that wait or run."""
        return sum(self._open.values())

    def room(self, cache: str) -> int:
        """The most answers that one call can ever ask for."""
        return self._served[cache].engine.runner.size + self.most_waiting

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Take the answers of one call, all or none.

        Raises:
            QueueFull: If they may not all wait.
        """
        name = tickets[0].cache
        with self._lock:
            if self._open[name] + len(tickets) > self.room(name):
                rows = self._served[name].engine.runner.size
                raise QueueFull(max(1, min(600, round(self._seconds * self.most_waiting / rows))))
            self._open[name] += len(tickets)
        self._commands.put(lambda: self._add(tickets))

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Free the rows of tickets before the next step; they get no more events."""
        self._commands.put(lambda: self._cancel(tickets))

    def end_all(self) -> None:
        """End what waits or runs, with an error."""
        self._commands.put(self._end_all)

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do something between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self._commands.put(run)
        return future

    # -- called in the thread ----------------------------------------------------------------------------------------

    def served(self) -> dict[str, tuple[Engine, KVCache | None, dict[int, Ticket]]]:
        """The engines, their caches and tickets, for `call`."""
        return {name: (s.engine, s.cache, s.tickets) for name, s in self._served.items()}

    def _run(self) -> None:
        while self._take_commands():
            for served in self._served.values():
                if served.engine.unfinished:
                    try:
                        self._step(served)
                    except Exception as error:
                        self._failed(served, error)
            self._deliver()
        for served in self._served.values():
            self._cancel(list(served.tickets.values()))

    def _take_commands(self) -> bool:
        """Do what was asked for, waiting if nothing runs; returns False at the end."""
        idle = not any(served.engine.unfinished for served in self._served.values())
        while idle or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            try:
                command()
            except Exception:  # a fault of ours must not end the thread
                log.exception("A command failed.")
            idle = False
        return True

    def _add(self, tickets: Sequence[Ticket]) -> None:
        before: Ticket | None = None
        for ticket in tickets:
            served = self._served[ticket.cache]
            state = None if ticket.kept is None else ticket.kept.state
            try:
                id = served.engine.add(ticket.request, state=state, same_prompt_as=_twin(before, ticket))
            except Exception as error:  # was checked before; whatever is left is ours
                log.error("A request could not begin: %s", error)
                self._close(ticket, "error")
                self._events.append((ticket, Event(ticket.number, reason="error", error=str(error))))
                continue
            ticket.sequence = served.engine.sequence(id)
            served.tickets[id] = before = ticket
        self._deliver()

    def _cancel(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            served, sequence = self._served[ticket.cache], ticket.sequence
            if sequence is not None and served.tickets.pop(sequence.index, None) is not None:
                served.engine.abort(sequence.index)
                self._close(ticket, "abort")

    def _end_all(self) -> None:
        for ticket in [ticket for served in self._served.values() for ticket in served.tickets.values()]:
            self._cancel([ticket])
            self._events.append((ticket, Event(ticket.number, reason="error", error=ENDING)))
        self._deliver()

    def _close(self, ticket: Ticket, reason: str) -> None:
        with self._lock:
            self._open[ticket.cache] -= 1
        self.metrics.finished.labels(reason).inc()

    def _step(self, served: _Served) -> None:
        began, stats = time.perf_counter(), served.engine.stats
        read, made = stats.prompt_tokens, stats.new_tokens
        outputs = served.engine.step()
        now = time.perf_counter()
        self.metrics.step.observe(now - began)
        self.metrics.prompt_tokens.inc(stats.prompt_tokens - read)
        self.metrics.new_tokens.inc(stats.new_tokens - made)
        for output in outputs:
            ticket = served.tickets[output.id]
            if ticket.last:
                self.metrics.between.observe(now - ticket.last)
            else:
                self.metrics.first_token.observe(now - ticket.received)
            ticket.last = now
            ticket.drawn.append(output.sequence.last)
            if output.text or output.finish_reason is not None or ticket.request.logprobs is not None:
                self._events.append((ticket, self._event(served, ticket, output.text, output.finish_reason)))
            if output.finish_reason is not None:
                del served.tickets[output.id]
                self._close(ticket, output.finish_reason)
                self._seconds += 0.1 * (now - ticket.received - self._seconds)

    def _event(self, served: _Served, ticket: Ticket, text: str, reason: str | None) -> Event:
        sequence, request, number = ticket.sequence, ticket.request, ticket.number
        assert sequence is not None and sequence.stream is not None
        tokens: list[Scored] = []
        if request.logprobs is not None:  # a token is told of when all of its text is
            size = sequence.stream.tokens_within(len(sequence.text)) if request.stop_texts else len(sequence.tokens)
            size = min(size, len(sequence.tokens)) if reason is None else len(sequence.tokens)
            odds, tops = sequence.logprobs, sequence.top_logprobs or [[]] * size
            tokens = [(sequence.tokens[i], odds[i], tops[i]) for i in range(ticket.sent, size)]
            ticket.sent = max(size, ticket.sent)
        prompt = sequence.prompt_scores if len(ticket.drawn) == 1 else ()
        if reason is None:
            return Event(number, text, tokens, prompt=prompt)
        if reason == "error":
            return Event(number, text, tokens, reason, sequence.error)
        usage = self._usage(served, ticket, sequence)
        if ticket.conversation is not None:
            self._keep(served, ticket, sequence)
        return Event(number, text, tokens, reason, None, usage, prompt)

    def _usage(self, served: _Served, ticket: Ticket, sequence: Answer) -> Usage:
        size = len(sequence.prompt), len(sequence.tokens)
        if served.cache is None:
            return Usage(*size)
        tokens = served.cache.row(sequence.row).tokens()
        reused = 0 if ticket.kept is None else ticket.kept.seen
        return Usage(*size, tokens["kept"][0], tokens["seen"][0], served.row_bytes, reused)

    def _keep(self, served: _Served, ticket: Ticket, sequence: Answer) -> None:
        if served.row_bytes > self.conversations.limit:
            return
        state = served.engine.copy_of(sequence)
        before = () if ticket.kept is None else ticket.kept.text
        kept = KeptState(
            ticket.cache,
            (*ticket.messages, ("assistant", sequence.text)),
            state,
            sequence.last,
            (*before, *sequence.prompt, *ticket.drawn[:-1]),
            state.allocated()["total"],
            state.seen[0],
        )
        assert ticket.conversation is not None
        self.conversations.keep(ticket.conversation, kept)

    def _failed(self, served: _Served, error: Exception) -> None:
        """A step raised: the answers that took part end with an error, the others go on."""
        self.metrics.failed_steps.inc()
        log.error("A step failed: %s: %.300s", type(error).__name__, error)
        ended = [t for t in served.tickets.values() if t.sequence is not None and t.sequence.reason is not None]
        if not ended:  # what failed belongs to no answer: go on with new ones
            ended = list(served.tickets.values())
        for ticket in ended:
            sequence = ticket.sequence
            assert sequence is not None
            del served.tickets[sequence.index]
            served.engine.abort(sequence.index)
            self._close(ticket, "error")
            self._events.append((ticket, Event(ticket.number, reason="error", error="A step of the model failed.")))

    def _deliver(self) -> None:
        events, self._events = self._events, []
        if events and self._http is not None:
            try:
                self._http.call_soon_threadsafe(_hand_over, events)
            except RuntimeError:  # the event loop has ended: nobody listens
                log.debug("%d events had nowhere to go.", len(events))


def _twin(before: Ticket | None, ticket: Ticket) -> int | None:
    """The id of the answer before, if it is another one to the same prompt (`n`)."""
    if before is None or before.sequence is None or before.request.prompt is not ticket.request.prompt:
        return None
    return before.sequence.index


def _hand_over(events: Sequence[tuple[Ticket, Event]]) -> None:
    for ticket, event in events:
        ticket.events.put_nowait(event)


def row_state(cache: KVCache) -> dict[str, Any]:
    """What one row keeps: of each token of the text the share of heads, in all layers, that hold it (a device sync).

    Args:
        cache: Of one row.

    Returns:
        The tokens "seen", the most "kept" by any head, and "shares", one a token.
    """
    tokens = cache.tokens()
    seen = tokens["seen"][0]
    shares = torch.zeros(seen, dtype=torch.float64)
    for slots in cache.slots:
        sets = slots.pos.size(0) * slots.pos.size(2) * slots.heads  # that may hold a token
        held = slots.pos[slots.pos >= 0].cpu()
        shares += held.bincount(minlength=seen)[:seen] * len(slots.layers) / (len(cache.layers) * sets)
    return {"seen": seen, "kept": tokens["kept"][0], "shares": [round(share, 3) for share in shares.tolist()]}
