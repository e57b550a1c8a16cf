"""Chat in a terminal: read turns and commands, print replies."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from litgpt_kv.cli.colour import paint
from litgpt_kv.cli.output import Output, dense_bytes, heads_differ, strategies_of
from litgpt_kv.llm.chat import Chat
from litgpt_kv.registry import did_you_mean

with contextlib.suppress(ImportError):  # gives `input` editing and a history, where the system has it
    import readline  # noqa: F401

HELP = "/reset starts a new conversation, /cache shows the cache, /quit ends; a line that ends with \\ continues."
END = ("!submit", "!quit", "!exit")


def talk(chat: Chat, multiline: bool = False, output: Output | None = None) -> int:
    """Answer turns from standard input until it ends. Replies go to `output`, all else to standard error.

    Returns:
        How many turns were refused.
    """
    output, refused = output or Output(), []
    _say(f"Now chatting with {chat.llm.config.name}. {HELP}")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # `read_turn` refuses such a line
    while (text := read_turn(multiline, refused)) is not None:
        if text.strip() in ("/quit", "/exit"):
            break
        elif text.startswith("/") and text[1:].strip().isalpha():  # one word; anything longer is a question
            _command(chat, text.strip())
        elif text.strip():
            refused += [] if _reply(chat, text, output) else [text]
    return len(refused)


def read_turn(multiline: bool, refused: list[str] | None = None) -> str | None:
    """Read one input from the terminal; return None at the end of standard input.

    Lines that are not text are skipped, and added to `refused`.
    """
    lines: list[str] = []
    terminal, interrupted = sys.stdin.isatty(), False
    while True:
        prompt = ("... " if lines else ">>> ") if terminal else ""
        try:
            line = input(prompt)
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:  # the first Ctrl-C clears the input, the second ends the chat
            print(file=sys.stderr)
            if interrupted:
                return None
            lines, interrupted = [], True
            continue
        interrupted = False
        if any("\ud800" <= c <= "\udfff" for c in line):
            _say("litgpt_kv: this line is not valid text in the terminal's encoding; it was skipped.")
            if refused is not None:
                refused.append(line)
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
        _say("A new conversation starts.")
    elif text == "/cache":
        _say(describe_cache(chat))
    else:
        hint = did_you_mean(text.split()[0], ["/reset", "/cache", "/quit"])
        _say(f"There is no command {text.split()[0]}.{hint} {HELP}")


def describe_cache(chat: Chat) -> str:
    """Return what a chat's cache keeps and takes, and what a dense cache would take."""
    cache = chat.cache
    tokens, size, seen = cache.tokens(), cache.allocated(), cache.seen[0]
    keeps = "a head keeps up to" if heads_differ(cache) else "keeps"
    text = f"{cache}: {keeps} {tokens['kept'][0]:,} of {seen:,} tokens, {size['total']:,} bytes."
    if strategies_of(cache) == ["dense"]:
        return text
    if seen > cache.context:
        return f"{text} A dense cache cannot hold so many: the model's context is {cache.context:,}."
    takes = []
    if seen and (dense := dense_bytes(chat.llm, cache, seen)) is not None:
        takes.append(f"{dense:,} bytes for these tokens")
    if (whole := dense_bytes(chat.llm, cache)) is not None:
        takes.append(f"{whole:,} bytes for the {cache.max_tokens:,} of a whole conversation")
    return f"{text} A dense cache takes {', '.join(takes)}." if takes else text


def _reply(chat: Chat, text: str, output: Output) -> bool:
    """Print the reply to a turn; return whether the turn was accepted."""
    try:
        with interrupts() as interrupted:
            for piece in chat.say(text):
                output.text(piece, end="")
                if interrupted():
                    break
    except ValueError as error:
        _say(f"litgpt_kv: {error}")
        return False
    except KeyboardInterrupt:
        if not chat.interrupted:
            _say("\nInterrupted.")
            return True
        chat.reset()
        _say("\nInterrupted in the middle of a step: a new conversation starts.")
        return True
    output.text("")
    stats = chat.stats
    speed = f", {stats.decode_tokens / stats.decode_seconds:,.0f} tokens/s" if stats.decode_tokens else ""
    if chat.full:
        _say("The conversation is full. /reset starts a new one; with --kv-cache sink, old tokens are evicted instead.")
    _say(f"[read {stats.prompt_tokens:,} tokens in {stats.prefill_seconds:.2f} s, made {stats.new_tokens:,}{speed}]")
    return True


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed.

    Raising in the middle of a step would leave the cache with half a token. A second Ctrl-C does raise
    KeyboardInterrupt, because no step ends before a long prompt is read.
    """
    noted: list[Any] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(*_: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(paint(text, "dim", sys.stderr), file=sys.stderr, flush=True)
