"""Several processes on one model give what one gives; started as users start them, through Fabric on CPUs with gloo.

The models of `parallel_worker.py` run in 2 and in 4 processes, started once each; their report is judged here.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from litgpt.config import Config, name_to_config
from litgpt.utils import save_config
from litgpt_kv import GPT, LLM, KVCache, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.llm.checkpoint import DEMO
from litgpt_kv.parallel import PARALLEL_STRATEGIES, DeviceRequest, find_parallel_strategy
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.data import assign_prompts
from litgpt_kv.parallel.heads import divide_heads, split_range
from litgpt_kv.parallel.memory import cache_bytes
from litgpt_kv.parallel.tensor import load_tensor_parallel, slice_parameter
from tests.oracle.shrink import LLAMA, fill, shrink
from tests.parallel.parallel_worker import GRID, LATENT, SPREAD, _config, cases
from tests.parallel.processes import GENERATE, finished, free_port, linux, started, together

pytestmark = pytest.mark.xdist_group("parallel")  # one at a time: each is several processes
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 60 MB."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = shrink(LLAMA, n_embd=512, n_head=8, head_size=64, intermediate_size=2048, n_layer=4)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    return folder


@pytest.fixture(params=[2, 4], ids="{} processes".format, scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict:
    """What so many processes found. They are started once, by whichever pytest-xdist worker comes first."""
    devices, folder = request.param, tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    out = folder / f"report of {devices} processes.json"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            options = ["--devices", str(devices), "--out", str(out), "--checkpoint", str(checkpoint)]
            code, _, err = together(devices, str(HERE / "parallel_worker.py"), *options)
            assert code == 0, err[-3000:]
    return {"devices": devices, **json.loads(out.read_text())}


def test_logits_kept_tokens_and_texts_are_those_of_one_process(report: dict) -> None:
    expected = [case[0] for case in cases(report["devices"])]
    assert sorted(report["cases"]) == sorted(set(expected)) and len(expected) > 15
    for name, found in report["cases"].items():
        assert found["alike"], f"{name}: the processes have different logits"
        assert found["logits"] <= 1e-8, f"{name}: {found}"
        assert found["steps"] >= 12 and found["scale"] > 0.5, f"{name}: nothing was compared"
        assert found["kept"], f"{name}: other tokens are kept"
        if "/full" in name:
            assert found["greedy"] and found["sampled"], f"{name}: {found}"


def test_other_ways_through_a_divided_model(report: dict) -> None:
    found = report["extras"]
    for kind, name in itertools.product(
        ("gqa", "latent"), ("training_pass", "uncut_head", "first", "block", "last")
    ):  # `last` in one traced graph, too, but latent on 4 devices
        assert found[kind][name] <= 1e-8, f"{kind}: {name}"
    assert found["unseeded"] == {"alike": True, "fresh": True, "by_row": True}


@linux
def test_no_process_ever_holds_the_whole_model(report: dict) -> None:
    for rank in report["memory"]["ranks"]:
        share = rank["whole"] / report["devices"]
        assert rank["held"] < 1.15 * share  # the embedding and the norms are on all
        assert rank["peak"] < rank["held"] + 6_000_000  # one weight at a time beside what stays
        assert rank["peak"] > 0.9 * rank["held"]  # it was measured


# -- how a model is divided --------------------------------------------------------------------------------------------


WHOLE = GRID | LATENT


@pytest.mark.parametrize("config", [*WHOLE.values(), *map(_config, SPREAD)], ids=[*WHOLE, *SPREAD])
def test_heads_and_weights_are_all_somewhere_once(config) -> None:
    groups = 1 if config.latent_attention else config.n_query_groups  # of what is cached
    for devices in range(1, config.n_head + 1):
        shares = divide_heads(config, devices)
        assert [h for s in shares for h in s.queries] == list(range(config.n_head))
        per_group = config.n_head // groups
        counted = [0.0] * groups
        for share in shares:
            assert {h // per_group for h in share.queries} == set(share.groups)
            assert len(share.queries) % len(share.groups) == 0
            for group in share.groups:
                counted[group] += share.weight
        assert counted == pytest.approx([1.0] * groups)
        if devices <= groups:  # nothing is held twice
            assert [g for s in shares for g in s.groups] == list(range(groups))
    with torch.device("meta"):
        whole = GPT(config).state_dict()
    for name, weight in whole.items():
        sizes = [
            slice_parameter(config, share, rank, 4, True, name, weight).numel()
            for rank, share in enumerate(divide_heads(config, 4))
        ]
        copied = ("q_a_proj", "kv_a_proj_with_mqa")  # they make what all devices' heads start from
        if any(part in name for part in copied):
            assert sum(sizes) == 4 * weight.numel(), name
        elif any(part in name for part in (".fc", "proj.weight", "lm_head.weight")):
            assert weight.numel() <= sum(sizes) < weight.numel() + 4 * weight.shape[-1], name


def test_what_cannot_be_divided_says_how_many_can() -> None:
    with pytest.raises(ValueError, match=r"has 4 heads: 1 to 4 devices can share it, not 5\."):
        divide_heads(shrink(LLAMA), 5)
    with pytest.raises(ValueError, match=r"1 to 3 devices can share it, not 4\."):
        divide_heads(shrink(LLAMA, intermediate_size=3), 4)
    with pytest.raises(ValueError, match=r"has 5 heads: 1 to 5 devices can share it, not 6\."):
        divide_heads(LATENT["latent-uneven"], 6)


def test_every_named_model_can_be_divided_by_eight_or_says_why() -> None:
    for name in name_to_config:
        config = Config.from_name(name)
        if config.n_head >= 8:
            assert len(divide_heads(config, 8)) == 8
        else:
            with pytest.raises(ValueError, match=f"has {config.n_head} heads: 1 to {config.n_head} devices"):
                divide_heads(config, 8)


def test_a_device_with_all_heads_lets_layers_choose_together() -> None:
    """As each device of data_parallel has them."""
    config = shrink(LLAMA)
    model = load_tensor_parallel(config, Collectives(), fill(GPT(config)).state_dict())
    args = KVCacheArgs("kvzip", 6, select="model")
    assert model.sharing is None and KVCache.build(model, args, 1, 16).plans[0].select == "model"
    with pytest.raises(ValueError, match="all heads, which must be on one device: they are divided among 2"):
        cache_bytes(config, "tensor_parallel", 2, args, 1, 16, torch.float32)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_bounds_cover_everything(parts: int) -> None:
    found = [range(*split_range(20, parts, i)) for i in range(parts)]
    assert [x for r in found for x in r] == list(range(20))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_rows_are_balanced_by_length() -> None:
    lengths = [900, 10, 20, 880, 500, 400, 30]
    found = assign_prompts(lengths, 2)
    assert sorted(b for rows in found for b in rows) == list(range(7))
    loads = [sum(lengths[b] for b in rows) for rows in found]
    assert max(loads) - min(loads) <= 30
    assert assign_prompts([5], 3) == [[0], [], []]


# -- the command line and the API --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> list[str]:
    llm = LLM.load("demo", accelerator="cpu")
    texts = ["def fib(", "import os\n", "class A:"]
    options = dict(max_new_tokens=24, kv_cache="h2o", budget=20, temperature=1.0, top_k=50, seed=1234)
    return [text + new for text, new in zip(texts, llm.generate(texts, **options))]


THREE = ["--prompt", "def fib(", "--prompt", "import os\n", "--prompt", "class A:"]
SHORT = ["--max-new-tokens", "24", "--kv-cache.budget", "20"]


@pytest.mark.parametrize("strategy", PARALLEL_STRATEGIES)
def test_the_command_prints_what_one_process_prints(
    strategy: str, alone: list[str], capsys: pytest.CaptureFixture
) -> None:
    """With the strategy's YAML file, which asks for two devices and h2o."""
    path = HERE.parents[1] / "config_hub" / "generate" / f"{strategy}.yaml"
    assert f"litgpt_kv generate demo --config config_hub/generate/{strategy}.yaml" in path.read_text()
    command = [*GENERATE, "--config", str(path), *SHORT, *THREE]
    if strategy == "sequential":  # which starts no process
        main(command[2:])
        out, err = capsys.readouterr()
    else:
        code, out, err = finished(*command)
        assert code == 0, err
        assert "Starting with 2 processes" in err
    assert out == "\n".join(alone) + "\n", err
    assert err.count("Loaded demo") == 1 and "made 72 in" in err
    assert "Warning" not in err and "Traceback" not in err


