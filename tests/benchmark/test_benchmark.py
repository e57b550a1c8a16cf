"""The benchmark command on a small model: what it measures, its table and its JSON."""

import json
import re

import pytest

from litgpt_kv.__main__ import main
from litgpt_kv.benchmark.parallel import DEFAULT, cache_args
from litgpt_kv.config import KVCacheArgs

SMALL = ["--shape.n_layer", "2", "--shape.n_embd", "96", "--contexts", "[96, 48]", "--steps", "3", "--repeats", "2"]


def test_table_and_json(capsys, tmp_path):
    main(["benchmark", "--accelerator", "cpu", *SMALL, "--budget", "25%", "--out", str(tmp_path / "out.json")])
    table = capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(r["cache"], r["context"]): r for r in report["rows"]}
    assert set(rows) == {(c, n) for c in (*DEFAULT, "litgpt") for n in (48, 96)}
    for (name, context), row in rows.items():
        assert re.search(rf"^{name} .*\d", table, re.MULTILINE)
        assert row["cache_bytes"] == row["cache_bytes_formula"]
        best, median = row["decode_ms"]
        assert 0 < best <= median
        assert row["prefill_tokens_per_s"][0] >= row["prefill_tokens_per_s"][1] > 0
        assert 0 < row["of_limit"]
        if name == "window":
            share = row["cache_bytes"] / rows["dense", context]["cache_bytes"]
            assert share == pytest.approx(0.25, abs=0.02)
    # keys and values of two layers, three groups of eight, float32, int64 positions, two counters and a flag
    assert rows["dense", 48]["cache_bytes"] == 2 * 2 * 3 * 8 * 51 * 4 + 51 * 8 + 17


def test_storages_beside_each_other(capsys, tmp_path):
    names = "[dense, dense@int8, keydiff:pool@int4-hadamard]"
    out = tmp_path / "out.json"
    main(["benchmark", "--accelerator", "cpu", *SMALL, "--litgpt", "false", "--strategies", names, "--out", str(out)])
    table, rows = capsys.readouterr().out, json.loads(out.read_text())["rows"]
    sizes = {row["cache"]: row["cache_bytes"] for row in rows if row["context"] == 96}
    # of a head of 8: 32 bytes in float32, 8 and a scale of 4 in int8
    assert [*sizes] == names[1:-1].split(", ") and sizes["dense@int8"] / sizes["dense"] == pytest.approx(12 / 32, 0.1)
    assert re.search(r"^keydiff:pool@int4-hadamard +[\d,]+ [\d,]+ +\d", table, re.MULTILINE)


def test_a_checkpoint_one_strategy_without_litgpt(capsys):
    flags = ["--checkpoint-dir", "demo", "--strategies", "[h2o, none]", "--litgpt", "false", "--contexts", "[40]"]
    main(["benchmark", "--accelerator", "cpu", *flags, "--steps", "2", "--repeats", "1", "--budget", "16"])
    out = capsys.readouterr().out
    assert "h2o" in out
    assert "none" in out
    assert "litgpt" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "must be at least 1"),
        (["--checkpoint-dir", "demo", "--contexts", "[1024]"], "do not fit"),
        (["--strategies", "[nope]"], "Unknown strategy 'nope'"),
        (["--strategies", "[dense@nope]"], "Unknown storage 'nope'"),
        (["--out", "/dev/null"], "/dev/null cannot be written: it is a device, not a file"),
        (["--out", "no/folder/out.json"], "there is no folder"),
    ],
)
def test_what_is_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "--accelerator", "cpu", *SMALL, *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_batches(capsys):
    small = [
        "--prompts",
        "7",
        "--rows",
        "3",
        "--longest",
        "40",
        "--new-tokens",
        "5",
        "--answers",
        "10",
        "--fewest",
        "2",
    ]
    main(
        [
            "benchmark_batches",
            "--accelerator",
            "cpu",
            "--repeats",
            "2",
            *small,
            "--answers",
            "10",
            "--fewest",
            "2",
            "--kv-cache",
            "h2o",
        ]
    )
    out = capsys.readouterr().out
    ragged, spread = out.split("10 prompts of 8 tokens, 2 to 20 new ones")
    assert "7 prompts of 8 to 40 tokens, 5 new ones each" in ragged
    for name in ("one by one", "waiting, min-length", "waiting, full", "rows come and go, full"):
        assert re.search(rf"^{name} +[\d,]+ · [\d,]+ +[\d,]+ +\d+\.\d+$", ragged, re.MULTILINE), name
    assert len(re.findall("min-length", spread)) == 2
    for bad in (["--rows", "0"], ["--longest", "7"], ["--kv-cache", "none"]):
        with pytest.raises(SystemExit):
            main(["benchmark_batches", *bad])


def test_caches_are_named_as_in_evaluate() -> None:
    assert cache_args("h2o:pool", 9) == KVCacheArgs("h2o", 9, select="pool")
    assert cache_args("dense@int8", "25%") == KVCacheArgs("dense", storage="int8")
    assert cache_args("keydiff:model@k8v4", 9) == KVCacheArgs("keydiff", 9, select="model", storage="k8v4")
    for name, says in (("h2o:all", "Unknown strategy 'h2o:all'"), ("no.py:Mine:pool", "no Python file 'no.py'")):
        with pytest.raises(ValueError, match=says):
            cache_args(name, 9)
