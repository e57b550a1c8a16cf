"""The endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from litgpt_kv.llm.beginning import encode_later
from litgpt_kv.llm.llm import LLM
from litgpt_kv.serve.asked import Asked, Reader
from litgpt_kv.serve.bodies import Bodies
from litgpt_kv.serve.conversations import Conversations
from litgpt_kv.serve.loop import EngineLoop, QueueFull, Ticket, row_state
from litgpt_kv.serve.metrics import Metrics
from litgpt_kv.serve.response import AnswerResponse
from litgpt_kv.serve.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, Refused, Sampled, TokenizeBody
from litgpt_kv.serve.settings import ServeArgs

B = TypeVar("B", bound=Body)
PAGE = "page.html"
SMALL = 4096  # bytes of a body that is read into tokens without a thread of its own
ANSWER_SECONDS = 10.0  # that a question to the engine's thread may take
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


@dataclass
class Service:
    """What the endpoints share.

    Attributes:
        running: The tickets of calls that run, by the calls' ids.
    """

    llm: LLM
    loop: EngineLoop
    reader: Reader
    conversations: Conversations
    metrics: Metrics
    settings: ServeArgs
    name: str
    running: dict[str, list[Ticket]] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))


def build_app(service: Service) -> FastAPI:
    """The endpoints over a service, whose engines run as long as the app does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.loop.start()
        yield
        await asyncio.to_thread(service.loop.stop)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_query)
    app.add_exception_handler(ClientDisconnect, _on_left)
    app.add_exception_handler(Exception, _on_fault)
    _add_completions(app, service)
    _add_tokens(app, service)
    _add_looks(app, service)
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: HttpRequest) -> Response:
        return await _answer(service, request, ChatBody, service.reader.chat)

    @app.post("/v1/completions")
    async def completions(request: HttpRequest) -> Response:
        return await _answer(service, request, CompletionBody, service.reader.completion)


async def _answer(service: Service, request: HttpRequest, kind: type[Any], read: Callable[[Any], Asked]) -> Response:
    received = time.perf_counter()

    def prepare(data: bytes) -> tuple[Any, Asked]:
        body = kind.read(data)
        _check_model(service, body)
        return body, read(body)

    data = await read_body(request, service.settings)
    body, asked = prepare(data) if len(data) < SMALL else await asyncio.to_thread(prepare, data)
    events: asyncio.Queue[Any] = asyncio.Queue()
    extra = dict(kept=asked.kept, conversation=asked.conversation, messages=asked.messages)
    tickets = [
        Ticket(asked.cache, engine_request, number, events, received, **extra)
        for number, engine_request in enumerate(asked.requests)
    ]
    try:
        service.loop.submit(tickets)
    except QueueFull as error:
        refused = Refused(str(error), status=429, code="queue_full")
        refused.headers["Retry-After"] = str(error.seconds)
        raise refused from error
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    bodies = Bodies(asked, kind is ChatBody, service.name, service.llm.decode, with_usage)
    return _Registered(service, tickets, bodies, body.stream)


class _Registered(AnswerResponse):
    """A response that can be asked about while it runs."""

    def __init__(self, service: Service, tickets: list[Ticket], bodies: Bodies, is_stream: bool) -> None:
        super().__init__(service.loop, tickets, bodies, is_stream)
        self.service = service
        service.running[bodies.id] = tickets

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.service.running.pop(self.bodies.id, None)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(request: HttpRequest) -> dict[str, Any]:
        data = await read_body(request, service.settings)
        tokens = await asyncio.to_thread(_tokens, service, data)
        longest = next(iter(service.reader.limits.values())).limit
        return {"count": len(tokens), "max_model_len": longest, "tokens": tokens}

    @app.post("/detokenize")
    async def detokenize(request: HttpRequest) -> dict[str, str]:
        body = DetokenizeBody.read(await read_body(request, service.settings))
        _check_model(service, body)
        size = next(iter(service.reader.limits.values())).vocabulary
        if not all(0 <= token < size for token in body.tokens):
            raise Refused(f"tokens must be 0 to {size - 1}.", "tokens")
        return {"prompt": await asyncio.to_thread(service.llm.decode, body.tokens)}


def _tokens(service: Service, data: bytes) -> list[int]:
    body = TokenizeBody.read(data)
    _check_model(service, body)
    if (body.prompt is None) == (body.messages is None):
        raise Refused("Give either prompt or messages.", "prompt")
    if body.messages is not None:
        return service.reader.chat_tokens(body.messages)
    if not body.add_special_tokens:
        return encode_later(service.llm.tokenizer, body.prompt or "")
    return service.reader.text_tokens(body.prompt or "", "prompt")


