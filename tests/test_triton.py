"""The Triton kernels of extensions/triton equal naive attention: on a CUDA device, or in Triton's interpreter on a CPU.

The interpreter must be asked for before triton is imported, so the tests run in a process of their own where it was
not. Skipped where triton is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from litgpt_kv import KVCache, KVCacheArgs, registry
from litgpt_kv.attention.causal import received_attention
from litgpt_kv.attention.kernels import choose_kernel
from litgpt_kv.attention.rope import rotate, signed
from tests.oracle.reference import Oracle, Policy, arguments, kept_of, logits_of, tiny, tokens_of, walk
from tests.oracle.walks import storages_for

pytest.importorskip("triton", reason="needs triton")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "extensions" / "triton"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
READY = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
here = pytest.mark.skipif(not READY, reason="runs in a process of its own")
STORAGES = ("plain", "int8", "int4", "int4-hadamard", "k8v4", "float8")


@pytest.mark.skipif(READY, reason="this is that process")
def test_all_others_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    env = dict(os.environ, TRITON_INTERPRET="1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The extension: its kernel is registered, and reads what is on the CPU, too; small blocks make many of them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    extension = importlib.import_module("litgpt_kv_triton")
    monkeypatch.setitem(registry._KINDS["kernel"], "triton", extension.Triton)
    monkeypatch.setattr(extension.kernel, "DEVICES", {DEVICE.type})
    for module, name in ((extension.decode, "SLOTS"), (extension.columns, "BLOCK")):
        monkeypatch.setattr(module, name, 16)
    monkeypatch.setattr(extension.decode, "JOINED", 16)
    return extension


# -- one step ----------------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, near: tuple | None, scale: float, cap: float | None):
    """One query head and one key after the other, in float64: output (B, H, Dv) and the mass of a set (B, P, N)."""
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    (B, H, _), (_, P, N, _) = q.shape, k.shape
    M = H // P
    y, mass = torch.zeros(B, H, v.size(-1), dtype=torch.float64), torch.zeros(B, P, N, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            scores = []
            for s in range(N):
                query = q[b, h]
                if near is not None and s < near[1].size(-1) and near[1][b, h // M, s]:
                    query = near[0][b, h].double().cpu()
                score = float(query @ k[b, h // M, s]) * scale
                score = score if cap is None else cap * math.tanh(score / cap)
                scores.append(score if mask is None or mask[b, h // M, h % M, s] else -math.inf)
            if max(scores) == -math.inf:  # a row that sees nothing has an output that nobody reads, but a finite one
                scores = [0.0] * N
            weights = [math.exp(score - max(scores)) for score in scores]
            for s, w in enumerate(weights):
                y[b, h] += w / sum(weights) * v[b, h // M, s]
                mass[b, h // M, s] += w / sum(weights) / 2
    return y, mass


class View:
    """What a kernel reads of a `DecodeView`."""

    value_padding = False
    per_group = 2

    def __init__(
        self, spec: object, extent: int, mask: Tensor | None, near: tuple | None, angles: tuple | None
    ) -> None:
        self.spec, self.extent, self.mask, self.sink_queries, self.key_angles = spec, extent, mask, near, angles


CASES = {
    "grouped": dict(P=2, M=2),
    "no mask": dict(P=1, M=3, masked=False),
    "a pool": dict(P=1, M=6, owned=True),
    "many heads": dict(P=1, M=66, B=1, S=20, N=17, D=3, Dv=3),
    "softcap": dict(P=2, M=1, softcap=2.0),
    "own queries of sinks": dict(P=2, M=2, sinks=18),
    "unrotated keys": dict(P=2, M=2, rope=6),
    "a single slot": dict(P=2, M=2, S=3, N=1, masked=False),
    "wide values": dict(P=1, M=2, D=5, Dv=33),
    "many parts": dict(P=1, M=2, B=1, S=2200, N=2190, D=3, Dv=3),
    "wide": dict(P=2, M=2, D=32, Dv=64, sinks=18),  # codes of 4 bits are read by halves
}


@here
@pytest.mark.parametrize("parts", [1, 3, 200])
@pytest.mark.parametrize(
    ("case", "storage"), [(c, "plain") for c in CASES] + [(c, s) for s in STORAGES[1:] for c in ("grouped", "wide")]
)
def test_a_step_equals_naive_attention(
    triton: ModuleType, case: str, storage: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (parts == 200) != (case == "many parts"):
        pytest.skip("many parts need many slots")
    sizes = dict(B=2, S=50, N=41, D=10, Dv=10, rope=0, sinks=0, softcap=None, masked=True, owned=False) | CASES[case]
    B, P, M, S, N, D, Dv, rope = (sizes[n] for n in ("B", "P", "M", "S", "N", "D", "Dv", "rope"))
    keys, values = (
        registry.build("storage", storage, role, (B, P, S, width), torch.float32, DEVICE)
        for role, width in (("keys", D), ("values", Dv))
    )
    for seed, (store, width) in enumerate(((keys, D), (values, Dv))):
        store.write(torch.arange(S, device=DEVICE).expand(B, 1, S), draw(B, P, S, width, seed=seed))
    q, mask, near, angles = draw(B, P * M, 1, D, seed=2) * 2, None, None, None
    if sizes["owned"]:  # a query head sees the slots of its own key/value head
        owner = draw(B, P, 1, N, seed=3).gt(0).long()
        mask = owner == torch.arange(M, device=DEVICE).view(M, 1) // 3
    elif sizes["masked"]:
        mask = draw(B, P, 1, N, seed=3).gt(-0.5).expand(B, P, M, N)
        mask = mask & torch.ones(B, 1, 1, 1, dtype=torch.bool, device=DEVICE).index_fill(
            0, torch.tensor(0, device=DEVICE), B > 1
        )
    if sizes["sinks"]:
        near = draw(B, P * M, 1, D, seed=4), draw(B, P, sizes["sinks"], seed=5).gt(0)
    read = keys.read(N)
    if rope:
        theta = draw(B, P, N, rope, seed=6) * 3
        angles = theta.cos(), signed(theta.sin(), rope)
        read = rotate(read, angles, rope)
    spec = tiny(exact=False).transformer.h[0].attn.spec
    spec = replace(spec, heads=P * M, groups=P, scale=0.4, softcap=sizes["softcap"], rope_size=rope)
    monkeypatch.setattr(triton.kernel, "AUTO", parts)
    y, received = triton.Triton().attend(q, keys, values, View(spec, N, mask, near, angles), ("mass", "last"))
    found = None if near is None else (near[0][:, :, 0], near[1])
    expected, mass = naive(q[:, :, 0], read, values.read(N), mask, found, 0.4, sizes["softcap"])
    assert y.dtype == torch.float32 and list(received) == ["mass", "last"]
    torch.testing.assert_close(y[:, :, 0].double().cpu(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(received["mass"].double().cpu(), mass, rtol=0, atol=1e-5)


@here
def test_what_a_hidden_slot_or_one_beyond_the_extent_holds_does_not_matter(triton: ModuleType) -> None:
    keys, values = (
        registry.build("storage", "plain", r, (1, 1, 40, 8), torch.float32, DEVICE) for r in ("keys", "values")
    )
    slots = torch.arange(40, device=DEVICE).view(1, 1, -1)
    keys.write(slots, draw(1, 1, 40, 8)), values.write(slots, draw(1, 1, 40, 8, seed=1))
    mask = torch.arange(30, device=DEVICE).ne(7).view(1, 1, 1, 30)
    spec = tiny(exact=False).transformer.h[0].attn.spec
    view, kernel, outputs = View(spec, 30, mask, None, None), triton.Triton(), []
    for _ in range(2):
        outputs.append(kernel.attend(draw(1, 2, 1, 8, seed=2), keys, values, view, ("mass",)))
        keys.data[:, :, 30:], values.data[:, :, 30:], keys.data[:, :, 7] = torch.nan, torch.nan, 1e4
    assert torch.equal(outputs[0][0], outputs[1][0]) and float(outputs[1][1]["mass"][0, 0, 7]) == 0
    assert float(outputs[1][1]["mass"].sum()) == pytest.approx(1, abs=1e-6)


@here
def test_half_precision_is_that_of_its_numbers(triton: ModuleType) -> None:
    """float16: the interpreter multiplies the bits of bfloat16 numbers, so bfloat16 is for devices alone."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    q, k, v = (
        draw(2, 4, 1, 8, dtype=dtype),
        draw(2, 2, 40, 8, seed=1, dtype=dtype),
        draw(2, 2, 40, 8, seed=2, dtype=dtype),
    )
    stores = [registry.build("storage", "plain", r, k.shape, dtype, DEVICE) for r in ("keys", "values")]
    for store, x in zip(stores, (k, v)):
        store.data.copy_(x)
    spec = replace(tiny(exact=False).transformer.h[0].attn.spec, scale=0.4)
    y, received = triton.Triton().attend(q, *stores, View(spec, 40, None, None, None), ("mass",))
    expected, mass = naive(q[:, :, 0], k, v, None, None, 0.4, None)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    torch.testing.assert_close(y[:, :, 0].double().cpu(), expected, rtol=0, atol=2 * eps)
    torch.testing.assert_close(received["mass"].double().cpu(), mass, rtol=0, atol=1e-5)


