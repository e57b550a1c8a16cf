"""What the user chooses about a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from litgpt_kv.arguments import check_count, check_flag
from litgpt_kv.config import check_type, shown
from litgpt_kv.generate.runner import PIECE

MOST_ROWS = 65_536
KEY_VARIABLE = "LITGPT_KV_API_KEY"


@dataclass(frozen=True)
class ServeArgs:
    """How a server answers.

    Args:
        host: The address to listen on; 127.0.0.1 reaches this machine only.
        port: The port to listen on; 0 takes a free one.
        rows: Answers made at a time, with each cache.
        max_tokens: The most tokens that a row may see, prompt and answer; a budget in percent is a share of it, and a
            dense cache has this size. None: the model's context, at most 8192.
        queue: Answers that may wait for a row, with each cache; beyond, requests get status 429.
        name: The model's name for clients; None: that of the checkpoint folder.
        api_key: What clients must send as a bearer token; None: the environment variable LITGPT_KV_API_KEY, or no key.
        piece_size: The most tokens of a waiting prompt that are read in one step, while other rows wait.
        conversation_bytes: Memory for the states of conversations; the least recently used one leaves.
        max_body: The most bytes of a request's body.
        body_timeout: Seconds in which a body must arrive.
        connections: The most open connections; times `max_body`, it bounds the memory of bodies.
        drain: Seconds that running answers get to end after SIGTERM.
        log_prompts: Also log prompts and answers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    rows: int = 8
    max_tokens: int | None = None
    queue: int = 64
    name: str | None = None
    api_key: str | None = None
    piece_size: int = PIECE
    conversation_bytes: int = 2**30
    max_body: int = 4 * 2**20
    body_timeout: float = 30.0
    connections: int = 256
    drain: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        check_type("host", self.host, str, "an address")
        check_count("port", self.port, 0, 65_535)
        check_count("rows", self.rows, 1, MOST_ROWS)
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_count("queue", self.queue, 0, 1_000_000)
        check_count("piece_size", self.piece_size, 1, 2**31 - 1)
        check_count("conversation_bytes", self.conversation_bytes, 0, 2**63 - 1)
        check_count("max_body", self.max_body, 1, 2**31 - 1)
        check_count("connections", self.connections, 1, 1_000_000)
        for name in ("body_timeout", "drain"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 86_400:
                raise ValueError(f"{name} must be a number of seconds over 0 and up to 86,400, got {shown(value)}.")
        check_flag("log_prompts", self.log_prompts)
        for name in ("name", "api_key"):
            value = getattr(self, name)
            if not (value is None or (isinstance(value, str) and value)):
                raise ValueError(f"{name} must be a text of at least one character, got {shown(value)}.")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