def _add_looks(app: FastAPI, service: Service) -> None:
    @app.get("/")
    async def page() -> Response:
        text = files("litgpt_kv.serve").joinpath(PAGE).read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": CONTENT_POLICY})

    @app.get("/health")
    async def health() -> Response:
        alive = service.loop.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine's thread has ended"}, 200 if alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")  # a name may have slashes
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise _other_model(service, name)
        return _model(service)

    @app.get("/metrics")
    async def metrics() -> Response:
        for cache in await _caches(service):
            name = cache["name"]
            for gauge, value in (("waiting", "waiting"), ("rows_busy", "busy"), ("kept", "kept"), ("seen", "seen")):
                getattr(service.metrics, gauge).labels(name).set(cache[value])
        service.metrics.conversations.set(len(service.conversations))
        service.metrics.conversation_bytes.set(service.conversations.nbytes)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/cache")
    async def cache(request: str | None = None, conversation: str | None = None, texts: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {"object": "cache", "caches": await _caches(service)}
        if request is not None or conversation is not None:
            found["row"] = await _ask(service, lambda: _row(service, request, conversation))
            ids = found["row"].pop("ids")
            if texts:
                found["row"]["texts"] = await asyncio.to_thread(lambda: [service.llm.decode([id]) for id in ids])
        return found


def _model(service: Service) -> dict[str, Any]:
    longest = next(iter(service.reader.limits.values())).limit
    about = {"id": service.name, "object": "model", "created": service.created, "owned_by": "litgpt_kv"}
    return {**about, "max_model_len": longest}


async def _caches(service: Service) -> list[dict[str, Any]]:
    return await _ask(service, lambda: [_about(name, *each) for name, each in service.loop.served().items()])


def _about(name: str, engine: Any, cache: Any, tickets: Any) -> dict[str, Any]:
    """What a cache is and holds, in the engine's thread."""
    scheduler = engine.scheduler
    busy = [row for row, sequence in enumerate(scheduler.rows) if sequence is not None]
    about = {"name": name, "rows": len(scheduler.rows), "busy": len(busy), "waiting": len(scheduler.waiting)}
    if cache is None:
        return {**about, "settings": None, "budgets": [], "bytes": 0, "kept": 0, "seen": 0}
    tokens = cache.tokens()
    kept, seen = (sum(tokens[what][row] for row in busy) for what in ("kept", "seen"))
    budgets = sorted({plan.slots for plan in cache.plans})
    size = cache.allocated()["total"]
    settings = asdict(cache.args)
    return {**about, "settings": settings, "budgets": budgets, "bytes": size, "kept": kept, "seen": seen}


def _row(service: Service, request: str | None, conversation: str | None) -> dict[str, Any]:
    """What the row of a running request or a kept conversation holds, in the engine's thread."""
    if request is not None:
        tickets = service.running.get(request, [])
        if not tickets or tickets[0].sequence is None or tickets[0].sequence.row < 0:
            raise Refused("No such request runs.", "request", 404)
        ticket, sequence = tickets[0], tickets[0].sequence
        cache = service.loop.served()[ticket.cache][1]
        if cache is None:
            raise Refused("There is no cache.", "request", 404)
        before = () if ticket.kept is None else ticket.kept.text
        found, ids = row_state(cache.row(sequence.row)), (*before, *sequence.prompt, *ticket.drawn)
        return {"cache": ticket.cache, **found, "ids": ids[: found["seen"]]}
    kept = service.conversations.state(conversation or "")
    if kept is None:
        raise Refused("No such conversation is kept.", "conversation", 404)
    return {"cache": kept.cache, **row_state(kept.state), "ids": kept.text}


async def _ask(service: Service, question: Callable[[], Any]) -> Any:
    """An answer of the engine's thread."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(service.loop.call(question)), ANSWER_SECONDS)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise Refused("The engine is in a long step.", status=503) from error


def _check_model(service: Service, body: Any) -> None:
    if isinstance(body, (Sampled, TokenizeBody, DetokenizeBody)) and body.model not in (None, "", service.name):
        raise _other_model(service, body.model)


def _other_model(service: Service, name: str) -> Refused:
    return Refused(f"This server has {service.name!r}, not {name!r:.60}.", "model", 404, "model_not_found")


async def read_body(request: HttpRequest, settings: ServeArgs) -> bytes:
    """The body of a request.

    Raises:
        Refused: If it is too large, or does not come in time.
    """
    most = settings.max_body
    too_large = Refused(f"A body may have {most:,} bytes.", status=413)
    too_large.headers["Connection"] = "close"
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise too_large

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), settings.body_timeout)
    except (TimeoutError, asyncio.TimeoutError) as error:
        late = Refused(f"The body did not come within {settings.body_timeout:g} s.", status=408)
        late.headers["Connection"] = "close"
        raise late from error


async def _on_refused(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, error.headers)


async def _on_http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = Refused(str(error.detail), status=error.status_code)
    return JSONResponse(refused.body, error.status_code, dict(error.headers or {}))


async def _on_wrong_query(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    refused = Refused(f"{first['loc'][-1]}: {first['msg']}, got {str(first['input'])[:60]!r}.", str(first["loc"][-1]))
    return JSONResponse(refused.body, refused.status)


async def _on_left(request: HttpRequest, error: Exception) -> Response:
    request.scope.setdefault("litgpt_kv", {})["left"] = True
    return Response(status_code=400)


async def _on_fault(request: HttpRequest, error: Exception) -> Response:
    refused = Refused("The server made a mistake.", status=500, code="server_error")
    return JSONResponse(refused.body, 500)
