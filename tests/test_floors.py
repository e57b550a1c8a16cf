"""Imports only go down the floors, the lower floors stay light, and no module grows past what a reader can take in.

A floor is a folder (or a module) of the package; type-only imports count, too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import litgpt_kv

ROOT = Path(litgpt_kv.__file__).parent
MODULES = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p for p in ROOT.rglob("*.py")}
INNER = sorted(m for m in MODULES if m != "__init__")  # the package's own face stands above all floors
ORDER = [  # lowest first; what stands on one line may not import each other
    ["registry", "disk"],
    ["config"],
    ["arguments"],
    ["attention"],
    ["cache"],
    ["model"],
    ["compat"],
    ["generate"],
    ["parallel"],
    ["llm"],
    ["serve", "evaluate", "benchmark", "convert", "calibrate"],
    ["inspect"],
    ["cli"],
    ["install", "checkpoint", "__main__"],  # old import paths, and the program
]
FLOORS = {folder: floor for floor, folders in enumerate(ORDER) for folder in folders}
LIGHT = FLOORS["model"]
HEAVY = {"lightning", "jsonargparse", "transformers", "triton"}
# inside the cache: strategies and storages know neither the cache nor each other
INSIDE = {
    "cache.strategies": {"cache.strategies", "cache.spec"},
    "cache.storage": {"cache.storage", "cache.spec"},
}


def folder_of(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path, module: str) -> set[str]:
    """Full names of everything a file imports, inside functions and for type checkers too."""
    package = ["litgpt_kv", *module.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def inside(found: set[str]) -> set[str]:
    """What comes from this package, without its name: `litgpt_kv.cache.slots.Slots` is `cache.slots.Slots`."""
    return {name.partition(".")[2] for name in found if name.startswith("litgpt_kv.")}


def broken(module: str, found: set[str]) -> list[str]:
    """The rules that a module's imports break."""
    own = folder_of(module)
    wrong = []
    for other in inside(found) - {"__version__"}:
        folder = folder_of(other)
        floor = FLOORS.get(folder, FLOORS["cli"])  # a name of the package's face: above all but the commands
        if folder != own and floor >= FLOORS[own]:
            wrong.append(f"{module} imports {other}, which is not below it")
    for part, allowed in INSIDE.items():
        if module.startswith(part + "."):
            wrong += [
                f"{module} must not know {other}"
                for other in inside(found)
                if folder_of(other) == "cache" and not other.startswith(tuple(allowed))
            ]
    heavy = {name.split(".")[0] for name in found} & HEAVY
    return wrong + [f"{module} imports {name}, which is heavy" for name in sorted(heavy) if FLOORS[own] <= LIGHT]


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves in the end."""
    found, done = [], set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())
    return found


def module_of(name: str) -> str | None:
    """The module that an imported name is or is in; None for a name of the package's face or of a folder's."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def test_every_folder_has_a_floor() -> None:
    assert {folder_of(m) for m in INNER} <= set(FLOORS), "give the new folder a floor, here and in the design"


@pytest.mark.parametrize("module", INNER)
def test_imports_go_down_and_the_lower_floors_are_light(module: str) -> None:
    assert broken(module, imports(MODULES[module], module)) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    edges = {m: {o for n in inside(imports(MODULES[m], m)) if (o := module_of(n)) and o != m} for m in INNER}
    assert len(edges) > 30 and any(edges.values())
    assert cycles(edges) == []


def test_the_face_of_the_package_is_light() -> None:
    assert not {name.split(".")[0] for name in imports(MODULES["__init__"], "__init__")} & HEAVY


def test_the_rules_find_what_they_look_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from typing import TYPE_CHECKING\nfrom litgpt_kv import GPT\ndef f():\n    import lightning.fabric\n"
        "if TYPE_CHECKING:\n    from ..model import gpt\n"
    )
    found = imports(bad, "attention.bad")
    assert found == {"typing.TYPE_CHECKING", "litgpt_kv.GPT", "litgpt_kv.model.gpt", "lightning.fabric"}
    assert len(broken("attention.bad", found)) == 3
    assert broken("cache.strategies.h2o", {"litgpt_kv.cache.slots.Slots"})
    assert broken("cache.slots", {"litgpt_kv.cache.strategies.base.Strategy"}) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a -> b -> c -> a"]
    assert cycles({"a": {"b", "c"}, "b": {"c"}}) == []


FILES = sorted([*ROOT.rglob("*.py"), *Path(__file__).parent.rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_module_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("module", MODULES)
def test_no_global_changes(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Global)] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_global_of_the_process_is_swapped(module: str) -> None:
    """What a run needs is handed over: no context variables, no other `sys.stdout`, no hooks."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets]
    targets = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    swapped = {ast.unparse(t) for t in targets} & {f"sys.{n}" for n in ("stdin", "stdout", "stderr", "excepthook")}
    assert swapped == set()
    assert "contextvars.ContextVar" not in imports(MODULES[module], module)
