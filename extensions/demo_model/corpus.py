"""The text: the standard library's modules, split into training and held-out ones."""

import hashlib
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
HELD_OUT_SHARE = 32  # one module in so many, chosen by the hash of its path


@dataclass(frozen=True)
class Module:
    path: str
    text: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def _is_table(path: str, text: str) -> bool:
    """Files written by a program teach byte tables, not Python; `_sysconfigdata` also names the machine."""
    return (
        path == "pydoc_data/topics.py"
        or path.startswith(("_sysconfigdata", "config-"))
        or (path.startswith("encodings/") and ("generated from" in text[:400] or "gencodec" in text[:400]))
    )


def read_modules(root: Path | None = None) -> list[Module]:
    root = root or Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        with tokenize.open(file) as handle:  # honours coding cookies
            text = handle.read()
        if text.strip() and not _is_table(relative.as_posix(), text):
            modules.append(Module(relative.as_posix(), text))
    return sorted(modules, key=lambda module: module.path)


def split(modules: list[Module]) -> tuple[list[Module], list[Module]]:
    """(training, held out)"""
    return [m for m in modules if not m.held_out], [m for m in modules if m.held_out]


def digest(modules: list[Module]) -> str:
    """Names the corpus: the same digest means the same text in the same order."""
    total = hashlib.sha256()
    for module in modules:
        total.update(f"{module.path}\0{module.text}\0".encode())
    return total.hexdigest()[:16]


if __name__ == "__main__":
    everything = read_modules()
    for name, part in zip(("training", "held out"), split(everything), strict=True):
        print(f"{name}: {len(part)} modules, {sum(len(m.text.encode()) for m in part):,} bytes")
    print("digest:", digest(everything))
    print("held out:", *(m.path for m in everything if m.held_out))