# -- a prompt ----------------------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize(
    ("T", "start", "last", "window", "softcap"),
    [
        (40, 0, -1, None, None),
        (17, 23, -1, None, 2.0),
        (40, 0, 1, None, None),
        (40, 0, 5, 9, None),
        (17, 23, -1, 6, None),
    ],
)
def test_what_a_prompt_receives_equals_the_plain_sums(
    triton: ModuleType, T: int, start: int, last: int, window: int | None, softcap: float | None
) -> None:
    q, k, length = draw(3, 4, T, 10) * 2, draw(3, 2, 40, 10, seed=1), torch.tensor([40, 31, 25], device=DEVICE)
    facts = dict(scale=0.4, softcap=softcap, window=window, start=start)
    expected = received_attention(q.double(), k.double(), length, last, **facts)
    for b, n in enumerate(length.tolist()):  # what pads hold does not matter
        q[b, :, n - start :], k[b, :, n:] = torch.nan, torch.nan
    found = triton.Triton().received_attention(q, k, length, last, **facts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    if T == 40 and last == -1:  # the log-sum-exp may be known
        scores = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT * 0.4).flatten(1, 2)
        lse = scores.masked_fill(torch.ones(T, T, device=DEVICE).triu(1).bool(), -math.inf).logsumexp(-1)
        again = triton.Triton().received_attention(q, k, length, last, **facts, lse=lse)
        torch.testing.assert_close(again, found, rtol=0, atol=1e-5)


