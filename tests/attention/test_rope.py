"""Angles, rotation, ranks and masks, against litgpt's rope to the bit and against loops over positions."""

from __future__ import annotations

import math

import pytest
import torch

from litgpt.model import apply_rope, build_rope_cache
from litgpt_kv.attention.masks import cache_positions, visible
from litgpt_kv.attention.rope import angles_at, deinterleave, rotate, rows_at, signed, theta_of, unrotate
from tests.oracle.shrink import YARN

EXTRA = {
    "plain": None,
    "linear": {"factor": 8.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16},
    "yarn": YARN,
}


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# -- rotate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("head_size", "size"), [(8, 8), (8, 2), (16, 6), (10, 5), (7, 7), (9, 3), (4, 1), (8, 0)])
def test_rotate_is_litgpts_to_the_bit(head_size: int, size: int, dtype: torch.dtype) -> None:
    x = heads(2, 3, 6, head_size, dtype=dtype)
    cos, sin = (t.unsqueeze(0) for t in build_rope_cache(6, size))  # (1, 6, E)
    if size == 0:
        expected = x
    else:
        expected = torch.cat((apply_rope(x[..., :size], cos, sin), x[..., size:]), dim=-1)
    turned = rotate(x, (cos, signed(sin, size)), size)
    assert turned.shape == expected.shape  # a single rotated element becomes two, as in litgpt
    assert turned.dtype == dtype
    assert torch.equal(turned, expected)


def test_rotate_takes_angles_of_rows_and_of_sets_of_kept_tokens() -> None:
    cos, sin = build_rope_cache(50, 6)
    x = heads(2, 3, 4, 8)
    pos = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])  # (B, T)
    rows = rotate(x, rows_at((cos, signed(sin, 6)), pos), 6)
    per_set = torch.stack((pos, pos + 10, pos + 20), dim=1)  # (B, P, T)
    sets = rotate(x, rows_at((cos, signed(sin, 6)), per_set), 6)
    for b in range(2):
        for h in range(3):
            for t in range(4):
                for got, p in ((rows, int(pos[b, t])), (sets, int(pos[b, t]) + 10 * h)):
                    one = apply_rope(x[b, h, t, :6].view(1, 1, 1, 6), cos[p].view(1, 1, 6), sin[p].view(1, 1, 6))
                    assert torch.equal(got[b, h, t], torch.cat((one.view(6), x[b, h, t, 6:])))


def test_rotation_depends_on_distance_alone() -> None:
    """What re-rotation and positions inside the cache rest on."""
    cos, sin = (t.double() for t in build_rope_cache(64, 8))
    q, k = heads(1, 1, 1, 8, dtype=torch.float64), heads(1, 1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        at = [angles_at(theta_of((cos, signed(sin, 8))), torch.tensor([[p]]), torch.float64) for p in (i, j)]
        return float((rotate(q, at[0], 8) * rotate(k, at[1], 8)).sum())

    assert score(30, 21) == pytest.approx(score(9, 0), abs=1e-8)
    assert abs(score(30, 21) - score(30, 20)) > 1e-3


@pytest.mark.parametrize("kind", EXTRA)
@pytest.mark.parametrize(("head_size", "size"), [(8, 8), (16, 6), (4, 2)])
def test_unrotate_turns_back_and_divides_the_amplitude_out(head_size: int, size: int, kind: str) -> None:
    cos, sin = (t.double() for t in build_rope_cache(40, size, extra_config=EXTRA[kind]))
    x = heads(2, 3, 5, head_size, dtype=torch.float64)
    angles = rows_at((cos, signed(sin, size)), torch.tensor([[3, 1, 4, 1, 39]]))
    turned = rotate(x, angles, size)
    assert (turned - x).abs().max() > 0.1
    torch.testing.assert_close(unrotate(turned, angles, size), x, atol=1e-6, rtol=0)  # the tables are float32's


def test_deinterleave_brings_pairs_to_litgpts_layout() -> None:
    x = torch.arange(8.0).view(1, 1, 1, 8)
    assert deinterleave(x, 6).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 7]


# -- angles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXTRA)
def test_rows_at_reads_the_table(kind: str) -> None:
    table = build_rope_cache(40, 8, extra_config=EXTRA[kind])
    pos = torch.tensor([[0, 39, 7], [1, 1, 20]])
    for got, expected in zip(rows_at(table, pos), table):
        assert torch.equal(got, expected[pos])


