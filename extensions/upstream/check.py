"""Apply each patch to a copy of litgpt and run its test: it has to fail before and to pass after.

    python extensions/upstream/check.py [NAME ...] [--litgpt FOLDER] [--keep FOLDER]

`NAME`: patches by their names or numbers, all by default. `--litgpt`: the folder that holds the package `litgpt`, such
as a checkout of its repository; by default the installed one. `--keep`: where to leave the patched copies.

The exit code is 0 if every patch applies, is at most 60 lines long and does what its test says. Needs git and pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import logging
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

PATCHES = Path(__file__).parent / "patches"
COMMIT = "26857050fe3ff627cd714fe92f5838f51a3d5efa"  # litgpt's main of 29 June 2026, which is its release 0.5.13
LINES = 60  # added and removed, test included


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--litgpt", type=Path, default=installed())
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args(arguments)
    patches = chosen(parser, asked.names)
    if not (asked.litgpt / "litgpt" / "model.py").is_file():
        parser.error(f"--litgpt: {asked.litgpt} holds no package litgpt")
    print(f"litgpt of {asked.litgpt}; the patches were made for {COMMIT[:8]}, which is 0.5.13")
    logging.disable(logging.INFO)  # "Seed set to 1234"
    with tempfile.TemporaryDirectory(prefix="litgpt_patches_") as temporary:
        folder = asked.keep or Path(temporary)
        good = [check(patch, asked.litgpt, folder / patch.stem) for patch in patches]
    print(f"{sum(good)} of {len(good)} patches apply, and their tests fail before and pass after")
    return 0 if all(good) else 1


def check(patch: Path, source: Path, folder: Path) -> bool:
    """Apply one patch to a copy of `source` in `folder`; print a line about it and return whether all is well."""
    lines = [line for line in patch.read_text().splitlines() if line.startswith(("+", "-"))]
    changed = sum(not line.startswith(("+++ ", "--- ")) for line in lines)
    shutil.copytree(source / "litgpt", folder / "litgpt")
    problems = [] if changed <= LINES else [f"longer than {LINES} lines"]
    reason = ""
    try:
        apply(patch, folder, "--include=tests/*")
        tests = sorted((folder / "tests").glob("test_*.py"))
        before = failures(folder, tests)
        reason = "; ".join(before)
        if not before:
            problems.append("its test passes without it")
        apply(patch, folder, "--exclude=tests/*")
        problems += [f"fails after it: {failure}" for failure in failures(folder, tests)]
    except subprocess.CalledProcessError as error:
        problems.append(f"does not apply: {error.stderr.strip()}")
    state = "; ".join(problems) or "ok"
    print(
        f"{patch.stem:26} {changed:3} lines  {state}" + f"\n{'':26} before: {reason[:160]}" * bool(reason), flush=True
    )
    return not problems


def failures(folder: Path, tests: list[Path]) -> list[str]:
    """Run the functions `test_*` of some files with the litgpt in `folder`; return what went wrong, a line each.

    An import that fails is an error, not a failure of a test. A test file must use no fixtures.
    """
    found = []
    with litgpt_of(folder):
        for file in tests:
            functions = {name: thing for name, thing in runpy.run_path(str(file)).items() if name.startswith("test_")}
            if not functions:
                raise ValueError(f"{file} has no function test_*")
            for name, function in functions.items():
                try:
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        function()
                except (Exception, pytest.fail.Exception) as error:
                    if isinstance(error, (AttributeError, ImportError, SyntaxError)):
                        raise  # the test itself is broken
                    text = " ".join(str(error).split())
                    found.append(
                        f"{name}: {type(error).__name__}: {text}" if text else f"{name}: {type(error).__name__}"
                    )
    return found


@contextlib.contextmanager
def litgpt_of(folder: Path):
    """Import the litgpt in `folder`, in place of the one imported before."""

    def is_litgpt(name: str) -> bool:
        return name.partition(".")[0] == "litgpt"

    others = {name: sys.modules.pop(name) for name in list(sys.modules) if is_litgpt(name)}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("litgpt")
            if not Path(module.__file__).is_relative_to(folder):
                raise ImportError(f"litgpt was imported from {module.__file__}, not from {folder}")
            yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if is_litgpt(name)]:
            del sys.modules[name]
        sys.modules.update(others)


def apply(patch: Path, folder: Path, part: str) -> None:
    # GIT_DIR: as if outside any repository, whose folders git would otherwise take paths to be relative to
    environment = {**os.environ, "GIT_DIR": os.devnull}
    command = ["git", "apply", part, str(patch.resolve())]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)


def chosen(parser: argparse.ArgumentParser, names: list[str]) -> list[Path]:
    patches = sorted(PATCHES.glob("*.patch"))
    known = {key: patch for patch in patches for key in (patch.stem, *patch.stem.split("_", 1))}
    for name in names:
        if name not in known:
            parser.error(f"no patch {name!r}; there are {', '.join(patch.stem for patch in patches)}")
    return [known[name] for name in names] or patches


def installed() -> Path:
    """The folder that holds the installed litgpt; which is not imported."""
    spec = importlib.util.find_spec("litgpt")
    if spec is None:
        raise SystemExit("litgpt is not installed: pip install litgpt==0.5.13")
    return Path(spec.origin).parents[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
