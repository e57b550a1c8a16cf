"""Quantised storages equal naive quantisers: what is read, what attention makes of it, and what stays as it was."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from litgpt_kv import GPT, KVCache, KVCacheArgs, registry
from litgpt_kv.attention import integer
from tests.cache.test_storage import draw
from tests.oracle.quantise import apply, naive, quantiser
from tests.oracle.reference import kept_of, logits_of, tiny, tokens_of
from tests.oracle.walks import storages_for

QUANTISED = [n for n in storages_for("h2o") if n != "plain"]
CODES = ("int8", "int4", "int4-hadamard", "k8v4")  # those that multiply what they hold
ERROR = {"int8": 0.5 / 127, "k8v4": 0.5 / 127, "float8": 1 / 16}  # of a token's largest magnitude
ROWS, PROMPTS = [tokens_of(1, 24), tokens_of(2, 16)], [13, 4]
KIVI = {"bits": 4, "group": 3}
LATENT = dict(
    n_query_groups=4,
    latent_attention=dict(q_lora_rank=8, kv_lora_rank=9, qk_rope_head_dim=6, qk_nope_head_dim=5, v_head_dim=7),
)


def make(name: str, role: str, shape: tuple, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    return registry.build("storage", name, role, shape, dtype, torch.device("cpu"), **options)


def filled(name: str, role: str, x: Tensor, **options) -> torch.nn.Module:
    store = make(name, role, tuple(x.shape), x.dtype, **options)
    store.write(torch.arange(x.size(2)).expand(x.size(0), 1, -1), x)
    return store


def close(a: Tensor, b: Tensor, tol: float = 1e-8) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of int8 numbers are used however few there are, and on every processor."""
    monkeypatch.setattr(integer, "FEWEST", 1)
    monkeypatch.setattr(integer, "FAST", True)


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("width", [1, 6, 9, 64, 80, 576])
def test_tokens_are_those_of_the_naive_quantiser(name: str, width: int) -> None:
    x = draw(2, 2, 5, width, dtype=torch.float64) * torch.tensor([1e-3, 0.0, 1.0, 50.0, 1e4]).view(5, 1)
    for role in ("keys", "values"):
        close(filled(name, role, x).read(5), apply(quantiser(name, role), x), 1e-9)


@pytest.mark.parametrize("name", ["int4", "int4-hadamard", "k8v4"])
@pytest.mark.parametrize("group", [1, 4, 7, 100])
def test_groups_are_as_even_as_can_be(name: str, group: int) -> None:
    x = draw(1, 2, 3, 10, dtype=torch.float64)
    store = filled(name, "values", x, group=group)
    close(store.read(3), apply(quantiser(name, "values", group), x), 1e-9)
    assert store.scale.size(-1) == {1: 10, 4: 3, 7: 2, 100: 1}[group]


@pytest.mark.parametrize("name", QUANTISED)
def test_the_error_is_half_a_step(name: str) -> None:
    x = draw(2, 2, 50, 64, dtype=torch.float64)
    for role in ("keys", "values"):
        error = (filled(name, role, x).read(50) - x).abs()
        if registry.get("storage", name).bits == 8 or (name, role) == ("k8v4", "keys"):
            bound = ERROR[name] * x.abs().amax(-1, keepdim=True)
        elif name == "int4-hadamard":
            error, bound = error.norm(dim=-1), (x.amax(-1) - x.amin(-1))  # 8 * half a step of a range of 2 of these
        else:
            groups = x.unflatten(-1, (2, 32))
            bound = ((groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) * (0.5 / 15 + 2**-7)).expand(
                groups.shape
            )
            bound = bound.flatten(-2)
        assert (error <= bound * (1 + 1e-6)).all()


