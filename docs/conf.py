"""How Sphinx builds this folder: `make docs`, or `sphinx-build -W docs build/docs`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent / "_ext"), str(ROOT)]

from litgpt_kv import __version__  # noqa: E402  (found through the line above)

project = "litgpt_kv"
author = "the litgpt_kv authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "strategy_pages"]
exclude_patterns = ["_ext", "notebooks/.ipynb_checkpoints"]
default_role = "literal"  # docstrings put names between single backticks

html_theme = "furo"
html_title = f"litgpt_kv {release}"
html_static_path: list[str] = []
html_show_sourcelink = False
html_show_copyright = False

myst_heading_anchors = 3
source_suffix = {".md": "markdown", ".ipynb": "markdown"}  # strategy_pages makes Markdown of notebooks

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True
