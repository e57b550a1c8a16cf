"""The command line on the shipped checkpoint: what it prints, what it refuses, YAML files."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litgpt_kv import LLM, registry
from litgpt_kv.__main__ import main
from litgpt_kv.cli.groups import typed_options
from litgpt_kv.cli.options import cache_fields, fail, normalise
from litgpt_kv.cli.strategies import describe
from litgpt_kv.llm.checkpoint import DEMO
from litgpt_kv.parallel import PARALLEL_STRATEGIES
from tests import warm
from tests.oracle.strategies import READY

ROOT = Path(__file__).parents[2]


def run(capsys, *args):
    main(["generate", "demo", "--accelerator", "cpu", *args])
    return capsys.readouterr()


def refused(capsys, *args):
    """Run a command that must fail with exit code 2; return its error line."""
    with pytest.raises(SystemExit) as end:
        main(list(args))
    out = capsys.readouterr()
    assert end.value.code == 2
    assert out.out == ""
    lines = out.err.strip().splitlines()
    assert lines[-1].startswith("litgpt_kv: error: ")
    assert "Traceback" not in out.err
    assert len([line for line in lines if not line.startswith("Loaded ")]) == 1
    return lines[-1]


def test_text_on_standard_output_and_nothing_else(capsys):
    out = run(capsys, "--prompt", "def fib(", "--max-new-tokens", "12", "--temperature", "0")
    llm = LLM.load("demo", accelerator="cpu")
    assert out.out == "def fib(" + llm.generate("def fib(", max_new_tokens=12, temperature=0.0) + "\n"
    assert re.search(r"Read \d+ prompt tokens in .* tokens/s\), made 12 in .* tokens/s\)", out.err)
    assert re.search(
        r"Cache dense: budget \d+ tokens, [\d,]+ bytes \(keys [\d,]+, values [\d,]+, positions [\d,]+\); kept", out.err
    )


def test_several_prompts_make_a_ragged_batch(capsys):
    prompts = ["import os\nimport sys\n\ndef main(argv):", "class A", "x = [1, 2"]
    flags = [part for p in prompts for part in ("--prompt", p)]
    common = ["--kv-cache", "h2o", "--kv-cache.budget", "9", "--max-new-tokens", "20", "--temperature", "0"]
    together = run(capsys, *flags, *common).out
    alone = "".join(run(capsys, "--prompt", p, *common).out for p in prompts)
    assert together == alone


def test_dashes_underscores_equals_and_order(capsys):
    runs = [
        run(capsys, *flags, "--prompt", "def ", "--max-new-tokens", "15", "--seed", "3").out
        for flags in (
            ["--kv-cache", "sink", "--kv-cache.budget", "8"],
            ["--kv_cache.budget=8", "--kv_cache=sink"],
            ["--kv-cache.strategy", "sink", "--kv-cache.budget", "8"],
            ["--kv-cache={strategy: sink, budget: 8}"],
        )
    ]
    assert len(set(runs)) == 1
    assert runs[0] != run(capsys, "--prompt", "def ", "--max-new-tokens", "15", "--seed", "3").out


def test_the_command_line_wins_over_a_file_wherever_it_stands(capsys, tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text("checkpoint_dir: nowhere\nmax_new_tokens: 64\nkv_cache:\n  strategy: h2o\n  budget: 7\n")
    common = ["--prompt", "def ", "--max-new-tokens", "15"]
    for flags in ([*common, "--config", str(file)], ["--config", str(file), *common]):
        err = run(capsys, *flags, "--kv-cache.budget", "9").err
        assert "Cache h2o: budget 9 tokens" in err and "made 15" in err


def test_none_recomputes_and_agrees_with_dense(capsys):
    common = ["--prompt", "import os\n", "--max-new-tokens", "20", "--temperature", "0"]
    assert run(capsys, *common, "--kv-cache", "none").out == run(capsys, *common).out


def test_long_prompts_read_one_at_a_time_are_announced(capsys):
    text = "x = 1\n" * 200
    common = ["--prompt", text, "--max-new-tokens", "2", "--kv-cache.budget", "32"]
    err = run(capsys, *common, "--kv-cache", "h2o").err
    assert "801 tokens, 25 times the budget: 769 will be read one at a time; --prefill full" in err
    for flags in (["--kv-cache", "sink"], ["--kv-cache", "h2o", "--prefill", "full"]):
        assert "will be read" not in run(capsys, *common, *flags).err
    sink = ["--max-new-tokens", "1", "--kv-cache", "sink", "--kv-cache.budget", "6", "--kv-cache.sinks", "4"]
    many = [word for n in (50, 51, 60) for word in ("--prompt", "x = 1\n" * n)]  # 316 blocks, one after the other
    assert "235 will be read in blocks of 2; --prefill full reads all in one pass" in run(capsys, *sink, *many).err


def test_samples_differ_and_repeat(capsys):
    common = ["--prompt", "def ", "--max-new-tokens", "30", "--num-samples", "2", "--temperature", "1.0"]
    first, again = run(capsys, *common).out, run(capsys, *common).out
    assert first == again
    half = len(first) // 2
    assert first[:half] != first[half:]


FILES = sorted(p.name for p in (ROOT / "config_hub" / "generate").glob("*.yaml"))


@pytest.mark.parametrize("name", [f for f in FILES if Path(f).stem not in PARALLEL_STRATEGIES])
def test_every_yaml_file_runs_and_its_header_says_how(capsys, name):
    path = ROOT / "config_hub" / "generate" / name
    assert f"litgpt_kv generate demo --config config_hub/generate/{name}" in path.read_text()
    out = run(capsys, "--config", str(path), "--max-new-tokens", "5")
    assert out.out.startswith("def fib(")
    assert f"Cache {path.stem}" in out.err


def test_every_strategy_has_a_yaml_file():
    files = {p.stem for p in (ROOT / "config_hub" / "generate").glob("*.yaml")}
    assert {n for n in READY if registry.get("strategy", n).__module__.startswith("litgpt_kv")} <= files


def test_yaml_forms_and_overrides(capsys, tmp_path):
    file = tmp_path / "a.yaml"
    outs = []
    for text, flags in (
        ("kv_cache: sink\n", ["--kv-cache.budget", "8"]),
        ("kv_cache: {strategy: sink, budget: 8}\n", []),
        ("kv_cache:\n  strategy: h2o\n  budget: 8\n", ["--kv-cache", "sink"]),
        ("kv_cache:\n  strategy: sink\n  budget: 30\n", ["--kv-cache.budget", "8"]),
    ):
        file.write_text("prompt: 'def '\nmax_new_tokens: 15\nseed: 3\n" + text)
        outs.append(run(capsys, "--config", str(file), *flags).out)
    assert len(set(outs)) == 1
    file.write_text("prompt: ['def ', 'class ']\nmax_new_tokens: 3\n")
    assert run(capsys, "--config", str(file)).out.startswith("def ")


def test_print_config_round_trips(capsys, tmp_path):
    flags = ["--prompt", "def ", "--max-new-tokens", "9", "--kv-cache", "sink", "--kv-cache.budget", "8"]
    with pytest.raises(SystemExit):
        main(["generate", "demo", "--accelerator", "cpu", *flags, "--print-config"])
    file = tmp_path / "a.yaml"
    file.write_text(capsys.readouterr().out)
    main(["generate", "--config", str(file)])
    assert capsys.readouterr().out == run(capsys, *flags).out


def test_strategies_lists_all(capsys):
    main(["strategies"])
    out = capsys.readouterr().out
    for name in registry.names("strategy"):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE)
    assert "arXiv 2306.14048" in out
    assert re.search(r"^h2o +attention of all queries +prompt and decode +yes +head, absolute\n    Keep the", out, re.M)
    assert re.search(r"^tova +attention of the newest query .* layer, absolute$", out, re.M)
    assert re.search(r"^snapkv +last 64 queries, keys .* yes ", out, re.M)
    assert re.search(r"^dense +position +never ", out, re.M)
    assert re.search(r"^expected_attention .* no +head, absolute$", out, re.M)
    assert "sinks=4, positions=cache" in describe("sink") and "recent=50%, positions=absolute" in describe("h2o")
    assert "recent=64, positions=absolute, window=64, kernel=5" in describe("snapkv")
    with pytest.raises(SystemExit) as end:
        main(["generate", "--kv-cache.help", "h2o"])
    assert end.value.code == 0
    assert "recent: Never evict the last so many tokens" in capsys.readouterr().out


def test_help_shows_dashes_and_examples(capsys):
    for args in (["--help"], ["generate", "--help"], ["benchmark", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert "--max-new-tokens" in out or args != ["generate", "--help"]
        assert "--kv_cache" not in out
    main_help = warm.run([sys.executable, "-m", "litgpt_kv", "--help"], capture_output=True, text=True)
    assert main_help.returncode == 0 and "litgpt_kv generate demo --kv-cache h2o" in main_help.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-cache", "nope"], "Unknown strategy 'nope'. Available: "),
        (["--kv-cache", "sink", "--kv-cache.budget", "4"], "budget 4, sinks 4"),
        (["--kv-cache", "h2o", "--kv-cache.budget", "0"], "budget must be at least 1, got 0"),
        (["--kv-cache", "h2o", "--kv-cache.budget", "many"], "got 'many'"),
        (["--kv-cache", "h2o", "--kv-cache.budget", "130%"], "got '130%'"),
        (["--kv-cache", "h2o", "--kv-cache.bugdet", "9"], "Unknown kv_cache option 'bugdet'"),
        (["--kv-cache", "h2o", "--kv-cache.storage", "int7"], "Unknown storage 'int7'. Available: float8, int4"),
        (["--kv-cache", "h2o", "--kv-cache.positions", "left"], "positions must be 'absolute' or 'cache'"),
        (["--kv-cache", "none", "--kv-cache.budget", "9"], "'none' takes no options"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "x " * 1200], "over the limit of 1024"),
        (["--max-new-tokens", "2000"], "over the limit of 1024"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--max-new-tokens", "ten"], "--max-new-tokens cannot be ten"),
        (["--top-p", "2"], "top_p must be between 0 and 1, got 2.0"),
        (["--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature must be 0 or greater, got -1.0"),
        (["--num-samples", "0"], "num_samples must be at least 1, got 0"),
        (["--prefill", "left"], "prefill must be one of min-length, full, got 'left'"),
        (["--precision", "8-true"], "precision must be one of"),
        (["--seed", "-1"], "seed must be 0 to 2**63 - 1, got -1"),
        (["--unknown", "1"], "--unknown"),
        (["--prompt"], "--prompt needs a value"),
        (["--config", "no_such_file.yaml"], "no_such_file.yaml"),
    ],
)
def test_rubbish_gives_one_line_and_exit_code_2(capsys, flags, message):
    assert message in refused(capsys, "generate", "demo", "--accelerator", "cpu", *flags)


def test_unreadable_yaml_and_unknown_keys(capsys, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("prompt: [unclosed\n")
    assert "pars" in refused(capsys, "generate", "demo", "--config", str(file))
    file.write_text("promt: hello\n")
    assert "promt" in refused(capsys, "generate", "demo", "--config", str(file))


def test_missing_and_corrupt_checkpoints(capsys, tmp_path):
    assert "no checkpoint folder 'nowhere'" in refused(capsys, "generate", "nowhere")
    assert "lacks lit_model.pth" in refused(capsys, "generate", str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(DEMO, broken)
    weights = broken / "lit_model.pth"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "may be corrupt" in refused(capsys, "generate", str(broken))
    weights.write_bytes(b"")
    assert "may be corrupt" in refused(capsys, "generate", str(broken))
    torch.save({"lm_head.weight": torch.zeros(3, 3)}, weights)
    assert "do not fit" in refused(capsys, "generate", str(broken))
    (broken / "model_config.yaml").write_text("n_layer: [")
    assert "model_config.yaml" in refused(capsys, "generate", str(broken))
    shutil.copy(DEMO / "model_config.yaml", broken)
    shutil.copy(DEMO / "lit_model.pth", broken)
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(capsys, "generate", str(broken))


def test_checkpoints_are_loaded_without_running_their_code(capsys, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(DEMO, evil)

    class Payload:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "ran", "x"))

    torch.save({"lm_head.weight": Payload()}, evil / "lit_model.pth")
    assert "cannot be read" in refused(capsys, "generate", str(evil))
    assert not (tmp_path / "ran").exists()


def test_normalise():
    assert normalise(["generate", "demo", "--kv-cache", "h2o", "--max-new-tokens=3", "--seed", "-1"])[0] == [
        "generate",
        "demo",
        "--kv_cache.strategy=h2o",
        "--max_new_tokens=3",
        "--seed=-1",
    ]
    assert normalise(["--prompt", "--x", "--prompt=[1"])[0] == ['--prompt=["--x", "[1"]']
    assert normalise(["--compile", "--seed", "3"], {"compile"})[0] == ["--compile=true", "--seed=3"]
    assert normalise(["--compile", "false"], {"compile"})[0] == ["--compile=false"]
    assert normalise(["--compile", "demo"], {"compile"})[0] == ["--compile=true", "demo"]
    assert normalise(["--", "--kv-cache"])[0] == ["--", "--kv-cache"]
    assert normalise(["--prompt", "a", "--", "b"])[0] == ['--prompt=["a"]', "--", "b"]
    assert normalise(["--kv-cache.sharpness", "2"])[0] == ["--kv_cache.options.sharpness=2"]
    assert normalise(["--kv-cache={budget: 3, sharpness: 2}"])[0] == [
        '--kv_cache={"budget": 3, "options": {"sharpness": 2}}'
    ]
    assert normalise(["generate", "--kv-cache.help", "h2o"]) == (["generate"], "h2o")


def test_cache_fields():
    assert cache_fields("h2o") == {"strategy": "h2o"}
    assert cache_fields({"budget": 12}) == {"budget": 12}
    assert cache_fields({"sharpness": 2, "options": {"a": 1}}) == {"options": {"a": 1, "sharpness": 2}}
    assert typed_options("none", {}) == {}
    with pytest.raises(ValueError, match="Unknown kv_cache option 'a'"):
        typed_options(["h2o", "sink"], {"a": 1})


def test_the_reader_of_a_pipe_may_leave():
    command = [sys.executable, "-m", "litgpt_kv", "generate", "demo", "--prompt", "def ", "--max-new-tokens", "300"]
    with warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.read(20).startswith("def ")
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_any_text_is_a_prompt(capsys):
    for text in ("🙂 é 日本", "- [x] {y}: 1 \"z\" 'w' # no", "a: b\nc\t| > & *", "[1, 2]", "null", "--kv-cache"):
        assert run(capsys, "--prompt", text, "--max-new-tokens", "1", "--temperature", "0").out.startswith(text)


def test_an_interrupt_ends_quietly():
    command = [sys.executable, "-m", "litgpt_kv", "generate", "demo", "--prompt", "def ", "--kv-cache", "sink"]
    flags = ["--kv-cache.budget", "32", "--max-new-tokens", "100000"]
    process = warm.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(4) == "def "
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_devices_that_are_not_there_and_full_disks(capsys):
    for device in ("mps", "tpu", "abacus"):
        assert "accelerator" in refused(capsys, "generate", "demo", "--accelerator", device)
    command = [sys.executable, "-m", "litgpt_kv", "generate", "demo", "--prompt", "def ", "--max-new-tokens", "3"]
    with open("/dev/full", "w") as full:
        done = warm.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr


def test_version_and_no_arguments(capsys):
    for args, expected in ((["--version"], "litgpt_kv "), ([], "usage: litgpt_kv")):
        with pytest.raises(SystemExit) as end:
            main(args)
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(expected)


def test_the_temperature_is_the_checkpoints_own_unless_given(capsys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(DEMO, folder)
    outs = {}
    for text in ('{"temperature": 1.0}', '{"temperature": 0.0}', "{}"):
        (folder / "generation_config.json").write_text(text)
        flags = ["--prompt", "def ", "--max-new-tokens", "20", "--accelerator", "cpu"]
        main(["generate", str(folder), *flags])
        outs[text] = capsys.readouterr().out
    common = ["--prompt", "def ", "--max-new-tokens", "20"]
    assert outs['{"temperature": 1.0}'] == run(capsys, *common).out == run(capsys, *common, "--temperature", "1.0").out
    assert outs['{"temperature": 0.0}'] == run(capsys, *common, "--temperature", "0").out
    assert outs["{}"] == run(capsys, *common, "--temperature", "0.8").out


def test_an_error_shows_no_escape_codes_and_not_all_of_a_long_text(capsys):
    with pytest.raises(SystemExit, match="2"):
        fail("\x1b[31mred\x07\nnext \udcff é" + "x" * 5000 + " the end")
    err = capsys.readouterr().err
    assert err.startswith("litgpt_kv: error: \\x1b[31mred\\x07 next \\udcff éxxx") and err.endswith("xxx the end\n")
    assert len(err) < 1100 and err.count("\n") == 1


def test_an_integer_that_is_no_float_is_refused(capsys):
    for option in (["plan", "pythia-14m", "--memory"], ["generate", "demo", "--temperature"]):
        refused(capsys, *option, "9" * 400)