def test_a_hadamard_matrix_spreads_an_outlier() -> None:
    """One channel 20 times the others: int4's error falls by more than a half."""
    x = draw(1, 1, 200, 64, dtype=torch.float64)
    x[..., 5] *= 20
    errors = {
        n: float((filled(n, "keys", x, group=64).read(200) - x).square().mean()) for n in ("int4", "int4-hadamard")
    }
    assert errors["int4-hadamard"] < 0.5 * errors["int4"]


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_harms_no_other_token(name: str, value: float) -> None:
    x = draw(1, 2, 4, 8, dtype=torch.float64)
    bad = x.clone()
    bad[0, 1, 2, 3] = value
    found, expected = filled(name, "values", bad).read(4), filled(name, "values", x).read(4)
    assert not found[0, 1, 2].isfinite().all()
    found[0, 1, 2] = expected[0, 1, 2]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [*QUANTISED, "kivi"])
def test_a_cast_cache_keeps_codes_and_scales(name: str) -> None:
    x = draw(1, 2, 40, 8)
    store = filled(name, "keys", x)
    before, read = {n: b.clone() for n, b in store.named_buffers()}, store.read(40)
    store.to(torch.bfloat16)
    assert store.read(40).dtype == torch.bfloat16
    assert all(
        b.dtype == before[n].dtype and torch.equal(b, before[n]) for n, b in store.named_buffers() if n != "recent"
    )
    close(store.read(40).float(), read, 0.02)


def test_bytes_of_a_token() -> None:
    """Of a head of 64: keys and values with their scales."""
    expected = {"plain": (128, 128), "int8": (68, 68), "int4": (40, 40), "int4-hadamard": (40, 40)}
    expected |= {"k8v4": (68, 40), "float8": (68, 68)}
    for name, sizes in expected.items():
        stores = [make(name, role, (1, 1, 1000, 64), torch.bfloat16) for role in ("keys", "values")]
        assert tuple(sum(b.nbytes for b in store.buffers()) / 1000 for store in stores) == sizes
        bits = [store.bits for store in stores]
        assert bits == {"plain": [None, None], "k8v4": [8, 4]}.get(name, [registry.get("storage", name).bits] * 2)


# -- attention over it -------------------------------------------------------------------------------------------------


def caches(model: GPT, monkeypatch: pytest.MonkeyPatch, name: str, storage_options: dict, **args) -> list[KVCache]:
    monkeypatch.setitem(registry._KINDS["storage"], "naive", naive(name))
    return [
        KVCache.build(model, KVCacheArgs(storage=s, storage_options=storage_options, **args), 2, 40)
        for s in (name, "naive")
    ]


WAYS = {
    "dense": dict(strategy="dense"),
    "h2o": dict(strategy="h2o", budget=9, sinks=1),
    "h2o in the cache": dict(strategy="h2o", budget=9, positions="cache"),
    "sink": dict(strategy="sink", budget=9),
    "pool": dict(strategy="h2o", budget=8, select="pool", interval=3),
}


def agree(model: GPT, pair: list[KVCache], tol: float = 1e-8) -> None:
    for way in ("full", "streamed"):
        ours, theirs = (logits_of(model, cache, ROWS, PROMPTS, way) for cache in pair)
        for b in range(2):
            assert ours[b].keys() == theirs[b].keys()
            for i, logits in theirs[b].items():
                close(ours[b][i], logits, tol)
            assert kept_of(pair[0], b) == kept_of(pair[1], b)
        for cache in pair:
            cache.reset()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("way", WAYS)
def test_attention_is_that_over_naively_quantised_tokens(
    name: str, way: str, gqa: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"group": 4} if "4" in name else {}
    pair = caches(gqa, monkeypatch, name, options, **WAYS[way])
    agree(gqa, pair)


@pytest.mark.parametrize("name", QUANTISED)
def test_latent_attention_over_naively_quantised_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(seed=4, **LATENT)
    agree(model, caches(model, monkeypatch, name, {}, strategy="h2o", budget=9))


