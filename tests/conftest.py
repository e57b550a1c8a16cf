"""Shared by all tests: one thread, fixed seeds, tiny float64 models."""

from __future__ import annotations

import pytest
import torch

from litgpt_kv import GPT
from tests.oracle.reference import tiny

torch.set_num_threads(1)


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
