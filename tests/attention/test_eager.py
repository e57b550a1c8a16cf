"""Attention, and how much of it each token receives: litgpt's numbers to the bit, and loops in float64 to 1e-8."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import litgpt.model as base
from litgpt.config import Config
from litgpt_kv.attention.causal import BLOCK, causal_attention, received_attention
from litgpt_kv.attention.eager import slot_attention

EXACT = dict(atol=1e-8, rtol=0)
MATHS = {
    "plain": dict(scale=0.4, softcap=None, window=None),
    "softcap": dict(scale=0.4, softcap=1.3, window=None),
    "window": dict(scale=0.4, softcap=None, window=3),
    "softcap-window": dict(scale=1.1, softcap=2.0, window=4),
}
GROUPS = [(4, 4), (4, 2), (6, 2), (4, 1)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop(q: Tensor, k: Tensor, v: Tensor, seen, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention by loops over rows, heads and queries; `seen(b, g, t, s)` says what query t may attend to.

    Returns the outputs (B, H, T, Dv) and the probabilities (B, H, T, S); a query that sees nothing has zeros.
    """
    (B, H, T, _), (G, S) = q.shape, k.shape[1:3]
    probs = torch.zeros(B, H, T, S, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                scores = {}
                for s in range(S):
                    if seen(b, g, t, s):
                        score = float(q[b, h, t] @ k[b, g, s]) * scale
                        scores[s] = score if softcap is None else math.tanh(score / softcap) * softcap
                total = sum(math.exp(x) for x in scores.values())
                for s, x in scores.items():
                    probs[b, h, t, s] = math.exp(x) / total
    return probs @ v.repeat_interleave(H // G, dim=1), probs


def grouped(probs: Tensor, G: int) -> Tensor:
    """(B, H, T, S) to (B, G, S): summed over queries, averaged over the heads of a group."""
    return probs.sum(2).unflatten(1, (G, -1)).mean(2)


def causal(window: int | None):
    return lambda b, g, t, s: s <= t and (window is None or t - s < window)


# -- attend: a whole sequence ------------------------------------------------------------------------------------------


def litgpts(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, window: int | None, scalar: int) -> Tensor:
    """What litgpt's own attention module makes of the same q, k, v: its output before the projection."""
    H, G, D = q.size(1), k.size(1), q.size(3)
    config = Config(
        name="x", n_head=H, n_query_groups=G, head_size=D, n_embd=H * D, n_layer=1, padded_vocab_size=8, bias=False
    )
    config.attention_logit_softcapping, config.attention_scores_scalar = softcap, scalar
    config.sliding_window_size, config.sliding_window_indices = window, None if window is None else [1]
    config.rope_n_elem = 0
    module = base.CausalSelfAttention(config, 0).to(q.dtype)
    module.qkv, module.proj = torch.nn.Identity(), torch.nn.Identity()
    flat = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
    none = torch.zeros(1, q.size(2), 0, dtype=q.dtype)
    return module(flat, none, none).unflatten(-1, (H, D)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("math_", MATHS)
@pytest.mark.parametrize(("H", "G"), GROUPS)
def test_attend_is_litgpts_to_the_bit(H: int, G: int, math_: str, dtype: torch.dtype) -> None:
    softcap, window = MATHS[math_]["softcap"], MATHS[math_]["window"]
    q, k, v = (
        draw(2, H, 11, 8, dtype=dtype),
        draw(2, G, 11, 8, seed=1, dtype=dtype),
        draw(2, G, 11, 8, seed=2, dtype=dtype),
    )
    ours, _ = causal_attention(q, k, v, scale=1 / math.sqrt(5), softcap=softcap, window=window)
    assert torch.equal(ours, litgpts(q, k, v, softcap, window, scalar=5))


@pytest.mark.parametrize("math_", MATHS)
@pytest.mark.parametrize(("H", "G"), GROUPS)
def test_attend_is_what_a_loop_says(H: int, G: int, math_: str) -> None:
    q, k, v = draw(2, H, 9, 6), draw(2, G, 9, 6, seed=1), draw(2, G, 9, 5, seed=2)  # values of another width
    options = MATHS[math_]
    expected, _ = loop(q, k, v, causal(options["window"]), options["scale"], options["softcap"])
    torch.testing.assert_close(causal_attention(q, k, v, **options)[0], expected, **EXACT)


def test_attend_without_window_or_softcap_makes_no_mask() -> None:
    """A mask would keep the fast causal kernel from running."""
    q, k, v = draw(1, 2, 300, 4), draw(1, 2, 300, 4), draw(1, 2, 300, 4)
    with Largest() as largest:
        causal_attention(q, k, v, **MATHS["plain"])
    assert largest.numel < 300 * 300


# -- slot_attention: new queries, cached slots -------------------------------------------------------------------------

WANT = ("mass", "last")


def some_mask(B: int, P: int, T: int, S: int) -> Tensor:
    mask = torch.rand(B, P, T, S, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., 0] = True  # every query sees something
    return mask


@pytest.mark.parametrize("want_mass", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("H", "G"), GROUPS)
@pytest.mark.parametrize("sets", ["no mask", "one set", "one a head"])
def test_slot_attention_is_what_a_loop_says(
    H: int, G: int, T: int, softcap: float | None, want_mass: bool, sets: str
) -> None:
    q, k, v = draw(2, H, T, 6), draw(2, G, 7, 6, seed=1), draw(2, G, 7, 5, seed=2)
    mask = None if sets == "no mask" else some_mask(2, 1 if sets == "one set" else G, T, 7)
    y, got = slot_attention(q, k, v, mask, scale=0.4, softcap=softcap, want=WANT if want_mass else ())

    def seen(b: int, g: int, t: int, s: int) -> bool:
        return mask is None or bool(mask[b, g if mask.size(1) > 1 else 0, t, s])

    expected, probs = loop(q, k, v, seen, 0.4, softcap)
    torch.testing.assert_close(y, expected, **EXACT)
    assert set(got) == set(WANT if want_mass else ())
    if want_mass:
        torch.testing.assert_close(got["mass"], grouped(probs, G), **EXACT)
        torch.testing.assert_close(got["last"], grouped(probs[:, :, -1:], G), **EXACT)


@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("P", [1, 2])
def test_sinks_meet_the_other_queries(P: int, T: int, softcap: float | None) -> None:
    """Sinks seen from positions inside the cache: their scores come from queries with other angles."""
    q, q2, k, v = draw(2, 4, T, 6), draw(2, 4, T, 6, seed=5), draw(2, 2, 7, 6, seed=1), draw(2, 2, 7, 6, seed=2)
    where = torch.rand(2, P, 7, generator=torch.Generator().manual_seed(4)) < 0.4
    mask = some_mask(2, P, T, 7)
    y, got = slot_attention(q, k, v, mask, scale=0.4, softcap=softcap, sink_queries=(q2, where), want=WANT)
    # the same through wider vectors: each slot's key stands in the half of the query that is meant for it
    wide = where.expand(2, 2, 7).unsqueeze(-1)
    keys = torch.cat((k.masked_fill(wide, 0), k.masked_fill(~wide, 0)), dim=-1)
    allowed = mask.expand(2, 2, T, 7)
    seen = lambda b, g, t, s: bool(allowed[b, g, t, s])  # noqa: E731
    expected, probs = loop(torch.cat((q, q2), dim=-1), keys, v, seen, 0.4, softcap)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(got["mass"], grouped(probs, 2), **EXACT)


def test_mass_of_a_bfloat16_model_is_float32() -> None:
    q, k, v = (draw(1, 2, 4, 8, seed=i, dtype=torch.bfloat16) for i in range(3))
    y, got = slot_attention(q, k, v, None, scale=0.4, want=WANT)
    assert y.dtype == torch.bfloat16
    assert got["mass"].dtype == got["last"].dtype == torch.float32
    prompt = received_attention(q, k, torch.tensor([4]), -1, **MATHS["plain"])
    assert prompt.dtype == torch.float32
    exact = received_attention(q.double(), k.double(), torch.tensor([4]), -1, **MATHS["plain"])
    torch.testing.assert_close(prompt.double(), exact, atol=1e-5, rtol=0)  # not the 1e-2 of bfloat16 scores


# -- mass: prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("math_", MATHS)
@pytest.mark.parametrize("last", [-1, 0, 1, 4, 9, 10, 50])
@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 3), (4, 1)])
def test_mass_is_what_a_loop_says(H: int, G: int, last: int, math_: str) -> None:
    """Ragged rows: the last real queries of each row count, pads neither give nor take."""
    q, k = draw(3, H, 10, 6), draw(3, G, 10, 6, seed=1)
    length, options = torch.tensor([10, 1, 6]), MATHS[math_]
    _, probs = loop(q, k, k, causal(options["window"]), options["scale"], options["softcap"])
    for b, n in enumerate(length.tolist()):
        probs[b, :, n:] = 0
        if last >= 0:
            probs[b, :, : max(0, n - last)] = 0
    got = received_attention(q, k, length, last, **options)
    torch.testing.assert_close(got, grouped(probs, G), **EXACT)
    for b, n in enumerate(length.tolist()):
        assert (got[b, :, n:] == 0).all()
        assert float(got[b].sum()) == pytest.approx(G * (n if last < 0 else min(last, n)))