# -- a whole decode ----------------------------------------------------------------------------------------------------

ROWS, PROMPTS = [tokens_of(1, 20), tokens_of(2, 13)], [13, 4]
POLICIES = {
    "h2o": Policy("h2o", 8, sinks=1, recent=2),
    "h2o in the cache": Policy("h2o", 8, sinks=1, recent=2, positions="cache"),
    "sink": Policy("sink", 8, sinks=2),
    "pool": Policy("h2o", 8, sinks=1, recent=2, select="pool", interval=3),
}


@here
@pytest.mark.parametrize("name", POLICIES)
def test_a_decode_of_ragged_rows_equals_the_naive_model(triton: ModuleType, name: str) -> None:
    """Kept tokens are equal at every step; logits as float32 is to float64."""
    policy, model = POLICIES[name], tiny(seed=3, exact=False).to(DEVICE)
    cache = KVCache.build(model, arguments(policy, attention="triton"), len(ROWS), 40)
    assert all(isinstance(layer.kernel, triton.Triton) for layer in cache.layers)
    exact = tiny(seed=3)
    references = [Oracle(exact, replace(policy, prompt=n)) for n in PROMPTS]
    for at, logits in walk(model, cache, ROWS, PROMPTS, "full"):
        for b, i in enumerate(at):
            if i is None:
                continue
            moment = references[b].feed(ROWS[b][references[b].seen : i + 1])[-1]
            torch.testing.assert_close(logits[b].double().cpu(), moment.logits, rtol=0, atol=2e-5)
            assert kept_of(cache, b) == [[sorted(head) for head in layer] for layer in moment.kept]


