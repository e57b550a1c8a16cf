"""The pages for users, and what their code blocks say."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from litgpt_kv import registry

ROOT = Path(__file__).parents[2]
OWN_TEST = {"docs/serve.md", "docs/inspect.md", "docs/lm_eval.md"}  # tests/serve, tests/inspect, tests/evaluate
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "_build" not in p.parts]


@dataclass(frozen=True)
class Block:
    """A code block: its page, its kind ("bash", "python", "text", ...), its number on the page, and its lines."""

    page: str
    kind: str
    number: int
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that a Python block is, as its first line says: `# my_file.py`."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if self.kind == "python" and found else None


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(kind: str) -> list[Block]:
    """All blocks of one kind, of the README and of every page in docs/."""
    out = []
    for page in PAGES:
        if name_of(page) in OWN_TEST:
            continue
        found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        texts = [text for k, text in found if k == kind]
        out += [Block(name_of(page), kind, n, text) for n, text in enumerate(texts)]
    return out


def commands() -> dict[str, str]:
    """Every command of a bash block, and the first page that has it."""
    out: dict[str, str] = {}
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                out.setdefault(line.strip(), block.page)
    return out


@contextlib.contextmanager
def own_strategies_forgotten() -> Iterator[None]:
    """Forget the strategies that examples register and the files that they import, so that other tests meet none."""
    imported = dict(registry.IMPORTED)
    try:
        yield
    finally:
        table = registry._KINDS["strategy"]
        for name in [name for name, cls in table.items() if not cls.__module__.startswith(("litgpt_kv.", "tests."))]:
            del table[name]
        registry.IMPORTED.clear()
        registry.IMPORTED.update(imported)
        for name in [name for name in sys.modules if name.startswith("litgpt_kv_file_")]:
            del sys.modules[name]