def test_keys_without_width_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention without a rotary part has nothing but latents."""
    sizes = dict(LATENT, latent_attention={**LATENT["latent_attention"], "qk_rope_head_dim": 0})
    for name in QUANTISED:
        model = tiny(seed=4, **sizes)
        agree(model, caches(model, monkeypatch, name, {}, strategy="dense"))


# -- products of codes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "error"), [(3, 2**-22), (2, 2**-14)])
@pytest.mark.parametrize(("M", "K", "S"), [(1, 2, 5), (3, 9, 40), (4, 64, 700), (12, 576, 33), (2, 1, 6)])
def test_products_of_int8_rows(parts: int, error: float, M: int, K: int, S: int, fast: None) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (2, S + 3, K), dtype=torch.int8, generator=generator)[:, :S]
    x, p = draw(2, M, K), draw(2, M, S).softmax(-1)
    x[0, 0], p[1, 0] = 0, 0
    for found, exact, left in (
        (integer.products(x, codes, parts), x.double() @ codes.double().mT, x),
        (integer.sums(p, codes, parts), p.double() @ codes.double(), p),
    ):
        bound = error * 127 * left.double().abs().amax(-1, keepdim=True) * left.size(-1) ** 0.5
        assert found.dtype == torch.float32 and ((found - exact).abs() <= bound + 1e-12).all()


def test_sums_too_long_for_an_int32_are_made_in_pieces(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "MOST", 10)
    codes = torch.full((1, 35, 4), 127, dtype=torch.int8)
    close(integer.sums(torch.ones(1, 2, 35), codes, 3), torch.full((1, 2, 4), 35 * 127.0), 1e-3)
    assert 2**31 // 127**2 * 127**2 < 2**31


def test_queries_that_are_not_finite_give_what_is_not(fast: None) -> None:
    codes, x = torch.ones(1, 8, 4, dtype=torch.int8), torch.zeros(1, 2, 4)
    x[0, 0, 1], x[0, 1] = float("nan"), 1.0
    found = integer.products(x, codes, 3)
    assert found[0, 0].isnan().all() and (found[0, 1] == 4).all()


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("case", [*WAYS, "latent", "latent with a bias", "softcap"])
def test_the_kernel_of_codes_equals_the_reference(name: str, case: str, fast: None) -> None:
    """float32 models: the logits of kernels "products" and "eager" differ as sums of floats do."""
    extra = {"latent": LATENT, "latent with a bias": dict(LATENT, bias=True, attn_bias=True)}
    extra["softcap"] = dict(attention_logit_softcapping=3.0)
    model = tiny(seed=3, exact=False, **extra.get(case, {}))
    args = WAYS.get(case, WAYS["h2o"]) | {"storage": name, "storage_options": {"group": 4} if name != "int8" else {}}
    found = []
    for kernel in ("products", "eager"):
        cache = KVCache.build(model, KVCacheArgs(attention=kernel, **args), 2, 40)
        found.append(logits_of(model, cache, ROWS, PROMPTS, "full"))
        assert type(cache.layers[0].kernel).__name__.lower() == kernel
    for b in range(2):
        for i, logits in found[1][b].items():
            close(found[0][b][i], logits, 2e-4)


def test_the_kernel_of_codes_is_chosen_where_it_can_be(gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels(storage: str, fast: bool) -> set[str]:
        monkeypatch.setattr(integer, "FAST", fast)
        cache = KVCache.build(gqa, KVCacheArgs(storage=storage), 1, 8)
        return {type(layer.kernel).__name__ for layer in cache.layers}

    for name in storages_for("dense"):
        assert kernels(name, True) == {"Products" if name in CODES else "Eager"}
        assert kernels(name, False) == {"Eager"}
    with pytest.raises(ValueError, match="kernel 'products' does not read Plain and Plain on cpu; use 'eager'"):
        KVCache.build(gqa, KVCacheArgs(attention="products"), 1, 8)


# -- the whole cache ---------------------------------------------------------------------------------------------------


def build(model: GPT, name: str, strategy: str = "window", **others) -> KVCache:
    options = KIVI if name == "kivi" else {}
    return KVCache.build(model, KVCacheArgs(strategy, 8, storage=name, storage_options=options), 2, 40, **others)


@pytest.mark.parametrize("name", storages_for("window"))
@torch.no_grad()
def test_a_saved_cache_goes_on_and_bytes_are_what_is_allocated(name: str, gqa: GPT, tmp_path) -> None:
    cache = build(gqa, name)
    gqa(torch.tensor([row[:13] for row in ROWS]), cache, torch.tensor(PROMPTS))
    stores = [store for layer in cache.layers for store in (layer.keys, layer.values)]
    held = sum(b.untyped_storage().nbytes() for store in stores for b in store.buffers())
    announced = KVCache.nbytes(gqa.config, cache.args, 2, 40, dtype=torch.float64)
    assert announced == cache.allocated() and announced["keys"] + announced["values"] == held
    cache.save(tmp_path / "a")
    again = KVCache.load(tmp_path / "a", gqa, cache.args)
    copies = cache.repeat(2)
    for i in range(13, 16):
        idx = torch.tensor([[row[i]] for row in ROWS])
        logits = gqa(idx, cache)
        assert torch.equal(gqa(idx, again), logits)
        close(gqa(idx.repeat_interleave(2, 0), copies), logits.repeat_interleave(2, 0), 1e-10)


@pytest.mark.parametrize(("buffer", "value"), [("group_of", 99), ("recent_slot", 10), ("open", 3), ("open", -1)])
@torch.no_grad()
def test_kivi_of_a_damaged_file_is_refused(buffer: str, value: int, gqa: GPT, tmp_path) -> None:
    cache = build(gqa, "kivi")
    gqa(torch.tensor([row[:13] for row in ROWS]), cache, torch.tensor(PROMPTS))
    getattr(cache.layers[1].values, buffer)[..., 0] = value
    cache.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"cannot be read as a cache: .*a storage's"):
        KVCache.load(tmp_path / "a", gqa)


@pytest.mark.parametrize("name", storages_for("window"))
def test_decoding_is_one_graph(name: str, fast: None) -> None:
    model, graphs = tiny(n_layer=1, exact=False), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, fullgraph=True)
    eager = logits_of(model, build(model, name), ROWS, PROMPTS, "full")
    compiled = logits_of(model, build(model, name, static=True), ROWS, PROMPTS, "full", step=step)
    for b in range(2):
        for i, logits in eager[b].items():
            close(compiled[b][i], logits, 1e-4)
    assert len(graphs) == 1


def test_layers_may_differ_and_share_options(gqa: GPT) -> None:
    args = KVCacheArgs("h2o", 8, storage=["int8", "int4"], storage_options={"group": 3})
    cache = KVCache.build(gqa, args, 2, 40)
    assert [layer.keys.bits for layer in cache.layers] == [8, 4] and cache.layers[1].keys.size == 3
    assert len(cache.slots) == 1  # they keep their books together


REFUSED = {
    "must leave in order, which those of 'h2o' do not. Strategies that do: dense": dict(strategy="h2o", storage="kivi"),
    "leave one at a time: interval must be 1, got 2": dict(strategy="window", storage="kivi", budget=8, interval=2),
    "bits of the storage 'kivi' must be one of (2, 4), got 3": dict(storage="kivi", storage_options={"bits": 3}),
    "bits of the storage 'kivi' must be one of (2, 4), got 2.0": dict(storage="kivi", storage_options={"bits": 2.0}),
    "group of the storage 'kivi' must be a whole number": dict(storage="kivi", storage_options={"group": 0}),
    "group of the storage 'int4' must be a whole number": dict(storage="int4", storage_options={"group": True}),
    "group of the storage 'k8v4' must be a whole number": dict(storage="k8v4", storage_options={"group": "x"}),
    "Unknown option 'group' for the storage 'int8'. It takes no options.": dict(
        storage="int8", storage_options={"group": 4}
    ),
    "Unknown storage 'int3'. Available: float8, int4": dict(storage="int3"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused_at_the_door(message: str, gqa: GPT) -> None:
    for call in (
        lambda args: KVCache.build(gqa, args, 1, 40),
        lambda args: KVCache.nbytes(gqa.config, args, 1, 40),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(KVCacheArgs(**REFUSED[message]))