@here
@pytest.mark.parametrize("storage", ["int4-hadamard", "k8v4"])
def test_a_decode_from_codes_equals_that_of_the_plain_kernel(triton: ModuleType, storage: str) -> None:
    model, found, kept, rows = tiny(seed=3, exact=False).to(DEVICE), [], [], [ROWS[0][:16], ROWS[1][:11]]
    for kernel in ("triton", "eager"):
        cache = KVCache.build(model, KVCacheArgs("h2o", 8, storage=storage, attention=kernel), 2, 40)
        found.append(logits_of(model, cache, rows, PROMPTS, "full"))
        kept.append([kept_of(cache, b) for b in range(2)])
    assert kept[0] == kept[1]
    for b in range(2):
        for i, logits in found[1][b].items():
            torch.testing.assert_close(found[0][b][i], logits, rtol=0, atol=2e-5)


@here
def test_a_decode_compiles_to_one_graph(triton: ModuleType) -> None:
    model, rows = tiny(seed=3, exact=False, n_layer=1).to(DEVICE), [ROWS[0][:16], ROWS[1][:11]]
    args = KVCacheArgs("h2o", 8, attention="triton", sinks=1, recent=2)
    caches = [KVCache.build(model, args, 2, 40, static=static) for static in (False, True)]
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", fullgraph=True)
    eager, compiled = (
        logits_of(model, cache, rows, PROMPTS, "full", step=s) for cache, s in zip(caches, (model, step))
    )
    for b in range(2):
        for i, logits in eager[b].items():
            torch.testing.assert_close(compiled[b][i], logits, rtol=0, atol=2e-5)


# -- without a GPU -----------------------------------------------------------------------------------------------------


class Compiling:
    """Takes the place of a Triton function: compiles it for a GPU with the arguments that it is called with."""

    names: ClassVar[dict] = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.int32: "*i32",
        torch.uint8: "*u8",
        torch.int8: "*i8",
    }

    def __init__(self, function: Any) -> None:
        self.function, self.shared = function, []

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        return self.compile

    def compile(self, *values: Any, num_stages: int = 3, num_warps: int = 4, **constants: Any) -> None:
        target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 80, 32)
        compiler = importlib.import_module("triton.compiler")
        kinds = {}
        for name, x in zip(self.function.arg_names, values):
            kinds[name] = "fp32" if isinstance(x, float) else "i32" if isinstance(x, int) else self.names[x.dtype]
        source = compiler.ASTSource(self.function, kinds | dict.fromkeys(constants, "constexpr"), constants)
        done = compiler.compile(source, target=target, options={"num_stages": num_stages, "num_warps": num_warps})
        assert "mma.sync" in done.asm["ptx"] or self.function.__name__ == "_join_parts"
        self.shared.append(done.metadata.shared)


@pytest.mark.skipif(READY, reason="the interpreter does not compile")
def test_the_kernels_compile_for_a_gpu_and_fit_its_shared_memory(
    triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.decode, "SLOTS", 64), monkeypatch.setattr(triton.columns, "BLOCK", 64)
    compiled = []
    for module, name in [(triton.decode, "_attend_part"), (triton.decode, "_join_parts")] + [
        (triton.columns, name) for name in ("_queries_lse", "_columns")
    ]:
        compiled.append(Compiling(getattr(module, name)))
        monkeypatch.setattr(module, name, compiled[-1])
    q = torch.zeros(1, 32, 1, 128, dtype=torch.bfloat16)
    every = torch.ones(1, 8, 1, 64, dtype=torch.bool)
    angles = torch.zeros(1, 8, 64, 128), torch.zeros(1, 8, 64, 128)
    careful = dict(mask=every, near=(q, every[:, :, 0]), angles=angles)
    for storage, view in (("plain", {}), ("int4", careful), ("int8", {}), ("int4", {}), ("float8", {})):
        stores = [registry.build("storage", storage, r, (1, 8, 64, 128), q.dtype, q.device) for r in ("keys", "values")]
        spec = replace(tiny(exact=False).transformer.h[0].attn.spec, softcap=2.0 if view else None, rope_size=128)
        view = dict(mask=None, near=None, angles=None) | view
        triton.Triton().attend(q, *stores, View(spec, 64, **view), ("mass",))
    keys, facts = q[:, :8].expand(-1, -1, 64, -1), dict(scale=1.0, softcap=2.0, window=8)
    triton.Triton().received_attention(q.expand(-1, -1, 64, -1), keys, torch.tensor([64]), **facts)
    assert [len(one.shared) for one in compiled] == [5, 5, 1, 1]
    assert max(max(one.shared) for one in compiled) < 99 * 1024


