"""The servers that `litgpt_kv benchmark_serve` measures: processes that it starts, or URLs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from litgpt_kv.arguments import DeviceArgs
from litgpt_kv.config import KVCacheArgs, shown

START_SECONDS = 300
OURS = "litgpt_kv serve"
LITGPT = {"litgpt": "litgpt serve", "litgpt-stream": "litgpt serve --stream"}
ADDRESS = re.compile(r"http://[^/?#\s]+/?")
PORT = "{port}"


class NoServer(Exception):
    """A server that cannot be measured, and why."""


@dataclass(frozen=True)
class Peer:
    """A server to measure.

    Attributes:
        name: In the table. command: Starts it; `{port}` in it is a free port. url: Where it runs already, instead.
        path: Of the endpoint. counts: Whether it can say how many tokens an answer has, as OpenAI's servers do.
    """

    name: str
    command: tuple[str, ...] = ()
    url: str = ""
    path: str = "/v1/completions"
    counts: bool = True

    def body(self, text: str, new_tokens: int, model: str | None) -> dict[str, Any]:
        """A request for `new_tokens` tokens after a text."""
        if not self.counts:
            return {"prompt": text}
        body = {
            "prompt": text,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "min_tokens": new_tokens,
        }
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body if model is None else {**body, "model": model}

    @contextlib.contextmanager
    def running(self, threads: int | None) -> Iterator[str]:
        """Start the server if need be; gives its URL.

        Args:
            threads: Of torch in the server's process, where it has no option for them.

        Raises:
            NoServer: If it does not answer.
        """
        if self.url:
            if _status(self.url) is None:
                raise NoServer(f"nothing answers at {self.url}")
            yield self.url.rstrip("/")
            return
        with _started(self.command, threads) as url:
            yield url


def our_peer(url: str | None, checkpoint_dir: str, cache: KVCacheArgs, device: DeviceArgs, **settings: int) -> Peer:
    """`litgpt_kv serve`, or what runs at a URL.

    Args:
        settings: Of the server, by the names of its options.

    Raises:
        ValueError: If `url` is none.
    """
    if url is not None:
        if not ADDRESS.fullmatch(url):
            raise ValueError(f"url must be http://HOST:PORT, got {shown(url)}.")
        return Peer(OURS, url=url)
    own = {name: value for name, value in asdict(cache).items() if value != asdict(KVCacheArgs())[name]}
    command = [sys.executable, "-m", "litgpt_kv", "serve", checkpoint_dir, "--accelerator", device.accelerator]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--kv-cache", json.dumps(own)] if own else []
    for name in ("precision", "threads", "quantize"):
        command += [f"--{name}", str(getattr(device, name))] if getattr(device, name) else []
    return Peer(OURS, (*command, "--port", PORT))


def other_peer(given: str, checkpoint_dir: str, new_tokens: int, device: DeviceArgs) -> Peer:
    """A server of `--against`: "litgpt", "litgpt-stream", or NAME=URL or NAME=COMMAND for one of OpenAI's form.

    Raises:
        ValueError: If it is none of these.
    """
    if given in LITGPT:
        command = [sys.executable, "-m", "litgpt", "serve", checkpoint_dir, "--accelerator", device.accelerator]
        command += ["--precision", device.precision or "32-true", "--max_new_tokens", str(new_tokens), "--top_k", "1"]
        command += ["--timeout", "3600", "--stream", str(given != "litgpt").lower(), "--port", PORT]
        return Peer(LITGPT[given], tuple(command), path="/predict", counts=False)
    name, _, how = given.partition("=")
    if name and ADDRESS.fullmatch(how):
        return Peer(name, url=how)
    try:
        command = shlex.split(how)
    except ValueError as error:
        raise ValueError(f"against: {error} in {shown(given)}.") from error
    if not name or not any(PORT in word for word in command):
        raise ValueError(
            f"against must be litgpt, litgpt-stream, NAME=http://HOST:PORT, or NAME=COMMAND with {PORT} in it, "
            f"got {shown(given)}."
        )
    return Peer(name, tuple(command))


@contextlib.contextmanager
def _started(command: Sequence[str], threads: int | None) -> Iterator[str]:
    """A server in a process of its own, once it answers; gives its URL."""
    if "litgpt" in command[:3] and importlib.util.find_spec("litserve") is None:
        raise NoServer("needs litserve: pip install litserve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    environment.pop("LITGPT_KV_API_KEY", None)  # our clients send none
    words = [word.replace(PORT, str(port)) for word in command]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        try:
            process = subprocess.Popen(words, start_new_session=True, stdout=said, stderr=said, env=environment)
        except OSError as error:
            raise NoServer(f"{words[0]}: {error.strerror}") from error
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        try:
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    last = next(
                        (line for line in reversed(said.read().splitlines()) if line.strip()), "it said nothing"
                    )
                    code = f"after {START_SECONDS} s" if process.returncode is None else f"exit {process.returncode}"
                    raise NoServer(f"did not start ({code}): {last.strip()[-200:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):  # litserve's workers outlive their parent
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_ready(url: str) -> bool:
    """Whether a server is healthy, or, if it has no such endpoint, lists its models."""
    health = _status(f"{url}/health")
    return health == 200 or (health == 404 and _status(f"{url}/v1/models") == 200)


def _status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def model_of(url: str) -> str | None:
    """The name of the first model of a server of OpenAI's form; None if it does not say."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
