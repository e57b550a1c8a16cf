"""Render a chat template that a stranger wrote, in a process of its own with little time and memory.

Run as a file, so that nothing of this package is imported: standard input has JSON with "template", "names" (what the
template may read) and "conversations"; standard output gets a JSON list with a text, or null where the template refuses
a conversation, for each.
"""

from __future__ import annotations

import contextlib
import json
import sys

SECONDS = 2  # of computing
MEMORY = 512 * 2**20  # bytes
MOST = 100_000  # characters of a rendered conversation


def main() -> None:
    """Limit this process, then render."""
    try:
        import resource
    except ImportError:  # Windows: the caller's time limit holds there, too
        pass
    else:
        for what, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY)):
            with contextlib.suppress(ValueError, OSError):  # macOS knows no limit of memory
                resource.setrlimit(what, (most, most + 1))
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: object = "") -> None:
        raise TemplateError(str(message))

    asked = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **given: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(asked["template"])
    texts = []
    for messages in asked["conversations"]:
        try:
            text = template.render(messages=messages, add_generation_prompt=True, **asked["names"])
        except Exception:  # whatever a template does wrong: it cannot say this conversation
            text = None
        texts.append(text if text is None or len(text) <= MOST else None)
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules have common names
    main()