@here
def test_the_benchmark_runs(triton: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times mean nothing here, but its checks do."""
    spec = importlib.util.spec_from_file_location("bench", FOLDER / "bench.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "HEAD", 16), monkeypatch.setattr(bench, "STORAGES", ("plain", "int4-hadamard"))
    shape = bench.Shape(1, 32, 4, 2, 16, 16)
    out, facts = tmp_path / "out.json", dict(layers=1, repeats=1, device=DEVICE.type, shape=shape)
    bench.main(str(out), contexts=(20,), batches=(1,), budget=8, **facts)
    found = json.loads(out.read_text())
    assert len(found["checks"]) == 2 * 2 * 2 and all(row["ok"] for row in found["checks"])
    assert {row["cache"] for row in found["decode"]} == {name for name, *_ in bench.CONTENDERS}
    assert found["machine"]["triton"] and found["copy_bytes_per_s"] > 0
    assert all(row["best_s"] > 0 for row in found["attention"] + found["decode"])


# -- who uses it -------------------------------------------------------------------------------------------------------


@here
def test_cuda_uses_it_by_itself_and_a_cpu_never(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.kernel, "DEVICES", {"cuda"})
    for storage in storages_for("sink"):
        stores = [
            registry.build("storage", storage, role, (1, 2, 40, 8), torch.float32, torch.device("cpu"))
            for role in ("keys", "values")
        ]
        chosen = choose_kernel(None, *stores, torch.device("cuda"))
        assert isinstance(chosen, triton.Triton) == (storage in STORAGES), storage
        assert not isinstance(choose_kernel(None, *stores, torch.device("cpu")), triton.Triton)
    with pytest.raises(ValueError, match="'triton' does not read Plain and Plain on cpu; use 'eager'"):
        KVCache.build(tiny(exact=False), KVCacheArgs(attention="triton"), 1, 8)


@here
@pytest.mark.parametrize("reason", ["float64", "a block", "gradients"])
def test_what_it_does_not_take_goes_to_the_reference(
    triton: ModuleType, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.kernel, "decode_attention", None)  # must not be called
    model = tiny(seed=3, exact=reason == "float64").to(DEVICE)
    cache = KVCache.build(model, KVCacheArgs("h2o", 8, attention="triton"), 1, 40)
    with torch.no_grad():
        model(torch.tensor([ROWS[0][:5]], device=DEVICE), cache, torch.tensor([5], device=DEVICE))
    model.requires_grad_(reason == "gradients")
    with torch.set_grad_enabled(reason == "gradients"):
        new = ROWS[0][5:7] if reason == "a block" else ROWS[0][5:6]
        assert model(torch.tensor([new], device=DEVICE), cache).isfinite().all()


def test_installing_it_is_enough() -> None:
    """The entry point names the package, whose import registers the kernel."""
    lines = (FOLDER / "pyproject.toml").read_text().splitlines()
    at = lines.index(f'[project.entry-points."{registry.ENTRY_POINT}"]')
    assert lines[at + 1].startswith('triton = "litgpt_kv_triton"')
    assert '@register("kernel", "triton")' in (FOLDER / "litgpt_kv_triton" / "kernel.py").read_text()
