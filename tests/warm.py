"""Start Python processes without waiting for their imports: they are forked from a process that has imported already.

`Popen` and `run` are those of subprocess for commands that begin with `sys.executable`. A process of its own
with torch and Lightning takes three seconds of processor time to start, a forked one a hundredth of that. What it runs
sees a new process: its own standard streams, environment, folder, signals, `__main__`, `sys.argv` and exit.

1. The first `Popen` of a test process starts `python -m tests.warm`, which imports the package and waits.
2. For each `Popen` it gets a line of JSON and the three standard streams, forks, and says the process id.
3. The child runs the command, as Python does. When it has ended, its wait status is sent.

The workers of a launch are forked from their launcher in the same manner, because `torch.distributed.elastic` starts
them by `Popen` too. `FULL` in the environment of a launch starts them in full, as users do.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

ROOT = Path(__file__).parents[1]
FULL = "LITGPT_KV_TESTS_START_WORKERS_IN_FULL"
IMPORTED = ("litgpt_kv.__main__", "litgpt_kv.parallel", "tokenizers", "tests.oracle.reference", "tests.oracle.shrink")
IMPORTED += ("litgpt_kv.cli.parser", "litgpt_kv.cli.chat", "litgpt_kv.cli.evaluate", "litgpt_kv.cli.generate")
IMPORTED += ("litgpt_kv.cli.plan", "litgpt_kv.cli.serve", "litgpt_kv.cli.strategies", "litgpt_kv.benchmark.decode")


class _Server:
    """The process that forks, as the tests see it; started once in each test process and gone with it."""

    _control: socket.socket | None = None
    _process: subprocess.Popen | None = None

    @classmethod
    def control(cls) -> socket.socket:
        if cls._control is None:
            ours, theirs = socket.socketpair()
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            cls._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            cls._control = ours
        return cls._control

    @classmethod
    def stop(cls) -> None:
        if cls._control is not None:
            cls._control.close()
            cls._process.wait(timeout=60)
            cls._control = cls._process = None


class _Forked(subprocess.Popen):
    """subprocess.Popen whose process is the child of another one, which reports its end."""

    def _execute_child(self, args: list[Any], executable: Any, preexec_fn: Any, close: Any, fds: Any, cwd: Any, *more):
        env, (*pipes,), new_session = more[0], more[4:10], more[15]
        args = [str(a) for a in args]
        if args[0] != sys.executable or preexec_fn is not None or fds:
            raise ValueError(f"A warm process runs Python commands without preexec_fn or pass_fds, got {args}.")
        self._channel, theirs = socket.socketpair()
        streams = [own if own != -1 else standard for own, standard in zip((pipes[0], pipes[3], pipes[5]), range(3))]
        socket.send_fds(_Server.control(), [b"+"], [theirs.fileno(), *streams])
        theirs.close()
        request = dict(args=args, env=dict(os.environ if env is None else env), session=bool(new_session))
        self._channel.sendall(json.dumps(request | {"cwd": str(cwd or Path.cwd())}).encode() + b"\n")
        self._lines = self._channel.makefile("r")
        self.pid = int(self._lines.readline())
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self._channel.fileno() < 0:  # a test left it behind
            return -signal.SIGKILL
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            if not select.select([self._channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self._lines.readline()))
            self._lines.close(), self._channel.close()
        return self.returncode


class _Worker(subprocess.Popen):
    """subprocess.Popen whose process is forked from this one, and so has the imports of this one."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close: Any, fds: Any, cwd: Any, *more: Any):
        env, pipes, new_session = more[0], more[4:10], more[15]
        if args[0] != sys.executable or len(os.listdir("/proc/self/task")) > 1 or set(pipes) != {-1}:
            raise ValueError(f"Only a Python command can be forked, by a process of one thread, got {args}.")
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            _be_new()
            _end(dict(args=args, env=env, session=new_session, cwd=cwd or os.getcwd()))


def _be_new() -> None:
    """Forgets what the process from which this one was forked would do with signals and at its end."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    atexit._clear()


def _end(request: dict[str, Any]) -> NoReturn:
    """Runs a command and ends this process as Python does, without going back to what called it."""
    code = 0
    try:
        execute(request)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        print(*[asked.code] if isinstance(asked.code, str) else [], file=sys.stderr, end="")
    except BaseException as error:
        sys.last_exc = sys.last_value = error
        traceback.print_exception(error)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


stop = _Server.stop  # when the tests end
Popen = _Forked if sys.platform.startswith("linux") else subprocess.Popen  # elsewhere torch may not be forked


def run(command: list[Any], *, capture_output: bool = False, timeout: float = 600, **options: Any):
    """As subprocess.run."""
    if capture_output:
        options |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# -- the process that forks --------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> dict[str, Any]:
    """Forks a process for each request; returns the request in the child, and ends with the test process."""
    woken, wake = os.pipe()
    os.set_blocking(woken, False), os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    channels: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(channels):
                if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    with channels.pop(pid) as channel, contextlib.suppress(OSError):
                        channel.sendall(f"{ended[1]}\n".encode())
        if control in ready:
            message, fds, _, _ = socket.recv_fds(control, 1, 4)
            if not message:
                raise SystemExit
            channel, streams = socket.socket(fileno=fds[0]), fds[1:]
            request = json.loads(channel.makefile("r").readline())
            if pid := os.fork():
                channels[pid] = channel
                channel.sendall(f"{pid}\n".encode())
                for fd in streams:
                    os.close(fd)
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for fd, standard in zip(streams, range(3)):
                os.dup2(fd, standard)
            for fd in (*streams, woken, wake):
                os.close(fd)
            for other in (control, channel, *channels.values()):
                other.close()
            return request


def execute(request: dict[str, Any]) -> None:
    """Runs a command in this process as Python would: a module, code or a script."""
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    subprocess_handler.Popen = subprocess.Popen if FULL in os.environ else _Worker
    sys.orig_argv = [*request["args"]]
    sys.path[1:1] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    _, first, *rest = request["args"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


def prepare() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    del sys.modules["litgpt_kv.__main__"], sys.modules["litgpt_kv"].__main__  # runpy warns of what is there already
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        raise RuntimeError(f"Only a process of one thread can be forked safely; the imports started {len(threads)}.")
    gc.freeze()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as control:
        prepare()
        asked = serve(control)
    execute(asked)
