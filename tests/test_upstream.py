"""The patches for litgpt apply to the installed version, and each one's test fails before and passes after."""

from __future__ import annotations

import sys
from pathlib import Path

from tests import warm

FOLDER = Path(__file__).parents[1] / "extensions" / "upstream"


def test_patches() -> None:
    patches = sorted(patch.stem for patch in FOLDER.glob("patches/*.patch"))
    assert len(patches) >= 6
    text = (FOLDER / "README.md").read_text()
    assert [patch for patch in patches if f"`{patch}`" not in text] == []
    done = warm.run([sys.executable, FOLDER / "check.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    good = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" lines  ok")]
    assert good == patches


def test_a_patch_that_mends_nothing_is_found(tmp_path: Path) -> None:
    (tmp_path / "patches").mkdir()
    (tmp_path / "check.py").write_text((FOLDER / "check.py").read_text())
    text = (FOLDER / "patches" / "02_yarn_ramp.patch").read_text()
    useless = text.replace(
        "+            theta_extrapolation_factor = 1 - ramp_func", "+            theta_extrapolation_factor = ramp_func"
    )
    assert useless != text
    (tmp_path / "patches" / "02_yarn_ramp.patch").write_text(useless)
    (tmp_path / "patches" / "03_gone.patch").write_text(
        text.replace("theta_extrapolation_factor = ramp_func", "gone = 1")
    )
    done = warm.run([sys.executable, tmp_path / "check.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "fails after it" in done.stdout and "does not apply" in done.stdout
    assert "0 of 2 patches" in done.stdout
