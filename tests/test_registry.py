"""Names: what is registered is found, what is not is refused helpfully, and other packages' classes are found too."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import litgpt_kv
from litgpt_kv import Strategy, register, registry
from tests import warm


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of their own for a test that registers."""
    monkeypatch.setattr(registry, "_KINDS", {kind: dict(table) for kind, table in registry._KINDS.items()})


def test_what_is_here() -> None:
    assert {"dense", "h2o", "sink", "window"} <= set(registry.names("strategy"))
    assert "plain" in registry.names("storage")
    assert registry.names("strategy") == sorted(registry.names("strategy"))
    for name in registry.names("strategy"):
        strategy = registry.build("strategy", name)
        assert isinstance(strategy, Strategy)
        assert (type(strategy).__doc__ or "").strip(), f"{name} says nothing of itself"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown strategy 'h20'\. Available: .*dense.*h2o.*sink.*window"):
        registry.get("strategy", "h20")
    with pytest.raises(ValueError, match=r"Unknown storage 'int3'\. Available: .*plain"):
        registry.build("storage", "int3")


@pytest.mark.parametrize(
    "call", [registry.names, lambda kind: registry.get(kind, "x"), lambda kind: register(kind, "x")]
)
def test_an_unknown_kind_lists_the_known_ones(call) -> None:
    with pytest.raises(ValueError, match=r"Unknown kind 'strategies'\. Available: strategy, storage, kernel"):
        call("strategies")


@pytest.mark.parametrize("name", ["", "H2O", "my name", "my\tname", " x"])
def test_a_malformed_name_is_refused(name: str, scratch: None) -> None:
    with pytest.raises(ValueError, match="lower case without spaces"):
        register("strategy", name)


@pytest.mark.usefixtures("scratch")
def test_register_and_build_with_options() -> None:
    @register("strategy", "mine")
    @dataclass(frozen=True)
    class Mine(Strategy):
        alpha: float = 0.5

    assert registry.get("strategy", "mine") is Mine
    assert "mine" in registry.names("strategy")
    assert registry.build("strategy", "mine").alpha == 0.5
    assert registry.build("strategy", "mine", alpha=0.25).alpha == 0.25
    with pytest.raises(ValueError, match=r"Unknown option 'beta' for the strategy 'mine'\. It takes alpha\."):
        registry.build("strategy", "mine", beta=1)


def test_options_of_a_strategy_without_any() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown option 'alpha', 'beta' for the strategy 'tova'\. It takes no options\."
    ):
        registry.build("strategy", "tova", beta=1, alpha=2)


@pytest.mark.usefixtures("scratch")
def test_a_taken_name_is_refused_and_a_reloaded_class_is_not() -> None:
    with pytest.raises(ValueError, match=r"strategy 'h2o' is already registered by litgpt_kv\.cache\.\S*\.H2O"):

        @register("strategy", "h2o")
        class Other(Strategy):
            pass

    again = type("H2O", (Strategy,), {"__module__": "litgpt_kv.cache.strategies.h2o", "__qualname__": "H2O"})
    register("strategy", "h2o")(again)  # what importlib.reload does
    assert registry.get("strategy", "h2o") is again


@pytest.mark.usefixtures("scratch")
def test_kinds_have_names_of_their_own() -> None:
    @register("storage", "h2o")
    class Stored:
        pass

    assert registry.get("storage", "h2o") is Stored
    assert registry.get("strategy", "h2o") is not Stored


# -- another package, through its entry point --------------------------------------------------------------------------

LATEST_AND_ODD = """
    from dataclasses import dataclass

    import torch
    from litgpt_kv import Strategy, register


    @register("strategy", "odd-first")
    @dataclass(frozen=True)
    class OddFirst(Strategy):
        '''Odd positions are worth more than even ones.'''

        bonus: float = 1000.0

        def score(self, tokens):
            return tokens.pos + self.bonus * (tokens.pos % 2)
"""

USE = """
    import json

    import torch
    from litgpt.config import Config
    from litgpt_kv import GPT, KVCache, KVCacheArgs, registry

    config = Config(name="x", n_layer=1, n_head=2, n_embd=16, block_size=64, padded_vocab_size=32, vocab_size=32)
    model = GPT(config)
    names = registry.names("strategy")
    cache = KVCache.build(model, KVCacheArgs(strategy="odd-first", budget=6), batch_size=1, max_tokens=40)
    with torch.no_grad():
        model(torch.arange(16).view(1, 16), cache, torch.tensor([16]))
        for t in range(16, 21):
            model(torch.tensor([[t]]), cache)
    print(json.dumps({"names": names, "kept": sorted(cache.slots[0].pos[0, 0, 0].tolist())}))
"""


def installed(site: Path, module: str, entry: str) -> None:
    """What an installer leaves of a package with one module and one entry point."""
    (site / "odd_first.py").write_text(textwrap.dedent(module))
    info = site / "odd_first-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-first\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[litgpt_kv.strategies]\nodd = {entry}\n")
    (info / "RECORD").write_text("")


def outside(code: str, site: Path, run: Callable = warm.run) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own that sees `site` and this litgpt_kv, away from the checkout."""
    path = os.pathsep.join([str(site), str(Path(litgpt_kv.__file__).parents[1])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return run(command, env=env, cwd=site, capture_output=True, text=True, timeout=600)


def test_a_strategy_of_another_package_is_listed_and_used_by_name(tmp_path: Path) -> None:
    import json

    installed(tmp_path, LATEST_AND_ODD, "odd_first")
    done = outside(USE, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "odd-first" in found["names"]
    assert {"dense", "h2o"} <= set(found["names"])
    # 20 evicted the least: each step evicts one, then writes, so the newest even token stays beside the odd ones
    assert found["kept"] == [11, 13, 15, 17, 19, 20]


def test_importing_litgpt_kv_does_not_import_the_other_package(tmp_path: Path) -> None:
    installed(tmp_path, "raise SystemExit('imported too early')", "odd_first")
    done = outside("import litgpt_kv", tmp_path, run=subprocess.run)  # nothing is imported there before
    assert done.returncode == 0, done.stderr


def test_a_broken_package_is_named(tmp_path: Path) -> None:
    """Whoever installed it must be able to see which package to remove."""
    installed(tmp_path, "import no_such_module_of_mine", "odd_first")
    done = outside("from litgpt_kv import registry; registry.names('strategy')", tmp_path)
    assert done.returncode != 0
    assert "no_such_module_of_mine" in done.stderr
    assert "odd_first" in done.stderr