@pytest.mark.parametrize("last", [-1, 150, 200])
@pytest.mark.parametrize("math_", ["plain", "softcap-window"])
def test_mass_over_several_blocks_of_queries(last: int, math_: str) -> None:
    T = 2 * BLOCK + 17
    q, k, length, options = draw(2, 4, T, 6), draw(2, 2, T, 6, seed=1), torch.tensor([T, T - 90]), MATHS[math_]
    pos = torch.arange(T)
    near = (pos[:, None] - pos < (options["window"] or T)) & (pos <= pos[:, None])
    scores = q @ k.repeat_interleave(2, 1).mT * options["scale"]
    if options["softcap"] is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    probs = scores.masked_fill(~near, -math.inf).softmax(-1)
    counts = pos < length[:, None]
    if last >= 0:
        counts &= pos >= length[:, None] - last
    expected = grouped(probs * counts[:, None, :, None], 2)
    torch.testing.assert_close(received_attention(q, k, length, last, **options), expected, **EXACT)


@pytest.mark.parametrize("last", [-1, 3])
def test_what_pads_hold_does_not_matter(last: int) -> None:
    q, k, length = draw(2, 4, 8, 6), draw(2, 2, 8, 6, seed=1), torch.tensor([5, 8])
    clean = received_attention(q, k, length, last, **MATHS["plain"])
    q[0, :, 5:], k[0, :, 5:] = 1e6, -1e6
    assert torch.equal(received_attention(q, k, length, last, **MATHS["plain"]), clean)


class Largest(TorchDispatchMode):
    """Records the largest tensor that anything made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.numel = max(
                    self.numel, t.numel() if t.is_contiguous() else t.untyped_storage().nbytes() // t.itemsize
                )
        return out


@pytest.mark.parametrize("last", [-1, 32])
def test_mass_never_holds_a_square_of_the_prompt(last: int) -> None:
    T, H, G, D = 8192, 2, 1, 4
    q, k = torch.randn(1, H, T, D), torch.randn(1, G, T, D)
    with Largest() as largest:
        got = received_attention(q, k, torch.tensor([T]), last, **MATHS["plain"])
    assert float(got.sum()) == pytest.approx(T if last < 0 else last, rel=1e-3)
    assert largest.numel <= H * BLOCK * T  # DESIGN: the largest is one block of queries
    assert H * BLOCK * T < T * T
