"""A server: the model, its engines, the endpoints, and the socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import uvicorn

from litgpt_kv.arguments import RunArgs, StoppingArgs
from litgpt_kv.cache.kv_cache import KVCache
from litgpt_kv.config import KVCacheArgs, SamplingArgs
from litgpt_kv.generate import Engine
from litgpt_kv.generate.compiled import CompiledDecoder
from litgpt_kv.llm.chat import MAX_TOKENS
from litgpt_kv.llm.llm import LLM
from litgpt_kv.llm.threads import cpu_threads
from litgpt_kv.serve.app import Service, build_app
from litgpt_kv.serve.asked import Reader
from litgpt_kv.serve.conversations import Conversations
from litgpt_kv.serve.guard import Guard
from litgpt_kv.serve.loop import EngineLoop
from litgpt_kv.serve.metrics import Metrics
from litgpt_kv.serve.settings import KEY_VARIABLE, ServeArgs

log = logging.getLogger("litgpt_kv.serve")
NEW_TOKENS = StoppingArgs(max_new_tokens=256)
GRACE = 5  # seconds for clients to read the end of what was ended


class _Draining(uvicorn.Server):
    """Ends the answers that still run some seconds after it was told to end."""

    def __init__(self, config: uvicorn.Config, loop: EngineLoop, seconds: float) -> None:
        super().__init__(config)
        self.engine_loop, self.seconds = loop, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self.seconds, self.engine_loop.end_all)
        await super().shutdown(sockets)
        timer.cancel()


class Server:
    """Answer HTTP requests with a model.

    Args:
        llm: The model.
        caches: What a request may ask for by name; the first one is the default. None: no cache.
        settings: How the server answers.
        defaults: `sampling`, `stopping` and `run`, as for `build_guarded_app`.

    Attributes:
        url: Where it listens.
        service: What the endpoints share.

    Raises:
        ValueError: If a cache does not fit the model, or the processes share the model.
        OSError: If the address is in use.
    """

    def __init__(
        self,
        llm: LLM,
        caches: Mapping[str, KVCacheArgs | None],
        settings: ServeArgs = ServeArgs(),
        **defaults: Any,
    ) -> None:
        self.settings = settings
        self.service, app = build_guarded_app(llm, caches, settings, **defaults)
        loop = self.service.loop
        self._socket = _listen(settings)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            server_header=False,
            limit_concurrency=settings.connections,
            timeout_graceful_shutdown=math.ceil(settings.drain) + GRACE,
        )
        self._server = _Draining(config, loop, settings.drain)

    def run(self) -> None:
        """Answer until SIGTERM or Ctrl-C: then end what runs, refuse what is new, and return."""

        def note(number: int, frame: FrameType | None) -> None:
            self._server.should_exit = True  # the signal may come before uvicorn listens to it
            log.info("Ended by %s.", signal.Signals(number).name)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:  # uvicorn catches both and, when it has ended, raises them again for these handlers
            self._server.run(sockets=[self._socket])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._socket.close()

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Answer in a thread of its own while the block runs; gives the URL."""
        thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        thread.start()
        try:
            while not self._server.started and thread.is_alive():
                thread.join(0.01)
            yield self.url
        finally:
            self._server.should_exit = True
            thread.join()
            self._socket.close()


def build_guarded_app(
    llm: LLM,
    caches: Mapping[str, KVCacheArgs | None],
    settings: ServeArgs = ServeArgs(),
    *,
    sampling: SamplingArgs = SamplingArgs(),
    stopping: StoppingArgs = NEW_TOKENS,
    run: RunArgs = RunArgs(),
) -> tuple[Service, Guard]:
    """Build the endpoints over a model as an ASGI app, for any server; the engines run during its lifespan.

    Args:
        llm: The model.
        caches: What a request may ask for by name; the first one is the default. None: no cache.
        settings: How the server answers.
        sampling: How tokens are chosen, where a request says nothing.
        stopping: When a text ends, where a request says nothing.
        run: How prompts are read.

    Returns:
        What the endpoints share, and the app.

    Raises:
        ValueError: If a cache does not fit the model, or the processes share the model.
    """
    if not caches:
        raise ValueError("A server needs at least one cache.")
    if llm.parallel is not None and llm.parallel.collectives.size > 1:
        raise ValueError("A server runs in one process; start one server a device.")
    tokens = settings.max_tokens or min(MAX_TOKENS, llm.model.max_seq_length)
    engines: dict[str, tuple[Engine, KVCache | None]] = {}
    for name, args in caches.items():
        cache = None if args is None else llm.build_cache(args, settings.rows, tokens)
        engines[name] = _engine(llm, cache, settings, run), cache
    metrics, conversations = Metrics(), Conversations(settings.conversation_bytes)
    loop = EngineLoop(engines, settings.queue, metrics, conversations)
    limits = {name: engine.limits for name, (engine, _) in engines.items()}
    reader = Reader(llm, limits, sampling, stopping, loop.room, conversations)
    name = settings.name or ("random" if llm.checkpoint_dir is None else llm.checkpoint_dir.name)
    service = Service(llm, loop, reader, conversations, metrics, settings, name)
    key = settings.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is None and not settings.is_loopback:
        log.warning("Whoever reaches %s may use this server: there is no API key.", settings.host)
    return service, Guard(build_app(service), key, settings.is_loopback, metrics, settings.log_prompts)


def _engine(llm: LLM, cache: KVCache | None, settings: ServeArgs, run: RunArgs) -> Engine:
    if cache is not None and isinstance(llm.decoder, CompiledDecoder):
        with cpu_threads(llm.threads):
            llm.decoder.warm_up(cache)
    return Engine(
        llm.model,
        cache,
        rows=settings.rows,
        prefill=run.prefill,
        prefill_chunk=None if cache is None else run.prefill_chunk,
        piece_size=settings.piece_size,
        decoder=llm.decoder,
        decode_text=llm.decode,
    )


def _listen(settings: ServeArgs) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"Cannot listen on {settings.host} port {settings.port}: {error.strerror}.") from error
