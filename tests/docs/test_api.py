"""The reference of the Python interface has every public name, and nothing that is not there."""

from __future__ import annotations

import importlib
import re

import litgpt_kv
from tests.docs.pages import ROOT

PACKAGES = ("litgpt_kv", "litgpt_kv.generate", "litgpt_kv.inspect", "litgpt_kv.calibrate", "litgpt_kv.parallel")
ELSEWHERE = {"Seen", "PARALLEL_STRATEGIES"}  # an old name; a table whose values are in docs/many_devices.md


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^\.\. auto(?:class|function|data):: ([\w.]+)$", text, flags=re.MULTILINE)
    assert len(listed) == len(set(listed)) > 30
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name
    last = {name.rpartition(".")[2] for name in listed}
    for package in PACKAGES:
        missing = {*importlib.import_module(package).__all__} - last - ELSEWHERE
        assert not missing, (package, missing)
    assert litgpt_kv.Seen is litgpt_kv.Tokens and "`litgpt_kv.Seen` is the old name of this class" in text
