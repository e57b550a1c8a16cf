"""A file's chat template as a prompt style: one of litgpt's, else `Turns` with the template's own texts.

A template is a program; a checkpoint must be data (SECURITY.md). So it runs here alone, in a process of its own, on
conversations whose contents are marks, and what it puts around the marks is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litgpt import prompts
from litgpt.prompts import PromptStyle
from litgpt_kv.convert import render
from litgpt_kv.llm.chat import conversation_text
from litgpt_kv.llm.turns import Turns

WAIT = 30  # seconds for the process, which may compute for `render.SECONDS`
MOST = 100_000  # characters of a template
Messages = list[dict[str, str]]
MARKS = {"system": "Sy5tem", "user": "Us3r", "assistant": "Ass1stant"}


def conversation(turns: int, system: bool, spaced: bool = False, plain: bool = False) -> Messages:
    """A conversation of so many user turns; contents are marks with the turn's number, or prose."""

    def content(role: str, n: int) -> str:
        text = f"What {{is}} a\n\n{role}'s {n}? 7*8=56, 'ok'." if plain else f"{MARKS[role]}{n}"
        return f"  {text}\n " if spaced else text

    roles = ["user", "assistant"] * turns
    messages = [{"role": role, "content": content(role, n // 2)} for n, role in enumerate(roles[:-1])]
    return [{"role": "system", "content": content("system", 0)}, *messages] if system else messages


def render_all(template: str, names: dict[str, Any], conversations: Sequence[Messages]) -> list[str | None]:
    """What a template makes of conversations; None where it refuses one.

    Raises:
        ValueError: If it is no template, or takes too much time or memory.
    """
    if len(template) > MOST:
        raise ValueError(f"its chat template has {len(template):,} characters, over the limit of {MOST:,}")
    asked = json.dumps({"template": template, "names": names, "conversations": list(conversations)})
    command = [sys.executable, str(Path(render.__file__))]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, encoding="utf-8", timeout=WAIT)
        texts = json.loads(done.stdout) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError):
        texts = None
    if texts is None:
        raise ValueError("its chat template is broken, or takes too long or too much memory")
    return texts


def style_of(template: str, bos: str, eos: str) -> tuple[PromptStyle, bool]:
    """The prompt style that says what a chat template says.

    Args:
        template: In Jinja.
        bos, eos: The texts of the tokens that begin and end a text, "" if there is none.

    Returns:
        The style, and whether it gave the template's text for every conversation that was tried, of up to four turns
        with and without a system prompt.

    Raises:
        ValueError: If the template cannot be rendered, or not be said with texts around contents.
    """
    names = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
    probes = [
        *(conversation(turns, system) for turns in (1, 3) for system in (False, True)),
        *(conversation(2, False, spaced=True), conversation(1, True, spaced=True)),
        *(conversation(turns, system, plain=True) for turns in (1, 2, 4) for system in (False, True)),
        conversation(3, False, spaced=True, plain=True),
    ]
    texts = render_all(template, names, probes)
    if texts[0] is None:
        raise ValueError("its chat template refuses a conversation of one turn")
    for cls in dict.fromkeys([*prompts.prompt_styles.values(), prompts.R1Base]):
        if cls is not prompts.Default and _agrees(cls(), probes, texts):
            return cls(), True
    turns = _turns(texts)
    return turns, _agrees(turns, probes, texts)


def _agrees(style: PromptStyle, probes: Sequence[Messages], texts: Sequence[str | None]) -> bool:
    """Whether a style gives the texts; a conversation that the template refuses may be anything."""
    try:
        return all(text is None or conversation_text(style, probe) == text for probe, text in zip(probes, texts))
    except (ValueError, TypeError, KeyError):
        return False


def _turns(texts: Sequence[str | None]) -> Turns:
    """The texts around the marks in conversations of one and of three turns, without and with a system prompt."""
    short, short_system, long, _, spaced, spaced_system = texts[:6]
    first, reply = _split(short, ["Us3r0"])
    system = None
    if short_system is not None and MARKS["system"] + "0" in short_system:
        before, after, _ = _split(short_system, ["Sy5tem0", "Us3r0"])
        system = (before, after)
    between, past = None, reply
    if long is not None:
        _, past, between, *_ = _split(long, ["Us3r0", "Ass1stant0", "Us3r1", "Ass1stant1", "Us3r2"])
    strip = spaced is not None and "  Us3r0\n " not in spaced
    strip_reply = spaced is not None and "  Ass1stant0\n " not in spaced
    strip_system = spaced_system is not None and "  Sy5tem0\n " not in spaced_system
    return Turns(first, reply, between or first, past, system, strip, strip_reply, strip_system)


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """The texts around marks, each of which must be there once."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError("its chat template does not give every message once, in order")
        parts.append(before)
    return [*parts, text]
