"""The workflows, issue forms and citation parse, are pinned, and name commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import litgpt_kv
from litgpt_kv.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
NAMES = {path: path.stem for path in [*WORKFLOWS, *FORMS]}


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_there_are_workflows_and_forms() -> None:
    assert {path.stem for path in WORKFLOWS} >= {"tests", "docs", "wheel"}
    assert {path.stem for path in FORMS} >= {"bug", "new_strategy"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=NAMES.get)
def test_a_workflow(path: Path) -> None:
    workflow, text = parsed(path), path.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert workflow[True].keys() <= {"push", "pull_request"}  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands and all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())
    for command in commands:
        assert re.fullmatch(r"make [a-z]+", command) and command.split()[1] in targets, command
    uses = re.findall(r"uses: (.*)", text)
    assert len(uses) == sum("uses" in step for step in steps)
    for action in uses:  # a tag may be moved, a commit not
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


@pytest.mark.parametrize("path", FORMS, ids=NAMES.get)
def test_an_issue_form(path: Path) -> None:
    form, text = parsed(path), path.read_text(encoding="utf-8")
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)
    for field in fields:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes") and field["attributes"]["label"]
    for command in re.findall(r"litgpt_kv ([a-z_]+)", text):
        assert command in COMMANDS
    for file in re.findall(r"\b[A-Z]+\.md\b", text):
        assert (ROOT / file).is_file()


def test_the_citation_is_of_this_version() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["version"] == litgpt_kv.__version__
    assert citation["license"] == "Apache-2.0" and citation["authors"] and citation["title"]
