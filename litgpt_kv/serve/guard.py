"""What stands before the endpoints: keys, hosts and origins; and after them: one line of log and the count."""

from __future__ import annotations

import hmac
import logging
import time
from urllib.parse import urlsplit

from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from litgpt_kv.serve.metrics import Metrics
from litgpt_kv.serve.response import send_error
from litgpt_kv.serve.schemas import Refused

log = logging.getLogger("litgpt_kv.serve")
OPEN = ("/", "/health")  # need no key
LOCAL = {"localhost", "127.0.0.1", "::1"}
PATHS = {
    "/",
    "/health",
    "/metrics",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/v1/cache",
    "/v1/completions",
    "/v1/chat/completions",
}
MODEL = "/v1/models/NAME"  # in the log, whatever the name is


class Guard:
    """Lets through what may come in.

    A page of another site that a browser on this machine shows can send requests here: what has another site's `Origin`
    is refused, and a server that only this machine reaches without a key refuses other host names (DNS rebinding).

    Args:
        app: The endpoints. key: What clients must send; None: no key. is_local: Whether only local names are served.
        log_prompts: Also log texts.
    """

    def __init__(self, app: ASGIApp, key: str | None, is_local: bool, metrics: Metrics, log_prompts: bool) -> None:
        self.app, self.key, self.is_local = app, key, is_local
        self.metrics, self.log_prompts = metrics, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            status = message["status"] if message["type"] == "http.response.start" else status
            await send(message)

        try:
            if (refused := self._refused(scope)) is not None:
                await send_error(noting, refused)
            else:
                await self.app(scope, receive, noting)
        finally:
            self._note(scope, status, time.perf_counter() - began)

    def _refused(self, scope: Scope) -> Refused | None:
        request = HttpRequest(scope)
        headers = request.headers
        host = headers.get("host", "")
        if "origin" in headers and _place_of(headers["origin"]) != host:
            return Refused("Requests of other sites' pages are not answered.", status=403)
        if self.is_local and self.key is None and _name_of(host) not in LOCAL:
            return Refused("This server answers to localhost alone.", status=403)
        if self.key is None or scope["path"] in OPEN:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            refused = Refused("Wrong or no API key.", status=401, code="invalid_api_key")
            refused.headers["WWW-Authenticate"] = "Bearer"
            return refused
        return None

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        about = scope.get("litgpt_kv", {})
        status = 499 if about.get("left") or not status else status  # as nginx calls a client that left
        path = scope["path"] if scope["path"] in PATHS else "other"
        path = MODEL if scope["path"].startswith("/v1/models/") else path
        self.metrics.requests.labels(path, str(status)).inc()
        line = f"{scope['method'][:10]} {path} {status} {seconds:.3f} s"
        if tickets := about.get("tickets"):
            self.metrics.whole.observe(seconds)
            read = sum(len(ticket.request.prompt) for ticket in tickets)
            made = sum(len(ticket.drawn) for ticket in tickets)
            reasons = ",".join(event.reason for event in about["ended"].values()) or "abort"
            line += f" {about['id']} cache={tickets[0].cache} answers={len(tickets)} read={read} made={made} {reasons}"
            if self.log_prompts:
                line += f" {[(t.request.prompt, t.sequence and t.sequence.text) for t in tickets]!r}"
        log.info("%s", line)


def _place_of(origin: str) -> str | None:
    """Host and port of an origin, None if it is no URL."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name_of(host: str) -> str:
    """A host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
