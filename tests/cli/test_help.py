"""Help on two screens, examples that run, names that are almost right, colours, completion, imports that wait."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from litgpt_kv import KVCacheArgs
from litgpt_kv.__main__ import COMMANDS, main
from litgpt_kv.cli.colour import paint
from litgpt_kv.cli.completion import completion
from litgpt_kv.cli.examples import EXAMPLES
from litgpt_kv.cli.help import COMMON
from litgpt_kv.cli.interrupts import QuietInterrupts
from litgpt_kv.cli.parser import build_parser, groups_of, options_of, parse
from litgpt_kv.cli.refusals import describe

ROOT = Path(__file__).parents[2]
TWO_SCREENS = 100  # lines
RUN = ("generate", "chat", "strategies", "plan")  # commands whose examples are quick


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(capsys: pytest.CaptureFixture, *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*args])
    assert end.value.code == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*args])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("litgpt_kv: error: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_two_screens(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, whole = shown(capsys, name, "--help"), shown(capsys, name, "--help-all")
    lines = short.splitlines()
    assert lines[0].startswith(f"usage: litgpt_kv {name}") and len(lines) <= TWO_SCREENS
    options = [
        a for a in options_of(build_parser({name: COMMANDS[name], "x": len}, "", name), name) if a.option_strings
    ]
    assert EXAMPLES[name] and lines[-1] == f"  litgpt_kv {EXAMPLES[name][-1][0]}"
    own_text = [line for line in lines[: lines.index("Examples:")] if len(line) > 80]
    assert own_text == []
    nested = {group.parameter for group in groups_of(COMMANDS[name]) if group.prefix}
    for action in options:
        if action.dest in ("help", *nested):
            continue
        option = "--" + action.dest.replace("_", "-").removesuffix(".strategy")
        assert option in whole and option in short, option
        if action.dest in COMMON:
            assert f"\n  {option} " in short or f"\n  {option}\n" in short, option
    assert shown(capsys, name, "--help", "all") == whole and shown(capsys, "help", name) == short


def test_the_list_of_commands_is_short_and_needs_neither_torch_nor_litgpt(tmp_path: Path) -> None:
    code = """
