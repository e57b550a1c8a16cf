"""`Turns`: a prompt style of fixed texts around messages, read from a checkpoint's `prompt_style.yaml`.

Also whether a prompt style has a place for a system prompt.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from litgpt.prompts import PromptStyle
from litgpt_kv.config import shown

MOST = 100_000  # characters of one text
MARK = "\x00system\x00"  # in no prompt style


@dataclass(frozen=True)
class Turns(PromptStyle):
    """The fixed texts before, between and after the messages of a conversation; most chat templates are such texts.

    Attributes:
        first: The text before the user's first message if there is no system prompt; it has the model's default system
            prompt, if there is one.
        reply: The text after the user's last message; the model's reply follows.
        between: The text between a reply and the user's next message.
        past: The text between an earlier message of the user and its reply.
        system: The texts before and after a system prompt; None if the model has no system prompt.
        strip, strip_reply, strip_system: Whether to strip white space from the user's messages, from replies, and from
            the system prompt.
    """

    first: str
    reply: str
    between: str
    past: str
    system: tuple[str, str] | None = None
    strip: bool = False
    strip_reply: bool = False
    strip_system: bool = False

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """Return the text up to the model's first reply.

        Raises:
            ValueError: If a system prompt is given and the model has none.
        """
        return self.begin(sys_prompt) + self._said(prompt) + self.reply

    def begin(self, sys_prompt: str | None) -> str:
        """Return all text before the user's first message."""
        check_system_prompt(self, sys_prompt)
        if not sys_prompt or self.system is None:
            return self.first
        return self.system[0] + (sys_prompt.strip() if self.strip_system else sys_prompt) + self.system[1]

    def later(self, prompt: str) -> str:
        """Return all text between a reply and the next one."""
        return self.between + self._said(prompt) + self.reply

    def conversation(self, turns: list[str], sys_prompt: str | None) -> str:
        """Return a conversation up to the next reply; `turns` are the user's messages and the replies, alternating."""
        text = self.begin(sys_prompt) + self._said(turns[0])
        for reply, turn in zip(turns[1::2], turns[2::2]):
            text += self.past + (reply.strip() if self.strip_reply else reply) + self.between + self._said(turn)
        return text + self.reply

    def _said(self, text: str) -> str:
        return text.strip() if self.strip else text

    def data(self) -> dict[str, Any]:
        """Return the texts as plain data."""
        return {**asdict(self), "system": None if self.system is None else list(self.system)}

    @classmethod
    def of(cls, data: Any) -> Turns:
        """Build the style from plain data.

        Raises:
            ValueError: If a text is missing, unknown, too long or not a str.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or not {"first", "reply", "between", "past"} <= data.keys() <= names:
            raise ValueError(f"turns must name {', '.join(sorted(names))}, got {shown(data)}")
        for name, value in data.items():
            if name.startswith("strip"):
                fits = isinstance(value, bool)
            elif name == "system":
                fits = value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_text, value)))
            else:
                fits = _is_text(value)
            if not fits:
                raise ValueError(f"turns: {name} cannot be {shown(value)}")
        system = data.get("system")
        return cls(**{**data, "system": None if system is None else (system[0], system[1])})


def takes_system_prompt(style: PromptStyle) -> bool:
    """Return whether a prompt style puts a system prompt into its text; many of litgpt's leave it out."""
    if isinstance(style, Turns):
        return style.system is not None
    return MARK in style.apply("?", sys_prompt=MARK)


def check_system_prompt(style: PromptStyle, sys_prompt: str | None) -> None:
    """Refuse a system prompt that a prompt style would leave out.

    Raises:
        ValueError: If there is one, and the style has no place for it.
    """
    if sys_prompt and not takes_system_prompt(style):
        whose = "chat template" if isinstance(style, Turns) else f"prompt style, {type(style).__name__},"
        raise ValueError(
            f"This model's {whose} has no place for a system prompt: leave it out, or write it into the prompt."
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST
