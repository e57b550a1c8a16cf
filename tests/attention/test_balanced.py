"""Heads that threads cannot share evenly are cut into pieces: the same numbers."""

from __future__ import annotations

import pytest
import torch

from litgpt_kv.attention import balanced, cpu, eager
from litgpt_kv.attention.eager import slot_attention


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced, "LEAST_SLOTS", 1)


@pytest.mark.parametrize("threads", [1, 2, 4, 5])
@pytest.mark.parametrize(("B", "G", "S"), [(1, 3, 12), (1, 1, 9), (2, 3, 17), (1, 5, 4), (3, 1, 5), (1, 8, 40)])
def test_products_are_those_of_whole_heads(
    few_slots: None, monkeypatch: pytest.MonkeyPatch, threads: int, B: int, G: int, S: int
) -> None:
    monkeypatch.setattr(balanced, "thread_count", lambda: threads)
    q, k = torch.randn(B, G, 4, 6).double(), torch.randn(B, G, S + 3, 6).double()[:, :, :S]  # as a cache's first slots
    p = torch.rand(B, G, 4, S).double()
    torch.testing.assert_close(balanced.scores_of(q, k), q @ k.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(balanced.weighted_sums(p, k), p @ k, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_fused_one(few_slots: None, monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    q, k, v = torch.randn(1, 6, 1, 8).double(), torch.randn(1, 3, 20, 8).double(), torch.randn(1, 3, 20, 5).double()
    mask = torch.rand(1, 1, 1, 20) < 0.7 if masked else None
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(balanced, "thread_count", lambda threads=threads: threads)
        assert balanced.heads_left_over(k, 2) == threads - 1
        found.append(slot_attention(q, k, v, mask, scale=0.3)[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_only_few_heads_of_many_slots_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced, "thread_count", lambda: 2)
    left = {
        (1, 3, 4096, 4, torch.float32): 1,
        (1, 3, 4095, 4, torch.float32): 0,  # few slots
        (1, 4, 4096, 4, torch.float32): 0,  # two heads a thread
        (1, 9, 4096, 4, torch.float32): 0,  # a thread waits a tenth of the time
        (1, 3, 4096, 65, torch.float32): 0,  # many queries
        (1, 3, 4096, 4, torch.bfloat16): 0,
    }
    for (B, G, S, queries, dtype), expected in left.items():
        assert balanced.heads_left_over(torch.empty(B, G, S, 2, dtype=dtype), queries) == expected


def test_a_block_of_tokens_has_the_fused_kernel(few_slots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores would be large."""
    monkeypatch.setattr(balanced, "thread_count", lambda: 2)
    monkeypatch.setattr(eager, "product_attention", None)  # must not be called
    q, k = torch.randn(1, 6, 3, 8).double(), torch.randn(1, 3, 20, 8).double()
    assert slot_attention(q, k, k, None, scale=0.3)[0].shape == q.shape


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("onednn", [False, True])
def test_products_of_many_rows(monkeypatch: pytest.MonkeyPatch, onednn: bool) -> None:
    monkeypatch.setattr(cpu, "prefers_onednn", lambda: onednn)
    x, y = torch.randn(2, 3, 40, 7), torch.randn(2, 3, 90, 7)[:, :, 10:60]
    with torch.no_grad():
        torch.testing.assert_close(cpu.products(x, y).double(), x.double() @ y.double().mT, rtol=0, atol=1e-5)
        assert torch.equal(cpu.products(x.double(), y.double()), x.double() @ y.double().mT)
    assert torch.equal(cpu.products(x.requires_grad_(), y), x @ y.mT)