import json, sys, time
from litgpt_kv.__main__ import COMMANDS, main
found = {}
for args in (["--help"], ["strategies"]):
    try:
        main(args)
    except SystemExit as end:
        assert end.code == 0
    print("@" + json.dumps([time.process_time(), sorted({name.partition(".")[0] for name in sys.modules})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    helped, listed = (json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@"))
    assert not {"torch", "litgpt", "numpy", "lightning"} & set(helped[1]) and helped[0] < 1.0
    assert "torch" in listed[1] and not {"litgpt", "lightning", "transformers"} & set(listed[1])
    text = done.stdout.partition("@")[0]
    assert len(text.splitlines()) <= TWO_SCREENS
    for name, entry in COMMANDS.entries.items():
        assert f"  {name} " in text and entry.summary in text
    assert "\nh2o " in done.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    yield tmp_path


@pytest.mark.parametrize(("name", "line"), [(n, line) for n, examples in EXAMPLES.items() for line, _ in examples])
def test_examples(name: str, line: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Those of quick commands are run, the others parsed: their own tests and the README's run them."""
    words = shlex.split(line)
    if name not in RUN:
        command, _ = parse(COMMANDS, "", words)
        assert command is COMMANDS[name]
        return
    if words == ["strategies", "h2o"]:
        assert shown(capsys, "generate", "--kv-cache.help", "h2o") == shown(capsys, *words)
        assert shown(capsys, *words).startswith("h2o: ")
        return
    short = name == "generate" and "--prompts" not in words  # a line of the file asks for at least 20 tokens
    main([*words, *(["--max-new-tokens", "2"] if short else [])])
    out = capsys.readouterr().out
    assert out or name == "chat" or (folder / "answers.jsonl").stat().st_size


def test_names_that_are_almost_right(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "checkpoints" / "org" / "my-model").mkdir(parents=True)
    (folder / "checkpoints" / "org" / "my-model" / "model_config.yaml").touch()
    generate = ("generate", "demo")
    for args, says in (
        (("genrate", "demo"), "There is no command 'genrate'. Did you mean 'generate'? litgpt_kv --help lists all."),
        (("nothing-like-it",), "There is no command 'nothing-like-it'. litgpt_kv --help lists all."),
        (
            (*generate, "--max-new-tokns", "3"),
            "generate has no option --max-new-tokns. Did you mean '--max-new-tokens'?",
        ),
        ((*generate, "--kv-cache", "h20"), " Did you mean 'h2o'?"),
        ((*generate, "--kv-cache.storage", "int9"), " Did you mean 'int8'?"),
        ((*generate, "--kv-cache.attention", "eagre"), " Did you mean 'eager'?"),
        ((*generate, "--kv-cache.bugdet", "9"), " Did you mean 'budget'?"),
        (("generate", "dem"), "Did you mean 'demo'?"),
        (("generate", "my-modle"), "'demo' is shipped."),
        (("generate", "org/my-modle"), "Did you mean 'org/my-model'?"),
        (("generate", "model.gguf"), "There is no checkpoint folder 'model.gguf'"),
        (("chat", "demo", "--batch-size", "3"), "chat has no option --batch-size."),
        (("benchmark_serve", "more"), "benchmark_serve does not take 'more': it has options only."),
        (
            (*generate, "more"),
            "generate does not take 'more': beside checkpoint_dir, values follow an option, as",
        ),
        ((*generate, "--budget", "3"), "generate has no option --budget. Did you mean '--kv-cache.budget'?"),
        ((*generate, "--window", "3"), "generate has no option --window. Did you mean '--kv-cache.window'?"),
        (("strategies", "h20"), "Unknown strategy 'h20'."),
        (
            ("serve", "demo", "--devices=2"),
            "serve runs on one device and has no option --devices: start one server a device, see docs/serve.md.",
        ),
        (("chat", "demo", "--num-nodes", "2"), "chat runs on one device and has no option --num-nodes."),
        (("generate",), "generate needs checkpoint_dir (A checkpoint folder in litgpt's layout, or "),
        (("calibrate", "demo"), "calibrate needs --text and --out. See litgpt_kv calibrate --help."),
        (("--print-completion", "cmd"), "--print-completion needs one of bash, zsh"),
    ):
        assert says in refused(capsys, *args), args
    (folder / "model.gguf").touch()
    assert "convert it: litgpt_kv convert_gguf model.gguf --out checkpoints/model" in refused(
        capsys, "generate", "model.gguf"
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--top-k", "a"], "--top-k cannot be a: it must be a whole number, a list of whole numbers, [a, b], or null"),
        (
            ["--temperature", "hot"],
            "--temperature cannot be hot: it must be a number, a list of numbers, [a, b], or null",
        ),
        (["--kv-cache.sinks", "x"], "--kv-cache.sinks cannot be x: it must be a whole number"),
        (["--batch-size", ""], "--batch-size cannot be empty: it must be a whole number or null"),
        (["--logprobs=3"], "--logprobs cannot be 3: it must be true or false"),
        (["--kv-cache.floor", "low"], "--kv-cache.floor cannot be low: it must be a number"),
        (["--kv-cache.options", "3"], "--kv-cache.options cannot be 3: it must be a mapping"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_without_the_parsers_words(
    flags: list[str], says: str, capsys: pytest.CaptureFixture
) -> None:
    line = refused(capsys, "generate", "demo", *flags)
    assert says in line and "see --help" in line
    assert not any(word in line for word in ("Union", "Expected", "class", "Parser", "NoneType", "value type"))


def test_the_words_for_types() -> None:
    assert describe(int | None) == "a whole number or null"
    assert describe(list[int | str] | None) == "a list of whole numbers or texts, [a, b], or null"
    assert describe(dict[str, int]) == "a mapping" and describe(object) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt: [unclosed\n", "a.yaml cannot be used: while parsing a flow sequence at line 1, column 9"),
        ("promt: a\n", "a.yaml: generate has no option 'promt'. Did you mean 'prompt'?"),
        ("top_p: 2\n", "a.yaml: top_p must be between 0 and 1, got 2"),
        ("kv_cache: {budget: 0}\n", "a.yaml: budget must be at least 1, got 0"),
        ("kv_cache: {sinks: x}\n", "a.yaml: --kv-cache.sinks cannot be x: it must be a whole number"),
        ("temperature: [1, a]\n", "a.yaml: --temperature cannot be [1, 'a']: it must be a number, a list of numbers"),
        ("prompt: 3\n", "a.yaml: --prompt cannot be 3: it must be a text, a list of texts, [a, b], or null"),
        ("budget: 3\n", "a.yaml: generate has no option 'budget'. Did you mean 'kv_cache: {budget: ...}'?"),
        ("window: 3\n", "a.yaml: generate has no option 'window'. Did you mean 'kv_cache: {window: ...}'?"),
        ("import: mine.py\n", "a.yaml cannot be used: YAML and JSON cannot import code"),
        ("- a\n", "a.yaml must have options by name, as in 'max_new_tokens: 9', got '- a'"),
        ("", "a.yaml must have options by name"),
    ],
)
def test_what_is_wrong_with_a_file_of_options_names_the_file(
    text: str, says: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("a.yaml").write_text(text)
    assert says in refused(capsys, "generate", "demo", "--prompt", "x", "--config", "a.yaml")
    Path("b.yaml").write_text(f"generate: {{{text.strip()}}}\n")
    if text.startswith("top_p"):
        assert says.replace("a.yaml", "b.yaml") in refused(capsys, "--config", "b.yaml", "generate", "demo")
        line = refused(capsys, "generate", "demo", "--config", "a.yaml", "--top-p", "3")
        assert line.startswith("top_p must be between 0 and 1, got 3"), "the command line has that value, not the file"


def test_colours_are_for_terminals(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert paint("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    assert paint("x", "red", io.StringIO()) == "x" and paint("", "red", Terminal()) == ""
    closed = Terminal()
    closed.close()
    closed.isatty = io.StringIO.isatty.__get__(closed)
    assert paint("x", "bold", closed) == "x"
    assert "\x1b" not in shown(capsys, "--help") + shown(capsys, "plan", "--help")
    for variable, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(variable, value)
        assert paint("x", "red", Terminal()) == "x"
        monkeypatch.delenv(variable)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "\x1b[1mExamples:\x1b[0m" in terminal.getvalue()


def test_completion_knows_commands_options_and_names(tmp_path: Path) -> None:
    commands = {name: COMMANDS[name] for name in ("generate", "plan")}
    options = {name: options_of(build_parser(commands, "", name), name) for name in commands}
    assert isinstance(options["plan"][0], argparse.Action)
    script = completion(options, {"plan": "Memory"}, "bash")
    file = tmp_path / "complete.bash"
    file.write_text(script + '\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_litgpt_kv; echo "${COMPREPLY[@]}"\n')

    def complete(*words: str) -> list[str]:
        done = subprocess.run(["bash", file, "litgpt_kv", *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert complete("pl") == ["plan"]
    assert complete("generate", "demo", "--max-new") == ["--max-new-tokens"]
    assert {"sink", "snapkv"} <= set(complete("generate", "demo", "--kv-cache", "s"))
    assert "int8" in complete("generate", "demo", "--kv-cache.storage", "")
    assert completion(options, {}, "zsh").startswith("#compdef litgpt_kv")


def test_an_interrupt_during_imports_ends_the_process_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with QuietInterrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            with QuietInterrupts():
                pass
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "the outer block is not over"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup sets it
        with QuietInterrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_defaults_of_the_help_are_those_of_the_classes(capsys: pytest.CaptureFixture) -> None:
    text = shown(capsys, "generate", "--help-all")
    assert f"(default: {KVCacheArgs().floor})" in " ".join(text.split())
    assert "(default: None)" not in text and "==SUPPRESS==" not in text and "%%" not in text
