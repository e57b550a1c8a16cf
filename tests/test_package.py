"""The wheel holds all that it needs, its metadata is true, and importing it is cheap."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import litgpt_kv

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead another interpreter back to the checkout."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


# -- dependencies ------------------------------------------------------------------------------------------------------


PACKAGES = {"llama_cpp": "llama-cpp-python"}  # of modules that need not be installed and are called otherwise


def imported(*folders: Path) -> set[str]:
    """Names of the distributions that the modules in some folders import, wherever in the file."""
    names: set[str] = set()
    own = {path.stem for folder in folders for path in folder.rglob("*.py")} | {"litgpt_kv", "tests"}
    for path in (p for folder in folders for p in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    found = metadata.packages_distributions()
    return {
        found.get(name, [PACKAGES.get(name, name)])[0].lower().replace("_", "-")
        for name in names - own - set(sys.stdlib_module_names)
    }


def required(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", r)[0].lower().replace("_", "-") for r in requirements}


def test_dependencies_are_what_is_imported_and_nothing_else() -> None:
    others = {
        "test",
        "dev",
        "docs",
        "hf",
        "notebooks",
        "quantize",
        "ray",
    }  # what tests, docs and extensions need, and what litgpt imports by itself
    extras = [name for name in PROJECT["optional-dependencies"] if name not in others]
    optional = {name for extra in extras for name in required(PROJECT["optional-dependencies"][extra])}
    assert imported(ROOT / "litgpt_kv") == required(PROJECT["dependencies"]) | optional


def test_only_the_server_needs_what_its_extra_has() -> None:
    extra = required(PROJECT["optional-dependencies"]["serve"])
    folders = [p for p in (ROOT / "litgpt_kv").iterdir() if p.is_dir() and p.name != "serve"]
    assert extra <= imported(ROOT / "litgpt_kv" / "serve")
    assert not imported(*folders) & extra


def test_tests_need_nothing_that_the_test_extra_lacks() -> None:
    extra = required(PROJECT["optional-dependencies"]["test"]) | required(PROJECT["optional-dependencies"]["serve"])
    conditional = {"tomli", "lm-eval"}  # the first comes with pytest, and tests of the other are skipped without it
    assert imported(ROOT / "tests") - conditional <= required(PROJECT["dependencies"]) | extra


def test_metadata() -> None:
    assert PROJECT["name"] == "litgpt-kv"
    assert PROJECT["requires-python"] == ">=3.10"
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["scripts"] == {"litgpt_kv": "litgpt_kv.__main__:main"}
    assert {"litgpt>=0.5.13,<0.6", "torch>=2.7"} <= set(PROJECT["dependencies"])
    assert set(PROJECT["optional-dependencies"]) >= {"test", "dev"}
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


# -- the wheel ---------------------------------------------------------------------------------------------------------


one_worker = pytest.mark.xdist_group("wheel")  # which builds it once


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, so that nothing is written here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, dirs_exist_ok=True, ignore=ignore)
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", *isolation]
    run(*pip, "--wheel-dir", out, source, cwd=out)
    return next(out.glob("litgpt_kv-*-py3-none-any.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment outside the checkout with the wheel, and, to save gigabytes, the dependencies installed here."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    # an editable install of the checkout there is a .pth file, which is not read a second time
    (site / "zz_dependencies.pth").write_text("\n".join({sysconfig.get_path(p) for p in ("purelib", "platlib")}))
    return folder


@one_worker
def test_the_wheel_holds_every_file_of_the_package_and_the_config_hub(wheel: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {p.relative_to(ROOT).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}

    expected = files(ROOT / "litgpt_kv") | {f"litgpt_kv/{name}" for name in files(ROOT / "config_hub")}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == expected
    assert {"litgpt_kv/demo/lit_model.pth", "litgpt_kv/demo/model_config.yaml"} <= inside
    assert any(name.startswith("litgpt_kv/config_hub/generate/") for name in inside)


@one_worker
def test_the_wheels_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    headers = HeaderParser().parsestr(archive.read(name).decode())
    assert headers["Name"] == "litgpt-kv"
    assert headers["Requires-Python"] == ">=3.10"
    assert headers["License-Expression"] == "Apache-2.0"
    assert "litgpt_kv = litgpt_kv.__main__:main" in archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())


@one_worker
def test_the_wheel_runs_in_an_empty_environment_outside_the_checkout(environment: Path) -> None:
    where = run(
        environment / "bin" / "python", "-c", "import litgpt_kv; print(litgpt_kv.__file__)", cwd=environment
    ).stdout
    assert Path(where.strip()).is_relative_to(environment)
    command = [environment / "bin" / "litgpt_kv", "generate", "demo", "--kv-cache", "h2o", "--kv-cache.budget", "16"]
    done = run(*command, "--prompt", "def ", "--max-new-tokens", "24", cwd=environment)
    assert done.stdout.startswith("def ")
    assert len(done.stdout) > len("def ") + 12


@one_worker
def test_the_wheels_strategies_are_listed(environment: Path) -> None:
    listed = run(environment / "bin" / "litgpt_kv", "strategies", cwd=environment).stdout
    for name in ("dense", "window", "sink", "h2o"):
        assert re.search(rf"^\s*{name}\b", listed, flags=re.M), listed


# -- import time -------------------------------------------------------------------------------------------------------

IMPORTS = """
import json, sys, time
import litgpt
before, began = set(sys.modules), time.process_time()
import litgpt_kv.llm.llm, litgpt_kv.cache, litgpt_kv.compat.input_pos
print(json.dumps({"seconds": time.process_time() - began, "modules": sorted(set(sys.modules) - before)}))
"""


def test_importing_costs_little_more_than_litgpt(tmp_path: Path) -> None:
    """litgpt_kv imports litgpt; beyond it, only its own modules are loaded, in little processor time; best of three."""
    assert Path(litgpt_kv.__file__).is_relative_to(ROOT)
    seconds = []
    for _ in range(3):
        env = {**clean_environment(), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        others = {name.split(".")[0] for name in found["modules"]} - {"litgpt_kv", *sys.stdlib_module_names}
        assert others <= {"filelock", "safetensors", "torch"}, "what litgpt needs not must be imported where it is used"
        seconds.append(found["seconds"])
        if min(seconds) <= 0.3:
            break
    assert min(seconds) <= 0.3
