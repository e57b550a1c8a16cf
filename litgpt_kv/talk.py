"""The terminal's side of a conversation: reading turns, commands, showing replies. Floor 6."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from litgpt_kv.chat import Chat

HELP = "/reset forgets the conversation, /cache tells what is kept, /quit ends; a line may end with \\ to go on."
END = ("!submit", "!quit", "!exit")


def talk(chat: Chat, multiline: bool = False) -> None:
    """Reads turns from standard input until it ends; replies go to standard output, all else to standard error."""
    _say(f"Now chatting with {chat.llm.config.name}. {HELP}")
    while (text := read_turn(multiline)) is not None:
        if text.strip().startswith("/"):
            if text.strip() in ("/quit", "/exit"):
                return
            _command(chat, text.strip())
        elif text.strip():
            _reply(chat, text)


def read_turn(multiline: bool) -> str | None:
    """One input, None at the end of all."""
    lines: list[str] = []
    terminal = sys.stdin.isatty()
    while True:
        prompt = ("... " if lines else ">>> ") if terminal else ""
        try:
            line = input(prompt)
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:  # at the prompt: the first one drops what was typed, at an empty line it ends
            print(file=sys.stderr)
            if not lines:
                return None
            lines = []
            continue
        if not lines and line.strip() in ("!quit", "!exit"):
            return None
        if multiline and not (not lines and line.strip().startswith("/")):
            if line.strip() in END:
                return "\n".join(lines) if line.strip() == "!submit" else None
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return "\n".join([*lines, line])


def _command(chat: Chat, text: str) -> None:
    if text == "/reset":
        chat.reset()
        _say("The conversation is forgotten.")
    elif text == "/cache":
        tokens, size = chat.cache.tokens(), chat.cache.allocated()
        _say(f"{chat.cache}: keeps {tokens['kept'][0]:,} of {tokens['seen'][0]:,} tokens, {size['total']:,} bytes.")
    else:
        _say(f"There is no {text.split()[0]}. {HELP}")


def _reply(chat: Chat, text: str) -> None:
    try:
        with interrupts() as interrupted:
            for piece in chat.say(text):
                print(piece, end="", flush=True)
                if interrupted():
                    break
    except ValueError as error:
        _say(f"litgpt_kv: {error}")
        return
    print(flush=True)
    stats = chat.stats
    speed = f", {stats.decode_tokens / stats.decode_seconds:,.0f} tokens/s" if stats.decode_tokens else ""
    _say(f"[read {stats.prompt_tokens:,} tokens in {stats.prefill_seconds:.2f} s, made {stats.new_tokens:,}{speed}]")


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Notes Ctrl-C instead of raising in the middle of a step, which would leave a token half in the cache."""
    noted: list[Any] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, lambda *_: noted.append(True))
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