def test_rows_at_empty_slots_are_finite() -> None:
    assert all(t.isfinite().all() for t in rows_at(build_rope_cache(4, 8), torch.tensor([-1, 3])))


@pytest.mark.parametrize(("kind", "size"), [(kind, s) for kind in EXTRA for s in (8, 5, 2) if (kind, s) != ("yarn", 5)])
def test_angles_at_equal_the_table_inside_it(kind: str, size: int) -> None:
    cos, sin = build_rope_cache(40, size, extra_config=EXTRA[kind])
    table = cos, signed(sin, size)
    for got, expected in zip(angles_at(theta_of(table), torch.arange(40), torch.float32), table):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)  # the table's own float32


@pytest.mark.parametrize("kind", EXTRA)
@pytest.mark.parametrize("position", [10**3, 10**6, 10**9])
def test_angles_far_beyond_the_table_stay_exact(kind: str, position: int) -> None:
    """Against Python's own floats; float32 angles would be wrong by more than a radian at 10^9."""
    cos, sin = (t.double() for t in build_rope_cache(4, 8, extra_config=EXTRA[kind]))
    got = angles_at(theta_of((cos, sin)), torch.tensor([position]), torch.float64)
    for e in range(8):
        amplitude = float(cos[0, e])
        angle = position * math.atan2(float(sin[1, e]), float(cos[1, e]))
        assert float(got[0][0, e]) == pytest.approx(amplitude * math.cos(angle), abs=1e-8)
        assert float(got[1][0, e]) == pytest.approx(amplitude * math.sin(angle), abs=1e-8)


def test_a_float32_table_is_good_at_a_million() -> None:
    """The angle is off by the table's own rounding times the position (1e-7 relative), and by no more than that."""
    cos, sin = build_rope_cache(4, 8)
    got = angles_at(theta_of((cos, sin)), torch.tensor([10**6]), torch.float32)
    for e in range(4):
        theta = 10000 ** (-2 * e / 8)
        off = 2e-7 * theta * 10**6
        assert float(got[0][0, e]) == pytest.approx(math.cos(theta * 10**6), abs=off + 1e-6)
        assert float(got[1][0, e]) == pytest.approx(math.sin(theta * 10**6), abs=off + 1e-6)


# -- positions inside the cache, and masks -----------------------------------------------------------------------------


def random_slots(*shape: int, seed: int = 0) -> torch.Tensor:
    """Slots in no order, some of them empty, positions of a head distinct."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.stack([torch.randperm(30, generator=generator)[: shape[-1]] for _ in range(math.prod(shape[:-1]))])
    empty = torch.rand(flat.shape, generator=generator) < 0.3
    return flat.masked_fill(empty, -1).view(shape)


def test_cache_positions_count_the_live_tokens_before() -> None:
    slots = random_slots(3, 2, 9)
    assert (slots < 0).any()
    got = cache_positions(slots)
    for row, rank in zip(slots.view(-1, 9).tolist(), got.view(-1, 9).tolist()):
        live = sorted(p for p in row if p >= 0)
        for p, r in zip(row, rank):
            assert r < 0 if p < 0 else r == live.index(p)


def test_cache_positions_of_full_and_of_empty_rows() -> None:
    assert cache_positions(torch.tensor([[7, 100, 3]])).tolist() == [[1, 2, 0]]
    assert (cache_positions(torch.full((2, 4), -1)) < 0).all()


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("sinks", [0, 2])
def test_visible_is_what_a_loop_says(window: int | None, sinks: int) -> None:
    slots = random_slots(2, 3, 12)  # (B, P, S)
    pos = torch.tensor([[0, 5, 29], [12, 13, 14]])  # (B, T)
    got = visible(pos.unsqueeze(1), slots, window, sinks)
    assert got.shape == (2, 3, 3, 12)
    assert got.dtype == torch.bool
    for b in range(2):
        for p in range(3):
            for t in range(3):
                for s in range(12):
                    key, query = int(slots[b, p, s]), int(pos[b, t])
                    seen = 0 <= key <= query and (window is None or query - key < window or key < sinks)
                    assert bool(got[b, p, t, s]) == seen


def test_a_query_always_sees_itself_and_never_the_future() -> None:
    pos = torch.arange(16)
    for window in (None, 1, 3):
        seen = visible(pos, pos, window)
        assert seen.diagonal().all()
        assert not seen.triu(1).any()
        assert seen.sum(-1).tolist() == [min(t + 1, window or 16) for t in range(16)]
