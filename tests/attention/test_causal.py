"""Prefill in blocks: exact against loops whatever the blocks, and never a tensor of all queries by all keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from litgpt_kv import GPT, KVCache, KVCacheArgs
from litgpt_kv.attention import causal
from litgpt_kv.attention.causal import causal_attention, received_attention
from tests.attention.test_eager import EXACT, MATHS, Largest, draw, grouped, loop
from tests.attention.test_eager import causal as seen_causally
from tests.oracle.reference import tiny, tokens_of

T = 13


@pytest.fixture(params=["flash", "without"])
def small_blocks(monkeypatch, request) -> bool:
    """Blocks that cut the test's sequences, and whether the kernel that gives the log-sum-exp is there."""
    monkeypatch.setattr(causal, "BLOCK", 4)
    monkeypatch.setattr(causal, "KEYS", 3)
    if request.param == "without":
        monkeypatch.setattr(causal, "_has_flash", lambda q, k, v: False)
    return request.param == "flash"


@pytest.mark.parametrize("start", [0, 1, 6, 12])
@pytest.mark.parametrize("math_", MATHS)
@pytest.mark.parametrize(("H", "G", "width"), [(4, 2, 6), (3, 3, 5), (4, 1, 8)])
def test_blocks_and_pieces_are_what_a_loop_says(
    small_blocks: bool, H: int, G: int, width: int, math_: str, start: int
) -> None:
    q, k, v, options = draw(2, H, T, 6), draw(2, G, T, 6, seed=1), draw(2, G, T, width, seed=2), MATHS[math_]
    expected, probs = loop(q, k, v, seen_causally(options["window"]), options["scale"], options["softcap"])
    length = torch.tensor([T, 9])
    for b, n in enumerate(length.tolist()):
        probs[b, :, n:], probs[b, :, :start] = 0, 0
    y, lse = causal_attention(q[:, :, start:], k, v, **options, start=start, with_lse=True)
    torch.testing.assert_close(y, expected[:, :, start:], **EXACT)
    assert (lse is not None) == (small_blocks or options["softcap"] is not None)
    mass = received_attention(q[:, :, start:], k, length, **options, start=start, lse=lse)
    torch.testing.assert_close(mass, grouped(probs, G), **EXACT)


@pytest.mark.parametrize("math_", MATHS)
def test_what_pads_hold_does_not_matter(small_blocks: bool, math_: str) -> None:
    options, length = MATHS[math_], torch.tensor([5, 8])
    found = []
    for fill in (0.0, -1e6, 1e30):
        q, k, v = draw(2, 4, 8, 6), draw(2, 2, 8, 6, seed=1), draw(2, 2, 8, 6, seed=2)
        for x in (q, k, v):
            x[0, :, 5:] = fill
        lse = causal_attention(q, k, v, **options, with_lse=True)[1]
        if lse is not None:
            found.append(received_attention(q, k, length, **options, lse=lse))
    assert all(torch.equal(mass, found[0]) for mass in found)


def test_gradients_flow_through_blocks(small_blocks: bool) -> None:
    for options in MATHS.values():
        q, k, v = (draw(1, heads, 9, 6, seed=heads).requires_grad_() for heads in (4, 2, 2))
        y, _ = causal_attention(q, k, v, **options, with_lse=True)
        expected = loop_free(q, k, v, **options)
        got, want = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (y, expected))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, **EXACT)


def loop_free(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
    """Attention with full matrices, differentiable."""
    R, pos = q.size(1) // k.size(1), torch.arange(q.size(2))
    scores = q @ k.repeat_interleave(R, 1).mT * scale
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    age = pos[:, None] - pos
    hidden = (age < 0) | (age >= (window or len(pos)))
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.repeat_interleave(R, 1)


LONG = 1024  # at which a block of one layer's scores, 2 heads × 128 queries × 1,024 keys, is a quarter of a square
SIZES = dict(n_layer=2, n_head=2, n_query_groups=1, n_embd=8, head_size=4, intermediate_size=8, block_size=3 * LONG)
KINDS = {
    "plain": {},
    "window": dict(sliding_window_size=700, sliding_window_indices=[1, 0]),
    "softcap": dict(attention_logit_softcapping=5.0),
    "both": dict(sliding_window_size=300, sliding_window_indices=[0, 1], attention_logit_softcapping=5.0),
    "latent": dict(
        n_query_groups=2,
        latent_attention=dict(q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=2, qk_nope_head_dim=4, v_head_dim=3),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dense", "h2o", "tova", "snapkv", "kvzip"])
@torch.inference_mode()
def test_a_prefill_never_makes_a_square_of_the_prompt(kind: str, name: str) -> None:
    """In one pass and in pieces; the largest tensor grows with the prompt, not with its square."""
    model = tiny(exact=False, **(SIZES | KINDS[kind]))
    keep = {} if name == "dense" else dict(budget=64)
    cache = KVCache.build(model, KVCacheArgs(name, **keep), 1, LONG if name == "dense" else 2 * LONG)
    tokens = torch.tensor([tokens_of(1, LONG)])
    for pieces in (1,) if cache.rereads else (1, 2):
        cache.reset()
        with Largest() as largest:
            if pieces == 1:
                model(tokens, cache, torch.tensor([LONG]))
            else:
                reader = cache.read_in_pieces(0, LONG)
                for piece in tokens.split(LONG // pieces, dim=1):
                    model(piece, reader)
        assert largest.numel <= (2 if cache.rereads else 1) * LONG**2 // 4  # a second reading sees the text twice


def test_training_with_windows_and_softcaps_makes_no_square_either() -> None:
    model: GPT = tiny(exact=False, **(SIZES | KINDS["both"]))
    with Largest() as largest:
        model(torch.tensor([tokens_of(1, LONG)]))
    assert largest.numel <= LONG**2 // 4
