"""The command line follows the classes of arguments: each field is an option, a YAML key and a line of help."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml

from litgpt_kv import KVCacheArgs, SamplingArgs
from litgpt_kv.__main__ import COMMANDS, main
from litgpt_kv.arguments import DeviceArgs, RunArgs, StoppingArgs, Without, cores
from litgpt_kv.benchmark.decode import Shape
from litgpt_kv.cli.groups import is_plain
from litgpt_kv.cli.parser import build_parser, one_line_errors, parse

GROUPS = (SamplingArgs, StoppingArgs, KVCacheArgs, RunArgs, DeviceArgs)
OTHERS = {"strategy": "sink", "stop": ["a", "b"], "storage": "plain", "positions": "cache", "options": None}
OTHERS |= {"prefill": "full", "precision": "bf16-true", "accelerator": "cpu", "generate_strategy": "sequential"}
OTHERS |= {"select": "pool", "budget_pattern": "pyramid", "attention": "eager"}
OTHERS |= {"quantize": None, "temperature": 0.25, "top_p": 0.5, "min_p": 0.125, "repetition_penalty": 1.5}


def run(commands: dict[str, Callable], args: list[str]) -> None:
    with one_line_errors():
        command, arguments = parse(commands, "", args)
        command(**arguments)


def other_value(field: dataclasses.Field) -> object:
    """Return a value of a field that is not its default."""
    if field.name in OTHERS:
        return OTHERS[field.name]
    if field.default_factory is dict:
        return {"size": 4}
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, str):  # only some words are valid, so keep the default
        return field.default
    if isinstance(field.default, float):
        return field.default / 2
    return 7


def as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parsed(*args: str) -> dict[str, object]:
    """Parse options of `generate`; return its arguments by the names of their classes."""
    command, arguments = parse(COMMANDS, "", ["generate", "demo", *args])
    assert command is COMMANDS["generate"]
    return {type(value).__name__: value for value in arguments.values()}


@pytest.mark.parametrize(
    ("cls", "field"),
    [
        pytest.param(cls, field, id=f"{cls.__name__}.{field.name}")
        for cls in GROUPS
        for field in dataclasses.fields(cls)
    ],
)
def test_every_field_is_an_option_and_a_yaml_key(cls: type, field: dataclasses.Field, tmp_path: Path) -> None:
    value = other_value(field)
    if value is None:
        pytest.skip("needs another machine or strategy")
    nested = cls is KVCacheArgs
    option = ("--kv-cache." if nested else "--") + field.name.replace("_", "-")
    args = (option, as_text(value)) if field.name != "stop" else ("--stop", "a", "--stop", "b")
    beside = {"budget": 64} if field.name == "budget_pattern" else {}  # it spreads a budget
    args += tuple(f"--kv-cache.{name}={number}" for name, number in beside.items())
    typed = parsed(*args)[cls.__name__]
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"kv_cache": {**beside, field.name: value}} if nested else {field.name: value}))
    written = parsed("--config", str(file))[cls.__name__]
    assert getattr(typed, field.name) == getattr(written, field.name) == value


def test_help_shows_every_field_with_its_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    for cls in GROUPS:
        for field in dataclasses.fields(cls):
            option = ("--kv-cache." if cls is KVCacheArgs else "--") + field.name.replace("_", "-")
            assert f"{option.removesuffix('.strategy')} " in text
            if "options" not in field.name:
                line = cls.__doc__.split(f"{field.name}: ")[1].split("\n")[0].strip()
                assert line[:30] in text, (field.name, line)


@dataclass(frozen=True)
class NewArgs:
    """A class with new options.

    Args:
        interval: How many leave at once.
        select: Who competes.
        floor: The least share.
        keep: Whether the prompt stays.
        attention: A kernel's name.
    """

    interval: int = 1
    select: Literal["head", "layer", "pool"] = "head"
    floor: float | Sequence[float] = 0.2
    keep: bool = False
    attention: str | None = None


def test_a_new_field_needs_no_change_of_the_command_line(capsys: pytest.CaptureFixture) -> None:
    seen = []

    def command(
        name: str, *, new: NewArgs = NewArgs(floor=0.5), run: Annotated[RunArgs, Without("logprobs")] = RunArgs()
    ) -> None:
        """Do it."""
        seen.append((name, new, run))

    commands = {"command": command, "other": lambda: None}
    run(commands, ["command", "x"])
    run(commands, ["command", "x", "--new.interval", "16", "--new.keep", "--new.select=pool", "--batch-size", "3"])
    run(commands, ["command", "x", "--new={floor: [0.1, 0.2], attention: eager}"])
    assert seen[0] == ("x", NewArgs(floor=0.5), RunArgs())
    assert seen[1] == ("x", NewArgs(16, "pool", 0.5, True), RunArgs(batch_size=3))
    assert seen[2] == ("x", NewArgs(floor=[0.1, 0.2], attention="eager"), RunArgs())
    for bad in (["--new.select", "row"], ["--new.interval", "x"], ["--logprobs"], ["--new.unknown", "3"]):
        with pytest.raises(SystemExit) as end:
            run(commands, ["command", "x", *bad])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("litgpt_kv: error: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_has_an_option_that_may_import_code(name: str) -> None:
    sub = build_parser({name: COMMANDS[name], "other": lambda: None}, "")._subcommands_action._name_parser_map[name]
    hints = {a.dest: getattr(a, "_typehint", None) or a.type for a in sub._actions if a.dest not in ("config", "help")}
    open_ones = [
        dest for dest, hint in hints.items() if not (hint is None or is_plain(hint) or is_path_or_config(hint))
    ]
    assert open_ones == []
    assert len(hints) > 1 or name == "strategies"


def is_path_or_config(hint: object) -> bool:
    return "Path" in str(hint) or "Action" in str(hint)


LONG = "9" * 400


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--threads", "1000000"], f"threads must be at most {max(64, 4 * cores()):,}, got 1000000"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--num-samples", "1000000000"], "num_samples must be at most 1,048,576, got 1000000000"),
        (["--devices", "1000000", "--generate-strategy", "data_parallel"], "devices must be at most"),
        (["--devices", "many"], "devices must be a whole number or auto, got 'many'"),
        (["--num-nodes", "1000000"], "num_nodes must be at most 4,096"),
        (["--seed", LONG], "seed must be 0 to 2**63 - 1, got 9999"),
        (["--top-k", LONG], "top_k must be at least 1, at most 9.22e+18, got 9999"),
        (["--max-new-tokens", LONG], "max_new_tokens must be at most 2,147,483,647, got 9999"),
        (["--min-new-tokens", LONG], "min_new_tokens must be 0 to 50 (max_new_tokens), got 9999"),
        (["--batch-size", LONG], "batch_size must be at most"),
        (["--prefill-chunk", LONG], "prefill_chunk must be at most"),
        (["--num-samples", LONG], "num_samples must be at most"),
        (["--temperature", LONG], "--temperature cannot be 999"),
        (["--kv-cache", "h2o", "--kv-cache.budget", LONG], "budget must be less than 2**31 tokens, got 9999"),
        (["--kv-cache", "h2o", "--kv-cache.sinks", LONG], "sinks must be less than 2**31 tokens, got 9999"),
        (["--seed", "9" * 5000], "--seed cannot be 999"),
        (["--min-p", "1.5"], "min_p must be between 0 and 1, got 1.5"),
        (["--min-p", "high"], "--min-p cannot be high"),
        (["--temperature", "[0.1, 0.2, 0.3]", "--prompt", "a", "--prompt", "b"], "temperature has 3 values for 2 rows"),
        (["--kv-cache", "none", "--kv-cache.sinks", "2"], "'none' takes no options"),
    ],
)
def test_limits(flags: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", "demo", "--accelerator", "cpu", *flags])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert says in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kv_cache: 3", "kv_cache must be a mapping of options, got 3"),
        ("kv_cache: [h2o]", "kv_cache must be a mapping of options, got ['h2o']"),
        ("kv_cache: {budget: {a: b}}", "--kv-cache.budget cannot be {'a': 'b'}"),
        ("kv_cache: {options: 3}", "--kv-cache.options cannot be 3"),
        ("max_new_tokens: ten", "a.yaml: --max-new-tokens cannot be ten: it must be a whole number; see --help"),
        ("promt: a", "promt"),
        ("a text", "a text"),
        ("", "config"),
    ],
)
def test_yaml_that_is_wrong(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["generate", "demo", "--config", str(tmp_path / "a.yaml")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("litgpt_kv: error: ") and says in line


@pytest.mark.parametrize(
    "args",
    [
        ["plan", "pythia-14m", "--devices", "1000000000"],
        ["plan", "pythia-14m", "--memory", "1e400"],
        ["benchmark_batches", "--prompts", "1000000000000"],
        ["benchmark_batches", "--longest", LONG],
        ["benchmark", "--shape.n-layer", "1000000000"],
        ["benchmark", "--shape={n_embd: 960000, n_layer: 2000}", "--contexts", "[8]"],
        ["benchmark", "--shape.n-head", "7"],
        ["benchmark", "--contexts", "[1000000000000]"],
        ["benchmark", "--repeats", LONG],
        ["chat", "demo", "--max-tokens", LONG],
        ["chat", "demo", "--devices", "2"],
    ],
)
def test_limits_of_other_commands(args: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loaded ")]
    assert line.startswith("litgpt_kv: error: ")
    assert len(line) < 1000


def test_the_last_seed_has_samples(capsys: pytest.CaptureFixture) -> None:
    args = ["generate", "demo", "--accelerator", "cpu", "--prompt", "def ", "--max-new-tokens", "9"]
    main([*args, "--seed", str(2**63 - 1), "--num-samples", "2"])
    both = capsys.readouterr().out
    main([*args, "--seed", str(2**63 - 1)])
    main([*args, "--seed", "0"])
    assert both == capsys.readouterr().out


def test_a_shape_is_checked() -> None:
    with pytest.raises(ValueError, match="n_layer must be at most 2,000"):
        Shape(n_layer=10**9)
