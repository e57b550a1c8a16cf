"""The launcher of a run: start the workers, wait for them, end them together, and print an error once.

Workers are started by `torch.distributed.elastic.multiprocessing`, not by `elastic_launch`, which adds restarts, which
a run does not need, and a TCP store that listens on every network interface.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from litgpt_kv.parallel.heartbeat import PERIOD, FileMonitor

GRACE = 10  # seconds in which workers may end by themselves after Ctrl-C
FOLDER, LAUNCHER = "LITGPT_KV_RUN_FOLDER", "LITGPT_KV_LAUNCHER"  # environment variables of workers
LONGEST = 2000  # characters of a printed error
KILL = getattr(signal, "SIGKILL", None)  # None on Windows, where torch uses another signal
PIPE_CLOSED = 128 + 13  # a worker's exit code if nobody reads its output any more, as after `| head`
USER_ERROR = 2  # a worker's exit code for a user's error, which is printed without the worker's number


def supervise(workers: int, on_one_machine: bool) -> int:
    """Run this command again in `workers` processes until all have ended or one has failed; return the exit code."""
    # `_explain` prints a shorter message
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    print(f"Starting with {workers} processes on this machine.", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="litgpt_kv_") as name:
        folder = Path(name)
        common = {FOLDER: name, LAUNCHER: str(os.getpid()), **(_loopback() if on_one_machine else {})}
        ranks = range(workers)
        context = start_processes(
            "litgpt_kv",
            sys.executable,
            args={rank: tuple(sys.orig_argv[1:]) for rank in ranks},
            envs={rank: {**common, "LOCAL_RANK": str(rank)} for rank in ranks},
            logs_specs=DefaultLogsSpecs(log_dir=name),
        )
        monitor = FileMonitor({rank: beat_file(folder, rank) for rank in ranks})
        try:
            return _wait(context, monitor, workers)
        except SignalException as stopped:
            with contextlib.suppress(SignalException):  # a second Ctrl-C ends the waiting
                context.close(stopped.sigval, timeout=GRACE)
            context.close(KILL, timeout=GRACE)
            if stopped.sigval == signal.SIGINT:
                print(file=sys.stderr, flush=True)  # a new line after the terminal's ^C
            return 128 + stopped.sigval


def _wait(context: PContext, monitor: FileMonitor, workers: int) -> int:
    """Wait for the workers; return the exit code."""
    while (result := context.wait(PERIOD, period=0.1)) is None:  # after a failure, torch ends the other workers
        if silent := monitor.silent():
            context.close(KILL)
            print_error(silent)
            return 1
    if not result.failures:
        return 0
    failures = result.failures.values()  # includes the workers that torch ended
    failure = next((f for f in failures if f.exitcode != -signal.SIGTERM), next(iter(failures)))
    if failure.exitcode == PIPE_CLOSED:
        return 0
    _explain(failure, workers)
    return failure.exitcode if failure.exitcode > 0 else 1


def _explain(failure: ProcessFailure, workers: int) -> None:
    """Print why a worker ended: its traceback, if it was not printed yet, and one line."""
    data = failure.error_file_data
    if data.get("is_printed"):
        return
    for line in str(data.get("traceback", "")).splitlines():
        print(one_line(line, keep_indent=True), file=sys.stderr)
    worker = f"process {failure.local_rank} of {workers}"
    if failure.error_file == "<N/A>":  # torch's value if the worker wrote no message
        print_error(f"{worker} ended with code {failure.exitcode}.")
    else:
        print_error(failure.message if failure.exitcode == USER_ERROR else f"{worker} ended: {failure.message}")


def print_error(text: str) -> None:
    """Print an error on one line of standard error."""
    print(f"litgpt_kv: error: {one_line(text)}", file=sys.stderr, flush=True)


def one_line(text: str, keep_indent: bool = False) -> str:
    """Return text of another process on one line, without control characters and with limited length."""
    text = "".join(c if c.isprintable() else " " for c in text[: 2 * LONGEST])
    indent = text[: len(text) - len(text.lstrip())] if keep_indent else ""
    text = indent + " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def beat_file(folder: Path, rank: int) -> Path:
    """Return the heartbeat file of a worker."""
    return folder / f"alive{rank}"


def _loopback() -> dict[str, str]:
    """Return environment variables that make gloo and NCCL use only loopback, unless the user has set them."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    chosen = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return {name: value for name, value in chosen.items() if value is not None and name not in os.environ}
