"""What the pages must list."""

from __future__ import annotations

import re

import yaml

from litgpt_kv import registry
from tests.docs.pages import ROOT

LITGPT = (1898, 714, 345, 1601, 556, 1671, 1647, 1595, 1672, 1663, 2182, 1891, 1934, 2061)  # asked of litgpt


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def shipped(kind: str) -> list[str]:
    return [n for n in registry.names(kind) if registry.get(kind, n).__module__.startswith("litgpt_kv.")]


def test_every_strategy_is_in_the_table_and_has_notes() -> None:
    notes = yaml.safe_load(page("strategy_notes.yaml"))
    assert sorted(notes) == sorted(shipped("strategy"))
    for name, note in notes.items():
        assert f"| `{name}` |" in page("strategies.md"), name
        assert set(note) == {"formula", "use"} and all(note.values()), name


def test_the_readme_counts_strategies() -> None:
    assert f" {len(shipped('strategy'))} strategies" in (ROOT / "README.md").read_text(encoding="utf-8").replace(
        "\n", " "
    )


def test_every_storage_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`.*?) \|", page("options.md"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert set(shipped("storage")) <= names


def test_every_request_to_litgpt_is_answered() -> None:
    found = re.findall(
        r"\[#(\d+)\]\(https://github.com/Lightning-AI/litgpt/(?:issues|pull)/(\d+)\)", page("litgpt_users.md")
    )
    assert all(shown == linked for shown, linked in found)
    assert sorted(int(number) for number, _ in found) == sorted(LITGPT)