def test_two_machines(alone: list[str]) -> None:
    """As two machines start it, with Fabric's variables; both are this one."""
    options = ["--devices", "1", "--num-nodes", "2", "--generate-strategy", "tensor_parallel", "--temperature", "1.0"]
    command = [*GENERATE, *options, "--kv-cache", "h2o", *SHORT, *THREE]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with started(*command, NODE_RANK="1", **common) as second:
        code, out, err = finished(*command, NODE_RANK="0", **common)
        assert (code, out) == (0, "\n".join(alone) + "\n"), err
        assert second.communicate(timeout=240)[0] == "" and second.returncode == 0


def test_the_benchmark_shows_computing_and_talking_apart(tmp_path: Path) -> None:
    shape = ["--shape.n_layer", "2", "--shape.n_embd", "96", "--contexts", "[48]", "--steps", "3", "--repeats", "2"]
    out = tmp_path / "out.json"
    options = ["--accelerator", "cpu", "--devices", "2", "--threads", "1", "--strategies", "[h2o]", "--out", str(out)]
    code, table, err = finished("-m", "litgpt_kv", "benchmark", *shape, *options)
    assert code == 0, err
    one, two = json.loads(out.read_text())["rows"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert (one["communication_ms"], one["collectives"], one["communication_bytes"]) == (0, 0, 0)
    assert two["collectives"] == 2 * 2 + 1  # two sums a layer, and the gathered logits
    assert two["communication_bytes"] == 4 * (2 * 2 * 96 + 2048 / 2)  # of one token, in float32
    assert two["communication_ms"] > 0 and two["compute_ms"] > 0
    assert two["compute_ms"] + two["communication_ms"] == pytest.approx(two["token_ms"][0])
    assert two["weight_bytes"] < 0.75 * one["weight_bytes"] and two["cache_bytes"] < one["cache_bytes"]
    assert re.search(r"^h2o +1 .*\nh2o +2 ", table, re.MULTILINE)


def test_bad_requests_are_refused_before_anything_starts(tmp_path: Path) -> None:
    llm = LLM.load("demo", accelerator="cpu", distribute=None)
    with pytest.raises(ValueError, match="No weights are loaded: call distribute"):
        llm.generate("a", max_new_tokens=1)
    for given, message in {
        ("tensor_parallel", 7): "has 6 heads: 1 to 6 devices can share it, not 7",
        ("sequential", 7): "6 layers can be laid over 1 to 6 devices, not 7",
        ("nope", 2): "must be one of tensor_parallel, sequential, data_parallel, got 'nope'",
        ("tensor_parallel", 0): "devices must be at least 1, got 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            llm.distribute("cpu", given[1], generate_strategy=given[0])
    with pytest.raises(ValueError, match="'sequential' runs in one process on one machine, not on 2"):
        llm.distribute("cpu", 2, 2, generate_strategy="sequential")
    with pytest.raises(ValueError, match="precision 'bf16-mixed' is for one device"):
        llm.distribute("cpu", 2, precision="bf16-mixed", generate_strategy="tensor_parallel")
    with pytest.raises(ValueError, match="num_nodes must be at least 1, got 0"):
        DeviceRequest("cpu", 1, 0)
    with pytest.raises(ValueError, match="need a generate_strategy: tensor_parallel, sequential, data_parallel"):
        find_parallel_strategy(None)
    other = LLM.load("pythia-14m", init="random", tokenizer_dir=DEMO, accelerator="cpu")
    with pytest.raises(ValueError, match="random weights cannot be distributed"):
        other.distribute("cpu", 2, generate_strategy="tensor_parallel")
