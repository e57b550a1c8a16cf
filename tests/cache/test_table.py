"""One budget for all layers (`select: model`): what a table of slots must hold besides what the reference keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from litgpt_kv import GPT, KVCache, KVCacheArgs
from litgpt_kv.cache.constants import connect
from litgpt_kv.cache.door import own_pools
from litgpt_kv.cache.serialize import checksum
from tests.oracle.reference import Policy, compare, kept_of, logits_of, tiny

C, PROMPTS = 8, [19, 5, 12]
LATENT = dict(q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5)


@pytest.fixture(scope="module")
def model() -> GPT:
    model = tiny(seed=5, n_layer=3)
    model.transformer.wte.weight[60] = math.nan
    return model


def args_of(strategy: str = "kvzip", **others: object) -> KVCacheArgs:
    options = {"chunk": 7} if strategy == "kvzip" else {}
    return KVCacheArgs(strategy, C, sinks=1, recent=2, select="model", options=options, **others)


def rows_of(new: int = 6) -> list[list[int]]:
    return [torch.randperm(60, generator=torch.Generator().manual_seed(n)).tolist()[: n + new] for n in PROMPTS]


def close(found: dict, expected: dict) -> None:
    assert found.keys() <= expected.keys() and found
    for i, logits in found.items():
        torch.testing.assert_close(logits, expected[i], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("strategy", "storage", "way"),
    [("kvzip", "plain", "full"), ("kvzip", "int8", "admitted"), ("keydiff", "k8v4", "full")],
)
def test_a_row_has_its_own_threshold_and_equals_itself_alone(model: GPT, strategy: str, storage: str, way: str) -> None:
    args, rows = args_of(strategy, storage=storage), rows_of()
    cache = KVCache.build(model, args, 4)
    together = logits_of(model, cache, [*rows, [60] * 20], [*PROMPTS, 14], way)
    dealt = [cache.clock.sizes(0, b) for b in range(4)]
    assert dealt[1] is None and len({dealt[0], dealt[2], None}) == 3, dealt  # the second prompt fits the budget
    assert all(sum(sizes) == 3 * 2 * C and min(sizes) >= 2 * (1 + 2 + 1) for sizes in dealt if sizes is not None)
    assert all(logits.isnan().all() for logits in together[-1].values())
    for b, row in enumerate(rows):
        alone = KVCache.build(model, args)
        close(logits_of(model, alone, [row], [PROMPTS[b]], way)[0], together[b])
        assert kept_of(cache, b) == kept_of(alone, 0)


@pytest.mark.parametrize("kind", ["one-group", "latent", "windows"])
def test_other_kinds_of_attention_equal_the_reference(kind: str) -> None:
    changes = {
        "one-group": dict(n_query_groups=1),
        "latent": dict(n_query_groups=4, latent_attention=LATENT),
        "windows": dict(n_layer=4, sliding_window_size=11, sliding_window_indices=[1, 0, 1, 0]),
    }
    policy = Policy("kvzip", C, 1, 2, "cache" if kind == "latent" else "absolute", select="model", floor=0.0)
    rows = [torch.randperm(61, generator=torch.Generator().manual_seed(1)).tolist()[:20]]
    if kind == "windows":  # sinks of layers with a window are others, and so are their slots
        policy = Policy("kvzip", C, 0, 2, select="model")
    compare(tiny(seed=8, **changes[kind]), policy, rows, [15], "full")


@torch.no_grad()
def test_pieces_and_blocks_equal_one_pass(model: GPT) -> None:
    tokens, args = torch.tensor([rows_of(6)[0]]), args_of("keydiff", floor=0.5)
    whole, parts = KVCache.build(model, args, 2), KVCache.build(model, args, 2)
    for cache in (whole, parts):
        cache.retire([0])
    first = model(tokens[:, :19], whole.row(1), torch.tensor([19]))
    reader = parts.read_in_pieces(1, 19)
    for piece in tokens[:, :19].split([3, 9, 7], dim=1):
        last = model(piece, reader)
    torch.testing.assert_close(last, first, rtol=0, atol=1e-8)
    assert parts.clock.sizes(0, 1) == whole.clock.sizes(0, 1) is not None
    assert whole.longest_block == 4  # floor 4 and interval 1 less a sink
    block = tokens[:, 19:23].expand(2, -1)
    torch.testing.assert_close(model(block, parts)[1], model(block, whole)[1], rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="block of 5 tokens is longer than the 4"):
        model(tokens[:, :5].expand(2, -1), whole)


@torch.no_grad()
def test_copies_views_and_files_go_on_as_the_cache(model: GPT, tmp_path: Path) -> None:
    rows = rows_of()
    cache = KVCache.build(model, args_of(), 3)
    logits_of(model, cache, [row[:n] for row, n in zip(rows, PROMPTS)], PROMPTS, "full")
    cache.save(tmp_path / "a")
    loaded, twice = KVCache.load(tmp_path / "a", model), cache.repeat(2)
    first = cache.row(0).repeat(1)
    next_tokens = torch.tensor([[row[n]] for row, n in zip(rows, PROMPTS)])
    expected = model(next_tokens, cache)
    torch.testing.assert_close(model(next_tokens, loaded), expected, rtol=0, atol=0)
    both = model(next_tokens.repeat_interleave(2, dim=0), twice)
    torch.testing.assert_close(both, expected.repeat_interleave(2, dim=0), rtol=0, atol=1e-8)
    cache.restore(0, first)
    torch.testing.assert_close(model(next_tokens[:1], cache.row(0)), expected[:1], rtol=0, atol=1e-8)
    cache.reset([0])
    assert cache.clock.sizes(0, 0) is None and cache.clock.sizes(0, 2) is not None
    again = model(torch.tensor([rows[1][:5]]), cache.row(0), torch.tensor([5]))
    torch.testing.assert_close(model(next_tokens[1:2], cache.row(0)), expected[1:2], rtol=0, atol=1e-8)
    assert again.isfinite().all()


def test_sizes_in_a_file_are_not_believed(model: GPT, tmp_path: Path) -> None:
    cache, path = KVCache.build(model, args_of()), tmp_path / "a"
    logits_of(model, cache, [rows_of(0)[0]], [19], "full")
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), load_file(path)
    sizes = tensors["slots.0.sizes"]
    for wrong in (sizes + 1, sizes - torch.tensor([50, -50, 0]), torch.tensor([[[4, 22, 22]]])):
        changed = {**tensors, "slots.0.sizes": wrong}
        save_file(changed, path, {**metadata, "checksum": checksum(metadata, changed)})
        with pytest.raises(ValueError, match="sizes of the layers of slots 0 are out of range"):
            KVCache.load(path, model)


def test_memory_is_that_of_equal_budgets(model: GPT) -> None:
    cache = KVCache.build(model, args_of(), 2)
    size, where = cache.allocated(), {n: b.data_ptr() for n, b in cache.named_buffers()}
    assert size == KVCache.nbytes(model.config, args_of(), 2, 96, torch.float64)
    equal = KVCache.nbytes(model.config, KVCacheArgs("kvzip", C, options={"chunk": 7}), 2, 96, torch.float64)
    assert (size["keys"], size["values"]) == (equal["keys"], equal["values"])
    logits_of(model, cache, rows_of()[:2], PROMPTS[:2], "full")
    assert cache.allocated() == size and where == {n: b.data_ptr() for n, b in cache.named_buffers()}
    held = sum(len(head) for layer in kept_of(cache, 0) for head in layer)
    assert held == 3 * 2 * C and cache.tokens()["kept"][0] > C


def test_what_is_refused(model: GPT) -> None:
    two = [torch.device("meta", i) for i in (0, 0, 1)]
    for build, message in (
        (lambda: KVCache.build(model, args_of(), static=True), "sizes that depend on the text"),
        (lambda: KVCache(model.config, args_of(), 1, 96, 96, devices=two), "one device: they are on 2"),
        (lambda: KVCache.build(model, args_of(storage="offload")), "which 'offload' does not allow; storages that do"),
        (lambda: KVCache.build(model, args_of(budget_pattern="pyramid")), "not by a pattern: 'pyramid'"),
        (lambda: KVCache.build(model, args_of(floor=1.0)), "floor 1 keeps 8 tokens a head"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(ValueError, match="sizes that depend on the text"):
        KVCache.build(model, args_of()).static = True
    part = SimpleNamespace(sharing=SimpleNamespace(groups_and_devices=(2, 2)), theta=model.theta, rope=model.rope)
    with pytest.raises(ValueError, match="all heads, which must be on one device: they are divided among 2"):
        connect(KVCache.build(model, args_of()), part)


@torch.no_grad()
def test_rows_of_one_step_are_seen_together_and_marked_until_it_ends(model: GPT) -> None:
    cache, rows, seen = KVCache.build(model, args_of(), 2), rows_of(), []
    logits_of(model, cache, [rows[0][:19], rows[2][:12]], [19, 12], "full")
    tokens = torch.tensor([[1], [2]])
    step = cache.begin_decode(1, model.rope())
    step.views[0].observer = seen.append
    model.transformer.h[0](model.embed(tokens), step.views[0])
    assert [queries.shape for queries in seen] == [(2, 4, 1, 6)]
    with pytest.raises(ValueError, match="Rows 0, 1 are in the middle of a step"):
        model(tokens, cache)


def test_pools_lie_within_devices() -> None:
    args = KVCacheArgs("h2o", 8, select="pool")
    with pytest.raises(ValueError, match=r"pools 1 would cross devices: the 4 key/value heads .*: 2, 4; "):
        own_pools(args, 4, 2)
    with pytest.raises(ValueError, match=r"pools 3 would cross devices: the 3 key/value heads .*: there is none"):
        own_pools(replace(args, pools=3), 3, 2)
    assert own_pools(replace(args, pools=4), 4, 2).pools == 2
    assert own_pools(args, 1, 2) == args and own_pools(replace(args, select="head"), 4, 2).pools == 1
