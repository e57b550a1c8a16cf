"""Shared by all tests: one thread, fixed seeds, tiny float64 models."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from litgpt_kv import GPT
from tests import warm
from tests.oracle.reference import tiny

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what it starts in the background
LONG = ("parallel", "silence", "wheel")  # groups of tests that start first


def hide_transformers() -> tempfile.TemporaryDirectory:
    """Hides the transformers library from processes that tests start, as this package does not need it.

    Where it is installed torchmetrics imports it, a third of the time that such a process takes to start. What it finds
    here is too old for it. Python reads installed versions along its path, whose beginning this is.
    """
    folder = tempfile.TemporaryDirectory(prefix="litgpt_kv_tests_")
    about = Path(folder.name, "transformers-0.0.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.0\n")
    paths = [folder.name, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return folder


HIDDEN = hide_transformers()  # removed when the tests end


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist writes groups into names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first. Those that mostly wait are each beside one that starts processes, so that no core is idle."""

    def group(item: pytest.Item) -> str | None:
        return next((mark.args[0] for mark in item.iter_markers("xdist_group")), None)

    first = {name: [item for item in items if group(item) == name] for name in LONG}
    beside = itertools.zip_longest(first["parallel"], first["silence"])
    rest = [item for item in items if group(item) not in LONG]
    items[:] = [*filter(None, itertools.chain(*beside)), *first["wheel"], *rest]


def pytest_sessionfinish() -> None:
    warm.stop()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def gqa() -> GPT:
    """Two layers, four query heads, two key/value heads, float64."""
    return tiny(seed=0)


@pytest.fixture(scope="session")
def mha() -> GPT:
    return tiny(seed=1, n_query_groups=4)


@pytest.fixture(scope="session")
def mqa() -> GPT:
    return tiny(seed=2, n_query_groups=1)
