"""Sphinx builds docs/ with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import warm
from tests.docs.pages import ROOT

for package in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(package)


def test_the_documentation_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "doctrees"]
    done = warm.run([*command, ROOT / "docs", tmp_path / "html"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*") if page.suffix in (".md", ".ipynb")]
    for page in pages:
        assert (tmp_path / "html" / page.with_suffix(".html")).exists(), page
    strategies = (tmp_path / "html" / "strategies.html").read_text(encoding="utf-8")
    assert 'id="h2o"' in strategies and "When to use it" in strategies  # made from the registry
    notebook = (tmp_path / "html" / "notebooks" / "read_once.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in notebook and "of 8 answers" in notebook  # with the stored outputs
    assert 'id="litgpt_kv.KVCache.build"' in (tmp_path / "html" / "api" / "cache.html").read_text(encoding="utf-8")
