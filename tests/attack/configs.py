"""YAML files and options that try to run code, to expand without bound, or are damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.attack.harness import CANARY, Case, command, flipped

ROOT = Path(__file__).parents[2]
FAST = ["demo", "--accelerator", "cpu", "--threads", "1", "--max-new-tokens", "2"]
SMALL = ["demo", "--prompts=2", "--rows=1", "--longest=9", "--new-tokens=2", "--answers=2", "--fewest=1", "--repeats=1"]
COMMANDS = {"generate": FAST, "chat": FAST, "plan": ["pythia-14m"], "benchmark_batches": SMALL}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", CANARY]}}
CODE: list[Any] = [
    POPEN,
    {"class_path": "subprocess.check_call", "init_args": {"popenargs": [["touch", CANARY]]}},
    {"class_path": "os.system", "init_args": {"command": f"touch {CANARY}"}},
    {"class_path": "os.popen", "dict_kwargs": {"cmd": f"touch {CANARY}"}},
    {"class_path": "builtins.open", "init_args": {"file": CANARY, "mode": "w"}},
    {"class_path": "builtins.exec", "init_args": {"source": f"open({CANARY!r}, 'w')"}},
    {"class_path": "pathlib.Path.touch", "init_args": {"self": CANARY}},
    {"class_path": "io.FileIO", "init_args": {"file": CANARY, "mode": "w"}},
    {"class_path": "os.abort"},
    {"class_path": "canary_module.Canary"},
    {"class_path": "litgpt_kv.cli.parser.fail", "init_args": {"message": "x"}},
]
PLACES = ["budget", "sinks", "recent", "strategy", "storage", "positions", "options", "unknown"]
TAGS = [
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"!!python/object/apply:subprocess.Popen [[touch, {CANARY}]]",
    f"!!python/object/new:os.system ['touch {CANARY}']",
    "!!python/name:os.abort",
    "!!python/module:canary_module",
    f'!!python/object/apply:builtins.eval [\'open("{CANARY}", "w")\']',
    f"!!python/object:io.FileIO {{file: {CANARY}}}",
]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefghij", "bcdefghijk")
)
DAMAGED = {
    "bomb": BOMB + "kv_cache: *k\n",
    "a bomb in a budget": BOMB + "kv_cache: {strategy: h2o, budget: *k}\n",
    "an alias to itself": "kv_cache: &a {strategy: h2o, options: *a}\n",
    "2 MB": "prompt: " + "x" * 2_000_000 + "\n",
    "2 MB of comments": "# x\n" * 500_000,
    "deep lists": "kv_cache: " + "[" * 20_000,
    "deep closed lists": "kv_cache: {strategy: h2o, budget: " + "[" * 500 + "]" * 500 + "}",
    "deep mappings": "kv_cache: " + "{a: " * 5_000,
    "NUL": "\0" * 100,
    "no UTF-8": "\udcff\udcfe: 1",
    "a list": "- kv_cache\n",
    "a number": "7\n",
    "nothing": "",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a huge integer": f"seed: {'9' * 400}\n",
    "a huger integer": f"seed: {'9' * 5000}\n",
    "hexadecimal": "seed: 0x" + "f" * 5000,
    "sexagesimal": "max_new_tokens: 1:" + "59:" * 500 + "1",
    "infinity": "temperature: .inf\n",
    "not a number": "temperature: .nan\n",
    "a date": "seed: 2001-01-01\n",
    "a set": "kv_cache: !!set {h2o}\n",
    "binary": "prompt: !!binary aGVsbG8=\n",
    "merge": "a: &a {strategy: h2o}\nkv_cache: {<<: *a, budget: 9}\n",
    "itself": "config: config.yaml\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a key twice": "seed: 1\nseed: 2\n",
    "escape codes": '"\\e[31mred": 1\n',
    "escape codes in a value": 'kv_cache: "\\e[31mred"\n',
    "prompt of lists": "prompt: [[a], {b: c}]\n",
    "compile of text": "compile: surely\n",
    "devices of lists": "devices: [[1]]\n",
}


def _with_file(name: str, text: str, words: list[str], what: str) -> Case:
    def act(folder: Path) -> None:
        (folder / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
        (folder / "canary_module.py").write_text(f"open({str(folder / CANARY)!r}, 'w')\nclass Canary: pass\n")
        command(name, *words, "--config", "{}/config.yaml")(folder)

    return Case(f"{name} {what}", act)


def _nested(place: str, value: Any) -> list[Any]:
    """A value in a cache's setting: as it is, in a list, in a list of lists, in a mapping."""
    return [{"strategy": "h2o", place: v} for v in (value, [value], [[value]], {"a": value})]


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for name, words in COMMANDS.items():
        for what, text in DAMAGED.items():
            yield _with_file(name, text, words, what)
        for tag in TAGS:
            for line in (f"kv_cache: {tag}", f"kv_cache: {{strategy: h2o, budget: {tag}}}", f"seed: {tag}", tag):
                yield _with_file(name, line + "\n", words, line)
    for code in CODE:
        for place in PLACES:
            name = rng.choice(list(COMMANDS))
            value = rng.choice(_nested(place, code))
            yield _with_file(name, json.dumps({"kv_cache": value}), COMMANDS[name], f"{place}: {json.dumps(value)}")
    for code in CODE:
        for option in ("--kv-cache", "--kv-cache.budget", "--kv-cache.options", "--stop", "--prompt", "--top-k"):
            text = json.dumps(rng.choice([code, [code]]))
            yield Case(f"{option} {text}", command("generate", *FAST, option, text))
    for option in ("--kv-cache.budget", "--kv-cache", "--top-k", "--config"):
        for tag in TAGS:
            yield Case(f"{option} {tag}", command("generate", *FAST, option, tag))
    for path in sorted((ROOT / "config_hub" / "generate").glob("*.yaml")):
        if "parallel" not in path.name:
            whole = path.read_bytes()
            for _ in range(12):
                text = flipped(whole, rng).decode(errors="surrogateescape")
                yield _with_file("generate", text, FAST, f"a bit of {path.name}")
