"""Imports only go down the floors, the lower floors stay light, and no module grows past what one can read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import litgpt_kv

ROOT = Path(litgpt_kv.__file__).parent
MODULES = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p for p in ROOT.rglob("*.py")}
INNER = sorted(m for m in MODULES if m != "__init__")  # the package's own face stands above all floors
FLOORS = dict(
    registry=0,
    config=0,
    positions=1,
    attention=1,
    storage=1,
    strategies=2,
    slots=3,
    linear=1,
    yarn=1,
    plan=3,
    layer=3,
    cache=3,
    saving=3,
    shim=3,
    latent=4,
    model=4,
)
FLOORS |= dict.fromkeys(["generate", "install", "parallel"], 5)
FLOORS |= dict.fromkeys(["api", "chat", "checkpoint", "cli", "commands", "files", "quantize", "talk", "__main__"], 6)
FLOORS |= dict.fromkeys(["benchmark", "benchmark_batches", "benchmark_parallel", "planning"], 6)
HEAVY = {"lightning", "jsonargparse", "transformers", "triton"}
NEVER = {("cache", "model"), *(("strategies", other) for other in ("storage", "slots", "cache", "model"))}


def room(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path, module: str) -> set[str]:
    """Full names of everything a file imports, inside functions too; what only type checkers see is left out."""
    package = ["litgpt_kv", *module.split(".")[:-1]]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    skipped = {inner for n in hidden for inner in ast.walk(n)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in skipped:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in skipped:
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def inside(found: set[str]) -> set[str]:
    """What comes from this package: rooms (`litgpt_kv.cache.KVCache` is in `cache`) and names of its own face."""
    return {name.split(".")[1] for name in found if name.startswith("litgpt_kv.")}


def broken(module: str, found: set[str]) -> list[str]:
    """The rules that a module's imports break."""
    mine, floor = room(module), FLOORS[room(module)]
    wrong = [f"{module} imports {other}, which is above it" for other in inside(found) if FLOORS.get(other, 5) > floor]
    wrong += [f"{module} must not know {other}" for other in inside(found) if (mine, other) in NEVER]
    heavy = {name.split(".")[0] for name in found} & HEAVY
    return wrong + [f"{module} on floor {floor} imports {name}" for name in sorted(heavy) if floor <= 4]


def test_every_room_has_a_floor() -> None:
    assert {room(m) for m in INNER} <= set(FLOORS), "give the new room a floor, here and in the design"


@pytest.mark.parametrize("module", INNER)
def test_imports_go_down_and_the_lower_floors_are_light(module: str) -> None:
    assert broken(module, imports(MODULES[module], module)) == []


def test_the_face_of_the_package_is_light() -> None:
    assert not {name.split(".")[0] for name in imports(MODULES["__init__"], "__init__")} & HEAVY


def test_the_rules_find_what_they_look_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from litgpt_kv import GPT\ndef f():\n    from . import model\n    import lightning.fabric\n")
    found = imports(bad, "storage")
    assert found == {"litgpt_kv.GPT", "litgpt_kv.model", "lightning.fabric"}
    assert len(broken("storage", found)) == 3
    assert imports(bad, "generate.base") == {"litgpt_kv.GPT", "litgpt_kv.generate.model", "lightning.fabric"}
    assert broken("generate.base", imports(bad, "generate.base")) == []
    assert broken("cache", {"litgpt_kv.model.GPT"})
    assert broken("slots", {"litgpt_kv.cache.KVCache"}) == []  # both on floor 3


FILES = sorted([*ROOT.rglob("*.py"), *Path(__file__).parent.rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_module_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("module", MODULES)
def test_no_global_changes(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Global)] == []
