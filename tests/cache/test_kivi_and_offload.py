"""Storages with ways of their own: kivi, whose tokens leave in order, and offload, whose tokens are on the host."""

from __future__ import annotations

import copy

import pytest
import torch

from litgpt_kv import GPT, KVCache, KVCacheArgs
from litgpt_kv.cache.storage import offload
from tests.cache.test_storage import draw
from tests.cache.test_storages import KIVI, PROMPTS, ROWS, WAYS, caches, close, make
from tests.oracle.reference import logits_of

# -- kivi --------------------------------------------------------------------------------------------------------------

ORDERED = {
    "dense": dict(strategy="dense"),
    "window": dict(strategy="window", budget=7),
    "sink": dict(strategy="sink", budget=9),
    "sink absolute": dict(strategy="sink", budget=8, sinks=2, positions="absolute"),
    "kept prompt": dict(strategy="window", budget=17, keep_prompt=True),
}


GROUPS = [
    dict(bits=4, group=3),
    dict(bits=2, group=4),
    dict(bits=4, group=1),
    dict(bits=2, group=12),
]  # 12: more than the budget
EACH = [*((way, GROUPS[0]) for way in ORDERED), *(("sink", group) for group in GROUPS[1:])]


@pytest.mark.parametrize(("way", "options"), EACH)
def test_kivi_is_attention_over_naively_quantised_groups(
    way: str, options: dict, gqa: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prefill in ("full", "streamed"):  # which reads blocks of several tokens
        pair = caches(gqa, monkeypatch, "kivi", options, **ORDERED[way])
        ours, theirs = (logits_of(gqa, cache, ROWS, PROMPTS, prefill) for cache in pair)
        for b in range(2):
            for i, logits in theirs[b].items():
                close(ours[b][i], logits)


def test_kivi_takes_blocks_and_stopped_rows(gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = caches(gqa, monkeypatch, "kivi", KIVI, strategy="window", budget=7)
    with torch.no_grad():
        for cache in pair:
            gqa(torch.tensor([row[:5] for row in ROWS]), cache, torch.tensor([5, 3]))
        for start, stop in ((5, 8), (8, 9), (9, 14), (14, 16)):
            if start == 8:
                for cache in pair:
                    cache.retire([1])
            idx = torch.tensor([row[start:stop] for row in ROWS])
            ours, theirs = (gqa(idx, cache) for cache in pair)
            close(ours[0], theirs[0])
        for cache in pair:
            cache.revive()
        idx = torch.tensor([row[14:15] for row in ROWS])
        close(gqa(idx, pair[0]), gqa(idx, pair[1]))


def test_kivi_quantises_a_token_once() -> None:
    """Exact until its group is whole, then quantised, then the same until its slot is another's."""
    store, x, before = make("kivi", "keys", (1, 2, 12, 6), **KIVI), draw(1, 2, 30, 6, dtype=torch.float64), {}
    for t in range(30):
        store.write(torch.tensor([[[t % 12]]]), x[:, :, t : t + 1])
        read = store.read(12)
        for age in range(min(t + 1, 12)):
            i, token = t - age, read[:, :, (t - age) % 12]
            whole = i // 3 * 3 + 3 <= t + 1
            assert torch.equal(token, x[:, :, i]) or whole
            if whole:
                assert torch.equal(before.setdefault(i, token.clone()), token)
    assert any(not torch.equal(token, x[:, :, i]) for i, token in before.items())


def test_a_row_of_kivi_does_not_depend_on_its_neighbours(gqa: GPT) -> None:
    args = KVCacheArgs("window", 7, storage="kivi", storage_options=KIVI)
    both = KVCache.build(gqa, args, 2, 40)
    for way in ("full", "admitted"):
        found = logits_of(gqa, both, ROWS, PROMPTS, way)
        for b in range(2):
            (alone,) = logits_of(gqa, KVCache.build(gqa, args, 1, 40), [ROWS[b]], [PROMPTS[b]], "full")
            for i, logits in alone.items():
                close(found[b][i], logits)
        both.reset()
    assert not any(buffer.any() for layer in both.layers for buffer in (*layer.keys.buffers(), *layer.values.buffers()))


# -- offload -----------------------------------------------------------------------------------------------------------


def test_offload_is_refused_on_a_cpu(gqa: GPT) -> None:
    with pytest.raises(ValueError, match="'offload' keeps tokens in the host's memory, where those of a model on cpu"):
        KVCache.build(gqa, KVCacheArgs(storage="offload"), 1, 40)
    size = KVCache.nbytes(gqa.config, KVCacheArgs(storage="offload"), 1, 40)
    assert size == KVCache.nbytes(gqa.config, KVCacheArgs(), 1, 40)


def test_offload_is_refused_by_a_compiled_model(gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "REFUSED", ())
    refusal = r"cannot wait for copies .* the storage 'offload' makes at each step: .* store tokens as float8, int4"
    with pytest.raises(ValueError, match=refusal):
        KVCache.build(gqa, KVCacheArgs(storage=["plain", "offload"]), 1, 40, static=True)
    cache = KVCache.build(gqa, KVCacheArgs(storage="offload"), 1, 40)
    with pytest.raises(ValueError, match=refusal):
        cache.static = True


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_offload_without_its_streams_is_plain(way: str, gqa: GPT, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Copies are made at once where there is no accelerator; what is copied, kept and thrown away is the same."""
    monkeypatch.setattr(offload, "REFUSED", ())
    plain, ours = (KVCache.build(gqa, KVCacheArgs(storage=s, **WAYS[way]), 2, 40) for s in ("plain", "offload"))
    for prefill in ("admitted", "full"):
        expected, found = (logits_of(gqa, cache, ROWS, PROMPTS, prefill) for cache in (plain, ours))
        for b in range(2):
            for i, logits in expected[b].items():
                close(found[b][i], logits, 1e-12)
        if prefill == "admitted":
            plain.reset()
            ours.reset()
    ours.save(tmp_path / "a")
    for cache in (plain, ours, KVCache.load(tmp_path / "a", gqa), copy.deepcopy(ours)):
        cache.revive()
        idx = torch.tensor([[3], [4]])
        logits = gqa(idx, cache), gqa(idx[1:], cache.row(1)), gqa(idx, cache)  # a view changes rows that are on the way
        expected = logits if cache is plain else expected
        for a, b in zip(logits, expected):
            close(a, b, 1e-12)


def test_offload_fetches_the_next_layer_once(gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "REFUSED", ())
    cache, calls = KVCache.build(gqa, KVCacheArgs("window", 8, storage="offload"), 2, 40), []
    fetch = offload.Offload._fetch
    monkeypatch.setattr(offload.Offload, "_fetch", lambda self, n: calls.append(self) or fetch(self, n))
    with torch.no_grad():
        gqa(torch.tensor([row[:9] for row in ROWS]), cache, torch.tensor([9, 9]))
        for i in range(9, 13):
            calls.clear()
            gqa(torch.tensor([[row[i]] for row in ROWS]), cache)
            first, second = cache.layers
            assert calls == [first.keys, second.keys, first.values, second.values]


def test_what_is_on_its_way_is_not_believed_after_a_row_was_restored(gqa: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a step that broke off between two layers."""
    monkeypatch.setattr(offload, "REFUSED", ())
    cache = KVCache.build(gqa, KVCacheArgs("window", 8, storage="offload"), 1, 40)
    with torch.no_grad():
        gqa(torch.tensor([ROWS[0][:9]]), cache, torch.tensor([9]))
        state = cache.repeat(1)
        gqa(torch.tensor([[5]]), cache)
        cache.layers[0].keys.read(8)  # fetches those of the next layer
        cache.restore(0, state)
        torch.testing.assert_close(gqa(torch.tensor([[7]]), cache), gqa(torch.tensor([[7]]), state))
