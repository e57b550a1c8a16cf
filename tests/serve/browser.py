"""Headless Chromium over its DevTools protocol: as much as a test of one page needs."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SECONDS = 30


class Browser:
    """A page in a browser of its own; use it in a `with` statement."""

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(prefix="litgpt_kv_browser_", ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += [
            "--disable-background-networking",
            "--remote-debugging-port=0",
            f"--user-data-dir={self._folder.name}",
        ]
        self._process = subprocess.Popen([str(BROWSER), *flags, "about:blank"], stderr=subprocess.DEVNULL)
        port = Path(self._folder.name, "DevToolsActivePort")
        self.wait(lambda: port.exists() and port.read_text().strip())
        pages = httpx.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json").json()
        url = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._ids, self.complaints = itertools.count(1), []
        self._open = contextlib.ExitStack()
        self._socket = self._open.enter_context(connect(url, max_size=None))
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call("Log.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser for something."""
        id = next(self._ids)
        self._socket.send(json.dumps({"id": id, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            if message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(message["params"]["exceptionDetails"]["text"])
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] != "network":
                self.complaints.append(message["params"]["entry"]["text"])
            if message.get("id") == id:
                assert "error" not in message, message
                return message["result"]

    def open(self, url: str, ready: str = "$('kv_cache').options.length > 0") -> None:
        """Go to a page, and wait until `ready`, a piece of JavaScript, is true; the default suits the server's page."""
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && {ready}")

    def run(self, script: str) -> Any:
        """The value of a piece of JavaScript."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> None:
        self.wait(lambda: self.run(f"(() => {{ try {{ return {script} }} catch {{ return false }} }})()"))

    def picture(self, path: Path, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=width < 600
        )
        time.sleep(0.3)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    @staticmethod
    def wait(true: Any) -> None:
        end = time.perf_counter() + SECONDS
        while not true():
            assert time.perf_counter() < end, "it did not happen in time"
            time.sleep(0.02)
