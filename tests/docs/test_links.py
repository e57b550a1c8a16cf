"""Links between the files of this repository lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

GUIDES = ("CONTRIBUTING.md", "SECURITY.md", "extensions", "litgpt_kv/cache/README.md", "tests/semantics/README.md")
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.ipynb"))]
FILES += [file for name in GUIDES for file in ([ROOT / name] if name.endswith(".md") else (ROOT / name).rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def text_of(file: Path) -> str:
    """The Markdown of a page or a notebook, without code."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return CODE.sub(lambda code: code[0] if code[0].startswith("`") and "\n" not in code[0] else "", text)


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", text_of(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links(file: Path) -> None:
    for link in LINK.findall(text_of(file)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{link} of {file.name}"
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), f"{link} of {file.name}"


CORE = [file for file in FILES if "extensions" not in file.parts]  # extensions also name files of other repositories


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_paths_in_code_exist(file: Path) -> None:
    paths = re.findall(r"`((?:tests|litgpt_kv|docs|extensions|config_hub)/[\w./-]+)`", text_of(file))
    missing = [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert missing == [], file.name


def test_every_drawing_is_used() -> None:
    text = "".join(text_of(file) for file in FILES)
    for drawing in (ROOT / "docs" / "images").iterdir():
        assert f"images/{drawing.name})" in text, drawing.name
