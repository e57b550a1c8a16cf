"""The computed memory of each device equals that of real models and caches."""

from __future__ import annotations

import itertools

import pytest
import torch

from litgpt.config import Config
from litgpt_kv import GPT, KVCache, KVCacheArgs
from litgpt_kv.__main__ import main
from litgpt_kv.parallel.collectives import Collectives
from litgpt_kv.parallel.memory import cache_bytes, weight_bytes
from litgpt_kv.parallel.sequential import layer_devices, load_sequential
from litgpt_kv.parallel.tensor import load_tensor_parallel
from tests.oracle.shrink import fill, shrink
from tests.parallel.parallel_worker import GRID, LATENT

CONFIGS = [*GRID.values(), shrink("Gemma-3-1b-it"), shrink("Mixtral-8x7B-v0.1"), shrink("OLMo-2-1124-7B")]
CONFIGS += LATENT.values()
KINDS = [KVCacheArgs("dense"), KVCacheArgs("h2o", budget="50%"), KVCacheArgs("sink", budget=9)]


def collectives_of(rank: int, size: int) -> Collectives:
    """Return collectives of a process without the others, which is enough to load its part."""
    collectives = Collectives()
    collectives.rank, collectives.size = rank, size
    return collectives


def model_bytes(model: GPT) -> int:
    """Return the bytes of a model's parameters and rope tables."""
    return sum(t.nbytes for t in model.state_dict().values()) + model.cos.nbytes + model.sin.nbytes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.name}-{c.n_head}-{c.n_query_groups}")
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_tensor_parallel(config: Config, devices: int) -> None:
    weights = fill(GPT(config)).state_dict()
    parts = [load_tensor_parallel(config, collectives_of(rank, devices), weights) for rank in range(devices)]
    assert [model_bytes(part) for part in parts] == weight_bytes(config, "tensor_parallel", devices, torch.float32)
    for args in KINDS:
        found = [KVCache.build(part, args, 3, 20).allocated()["total"] for part in parts]
        assert found == cache_bytes(config, "tensor_parallel", devices, args, 3, 20, torch.float32)


@pytest.mark.parametrize(("config", "devices"), list(itertools.product(CONFIGS, [1, 2])))
def test_sequential_and_data_parallel(config: Config, devices: int) -> None:
    weights = fill(GPT(config)).state_dict()
    model = load_sequential(config, [torch.device("cpu", d) for d in range(devices)], weights)
    tables = model.cos.nbytes + model.sin.nbytes
    found = [tables] * devices
    for name, weight in model.state_dict().items():
        found[model.device_of(name).index] += weight.nbytes
    assert found == weight_bytes(config, "sequential", devices, torch.float32)
    assert weight_bytes(config, "data_parallel", devices, torch.float32) == [model_bytes(model)] * devices
    on = [torch.device("cpu", d) for d in layer_devices(config.n_layer, devices)]
    for args in KINDS:
        cache = KVCache(config, args, 3, 20, config.block_size, torch.float32, on)
        computed = cache_bytes(config, "sequential", devices, args, 3, 20, torch.float32)
        assert sum(computed) == cache.allocated()["total"] and min(computed) > 0
        rows = -(-3 // devices)
        alone = KVCache.nbytes(config, args, rows, 20, torch.float32)["total"]
        assert cache_bytes(config, "data_parallel", devices, args, 3, 20, torch.float32) == [alone] * devices


def test_the_table(capsys: pytest.CaptureFixture) -> None:
    main(["plan", "Llama-3.1-8B", "--devices", "3", "--memory", "24"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Computed, not measured: Llama-3.1-8B, bf16-true, 1 row of 131,072 tokens."
    assert [line.split()[:2] for line in lines[4:-1]] == [
        [strategy, n] for strategy in ("tensor_parallel", "sequential", "data_parallel") for n in ("2", "3")
    ]
    assert lines[3].startswith("one device")
    # 32 layers, 8 groups of 128, keys and values, two bytes; 8.03e9 weights
    dense = 32 * 8 * 128 * 2 * 2 * 131072 / 1e9
    weights, cache, total, rows = lines[3].split()[3:7]
    assert float(cache) == pytest.approx(dense, rel=1e-3)
    assert float(weights) == pytest.approx(16.06 + 0.134, abs=0.01)
    assert float(total.removesuffix("!")) == pytest.approx(float(weights) + float(cache), abs=0.01)
    assert total.endswith("!") and rows == "0"  # 24 GB cannot hold it
    two = lines[4].split()
    assert float(two[3]) == pytest.approx(dense / 2, rel=1e-3) and "!" not in two[4] and two[5] == "1"
    assert lines[-1].startswith("Not counted")


def test_another_cache_and_a_checkpoint(capsys: pytest.CaptureFixture) -> None:
    main(["plan", "demo", "--devices", "8", "--context", "500", "--kv-cache", "sink", "--kv-cache.budget", "64"])
    out = capsys.readouterr().out
    assert "sink 64 MB" in out and out.splitlines()[1].startswith("MB (10^6 bytes)") and "of 500 tokens" in out
    assert "'litgpt-kv-demo' has 6 heads: 1 to 6 devices can share it, not 8." in out
    assert "6 layers can be laid over 1 to 6 devices, not 8." in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["demo", "--context", "0"], "context must be at least 1, got 0"),
        (["no-such-model"], "no checkpoint folder 'no-such-model'"),
        (["EleutherAI/pythia-14n"], "'demo' is shipped. Did you mean 'pythia-14m'?"),
        (["demo", "--devices", "0"], "devices must be at least 1, got 0"),
        (["demo", "--precision", "8-bit"], "precision must be one of"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_names_with_the_organisation(capsys: pytest.CaptureFixture) -> None:
    tables = []
    for name in ("pythia-14m", "EleutherAI/pythia-14m"):
        main(["plan", name, "--devices", "1"])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and "one device             1     28.17" in tables[0]


def test_a_stream_past_the_context_has_no_dense_cache(capsys: pytest.CaptureFixture) -> None:
    main(["plan", "demo", "--context", "5000", "--kv-cache", "sink", "--kv-cache.budget", "64"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line.split() for line in lines if line.startswith("one device")]
    assert line[4:7] == ["-", "-", "-"] and float(line[8]) > 0
    assert lines[-2].startswith("- dense: A dense cache of 5000 tokens is over the limit of 1024")


def test_what_cannot_be_divided_says_why(capsys: pytest.CaptureFixture) -> None:
    cache = ["--kv-cache", "keydiff", "--kv-cache.budget", "64", "--kv-cache.select"]
    for select, given, message in (
        ("model", "tensor_parallel", "all heads, which must be on one device: they are divided among 3."),
        ("model", "sequential", "all layers, which must be on one device: they are on 3."),
        ("pool", "tensor_parallel", "pools 1 would cross devices: the 3 key/value heads of a layer"),
    ):
        main(["plan", "demo", "--devices", "3", *cache, select])
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line.split() for line in lines if line.split()[:2] == [given, "3"]]
        assert line[-3:] == ["-", "-", "-"]
        assert any(line.startswith(f"- {given}, keydiff 64: ") and message in line for line in lines)
