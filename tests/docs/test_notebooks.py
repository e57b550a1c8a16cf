"""The notebooks run, and are stored with their outputs and pictures."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import ROOT, own_strategies_forgotten

plt = pytest.importorskip("matplotlib.pyplot")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draw nothing on a screen, and forget strategies and figures."""
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.switch_backend("Agg")
    with own_strategies_forgotten():
        yield
    plt.close("all")


def cells_of(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook(notebook: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    pictures = 0
    for number, cell in enumerate(cells_of(notebook)):
        plt.close("all")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(
                compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec", dont_inherit=True),
                vars(module),
            )
        stored = "".join("".join(out.get("text", "")) for out in cell["outputs"])
        assert bool(stored) == bool(said.getvalue())
        drawn = [out for out in cell["outputs"] if "image/png" in out.get("data", {})]
        assert len(drawn) == len(plt.get_fignums())
        pictures += len(drawn)
    assert pictures >= 1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_stored_outputs(notebook: Path) -> None:
    """As `make notebooks` leaves them: run from top to bottom, without warnings and times."""
    cells = cells_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["metadata"] == {}
        assert all(out.get("name") != "stderr" and out["output_type"] != "error" for out in cell["outputs"])
