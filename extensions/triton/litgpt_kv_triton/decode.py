"""Attention of one new token a row to cached slots, in Triton: keys and values are read once.

Slots are cut into parts, so that one row keeps a whole device busy (split-K, as in Flash-Decoding, Dao et al. 2023). A
program attends to one part for all query heads of a set and notes what it found and the scores. A second, small kernel
joins the parts and makes probabilities of the scores: the attention that each slot received.

B rows · P sets of slots (key/value heads, or pools of them) · M query heads of a set · N slots that are read ·
D, Dv widths of a key and a value · E rotated elements · n first slots that have queries of their own · K parts.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_kv_triton.stored import load_elements

SLOTS = 64  # of a step of a program
ROWS = 64  # query heads of a program, at most
JOINED = 256  # slots of a program that makes probabilities
WAVES = 4  # programs for each multiprocessor, so that none waits for the slowest


@triton.jit(do_not_specialize=["N", "part_size"])
def _attend_part(
    q, near_q, near, k, k_scale, k_zero, v, v_scale, v_zero, mask, cos, sin, part_sum, part_max, part_weight, scores,
    P, M, N, D, DV, part_size, n_near, E, scale, softcap,
    k_b, k_p, k_s, ks_b, ks_p, ks_s, kz_b, kz_p, kz_s,
    v_b, v_p, v_s, vs_b, vs_p, vs_s, vz_b, vz_p, vz_s,
    mask_b, mask_p, mask_m, mask_s, near_b, near_p, near_s, cos_b, cos_p, cos_s, sin_b, sin_p, sin_s,
    K_KIND: tl.constexpr, K_GROUP: tl.constexpr, K_BYTES: tl.constexpr,
    V_KIND: tl.constexpr, V_GROUP: tl.constexpr, V_BYTES: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_NEAR: tl.constexpr, HAS_ANGLES: tl.constexpr, HAS_CAP: tl.constexpr,
    WITH_SCORES: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attend to one part of the slots: grid (B * P, K, tiles of M). See `decode_attention`."""
    pair = tl.program_id(0).to(tl.int64)  # offsets pass 2**31
    part = tl.program_id(1)
    b, p = pair // P, pair % P
    k += b * k_b + p * k_p
    k_scale += b * ks_b + p * ks_p
    k_zero += b * kz_b + p * kz_p
    v += b * v_b + p * v_p
    v_scale += b * vs_b + p * vs_p
    v_zero += b * vz_b + p * vz_p
    mask += b * mask_b + p * mask_p
    near += b * near_b + p * near_p
    cos += b * cos_b + p * cos_p
    sin += b * sin_b + p * sin_p

    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    real = m[:, None] < M
    at_q = (pair * M + m[:, None]) * D + d
    x = tl.load(q + at_q, mask=real & (d < D), other=0.0)
    if HAS_NEAR:
        near_x = tl.load(near_q + at_q, mask=real & (d < D), other=0.0)

    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.full((BLOCK_M,), 0.0, tl.float32)
    total = tl.full((BLOCK_M, BLOCK_DV), 0.0, tl.float32)
    start = part * part_size
    stop = tl.minimum(start + part_size, N)
    for first in range(start, stop, BLOCK_N):
        s = first + tl.arange(0, BLOCK_N)
        slot, inside = s[:, None], s[:, None] < stop
        keys = load_elements(
            k, k_scale, k_zero, slot, d, inside, d < D, k_s, ks_s, kz_s, K_KIND, K_GROUP, K_BYTES
        )  # (BLOCK_N, BLOCK_D)
        if HAS_ANGLES:  # the other element of each pair was just read with its token: it is in the nearest memory
            pair_of = tl.where(d < E, (d + E // 2) % E, d)
            other = load_elements(
                k, k_scale, k_zero, slot, pair_of, inside, d < E, k_s, ks_s, kz_s, K_KIND, K_GROUP, K_BYTES
            )
            c = tl.load(cos + slot * cos_s + d, mask=inside & (d < E), other=1.0).to(tl.float32)
            w = tl.load(sin + slot * sin_s + d, mask=inside & (d < E), other=0.0).to(tl.float32)
            keys = keys.to(x.dtype).to(tl.float32) * c + other.to(x.dtype).to(tl.float32) * w
        keys = tl.trans(keys.to(x.dtype))
        found = tl.dot(x, keys, input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        if HAS_NEAR:  # noqa: SIM102 (the compiler drops this one)
            if first < n_near:
                marked = tl.load(near + s * near_s, mask=s < n_near, other=0) != 0
                own = tl.dot(near_x, keys, input_precision="ieee") * scale
                found = tl.where(marked[None, :], own, found)
        if HAS_CAP:
            found = (2.0 / (1.0 + tl.exp(-2.0 * found / softcap)) - 1.0) * softcap  # tanh
        if HAS_MASK:
            seen = tl.load(mask + m[:, None] * mask_m + s[None, :] * mask_s, mask=real & (s[None, :] < stop), other=0)
            found = tl.where(seen != 0, found, HIDDEN)  # finite where a row sees nothing at all
        if WITH_SCORES:
            at = (pair * M + m[:, None]) * N + s[None, :]
            tl.store(scores + at, found, mask=real & (s[None, :] < stop))
        found = tl.where(s[None, :] < stop, found, float("-inf"))
        new_most = tl.maximum(most, tl.max(found, 1))
        shrink = tl.exp(most - new_most)
        probs = tl.exp(found - new_most[:, None])
        values = load_elements(
            v, v_scale, v_zero, slot, dv, inside, dv < DV, v_s, vs_s, vz_s, V_KIND, V_GROUP, V_BYTES
        ).to(x.dtype)
        weight = weight * shrink + tl.sum(probs, 1)
        total = total * shrink[:, None] + tl.dot(probs.to(x.dtype), values, input_precision="ieee")
        most = new_most

    place = (pair * tl.num_programs(1) + part) * M + m  # (B, P, K, M)
    tl.store(part_max + place, most, mask=m < M)
    tl.store(part_weight + place, weight, mask=m < M)
    tl.store(part_sum + place[:, None] * DV + dv, total, mask=real & (dv < DV))


@triton.jit(do_not_specialize=["N"])
def _join_parts(
    part_sum, part_max, part_weight, scores, y, mass, M, N, DV, parts, tiles, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Join the parts: grid (B * P, tiles of M, then blocks of slots whose mass is summed)."""
    pair, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_DV)[None, :]
    if job < tiles:
        m = job * BLOCK_M + row
        most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        weight = tl.full((BLOCK_M,), 0.0, tl.float32)
        total = tl.full((BLOCK_M, BLOCK_DV), 0.0, tl.float32)
        for part in range(0, parts):
            place = (pair * parts + part) * M + m
            own = tl.load(part_max + place, mask=m < M, other=0.0)
            new_most = tl.maximum(most, own)
            shrink, grow = tl.exp(most - new_most), tl.exp(own - new_most)
            weight = weight * shrink + tl.load(part_weight + place, mask=m < M, other=1.0) * grow
            found = tl.load(part_sum + place[:, None] * DV + dv, mask=(m[:, None] < M) & (dv < DV), other=0.0)
            total = total * shrink[:, None] + found * grow[:, None]
            most = new_most
        at = (pair * M + m[:, None]) * DV + dv
        tl.store(y + at, (total / weight[:, None]).to(y.dtype.element_ty), mask=(m[:, None] < M) & (dv < DV))
    else:
        s = (job - tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        received = tl.full((BLOCK_N,), 0.0, tl.float32)
        for tile in range(0, tiles):
            m = tile * BLOCK_M + row
            most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            weight = tl.full((BLOCK_M,), 0.0, tl.float32)
            for part in range(0, parts):
                place = (pair * parts + part) * M + m
                own = tl.load(part_max + place, mask=m < M, other=0.0)
                new_most = tl.maximum(most, own)
                added = tl.load(part_weight + place, mask=m < M, other=1.0)
                weight = weight * tl.exp(most - new_most) + added * tl.exp(own - new_most)
                most = new_most
            inside = (m[:, None] < M) & (s[None, :] < N)
            found = tl.load(scores + (pair * M + m[:, None]) * N + s[None, :], mask=inside, other=float("-inf"))
            received += tl.sum(tl.exp(found - most[:, None]) / weight[:, None], 0)
        tl.store(mass + pair * N + s, received * share, mask=s < N)


@torch.library.custom_op("litgpt_kv_triton::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    k_zero: Tensor | None,
    k_kind: int,
    k_group: int,
    v: Tensor,
    v_scale: Tensor | None,
    v_zero: Tensor | None,
    v_kind: int,
    v_group: int,
    v_width: int,
    extent: int,
    mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    near_q: Tensor | None,
    near: Tensor | None,
    scale: float,
    softcap: float,
    per_group: int,
    with_mass: bool,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """Attend from one query a head to the first `extent` slots.

    Args:
        q: (B, P, M, D) rotated queries, float32, float16 or bfloat16.
        k, k_scale, k_zero, k_kind, k_group: Keys, as in `Stored`. v, ...: Values, of `v_width` elements.
        extent: N.
        mask: (B, P or 1, M or 1, N) bool, True where a query may attend; None: everywhere.
        cos, sin: (B, P or 1, N, E) by which keys are rotated as they are read; None: they are rotated.
        near_q, near: Queries (B, P, M, D) to be used instead for those of the first n slots that are marked in
            (B, P or 1, n) bool; or None.
        softcap: Bounds the scores by tanh; 0: not.
        per_group: Query heads that share a slot. with_mass: Whether to return the attention that slots received.
        parts: To cut the slots into, K; 0: as many as keep the device busy.

    Returns:
        (B, P, M, Dv) in the dtype of q; and the attention that each slot received from the M heads, divided by
        `per_group`, (B, P, N) float32, without slots if it was not asked for.
    """
    (B, P, M, D), N, dtype = q.shape, extent, q.dtype
    q = q.contiguous()
    block_m = max(16, min(ROWS, triton.next_power_of_2(M)))
    tiles = triton.cdiv(M, block_m)
    size, parts = _part_size(N, B * P * tiles, parts, q.device)
    new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    part_sum, part_max, part_weight = new(B, P, parts, M, v_width), new(B, P, parts, M), new(B, P, parts, M)
    scores = new((B, P, M, N) if with_mass else 0)
    mass, y = new((B, P, N) if with_mass else (B, P, 0)), torch.empty(B, P, M, v_width, dtype=dtype, device=q.device)
    unused = q  # a pointer that is never read
    seen = None if mask is None else mask.expand(B, P, M, N).view(torch.uint8)
    marked = None if near is None else near.expand(B, P, -1).view(torch.uint8)
    angles = [None if x is None else x.expand(B, P, N, -1) for x in (cos, sin)]
    step, stages = _step(max(D, v_width), dtype, k_kind + v_kind > 0, cos is not None)
    block_dv = max(16, triton.next_power_of_2(v_width))
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _attend_part[B * P, parts, tiles](
            q,
            unused if near_q is None else near_q.contiguous(),
            *(unused if x is None else x for x in (marked, k, k_scale, k_zero, v, v_scale, v_zero, seen, *angles)),
            part_sum, part_max, part_weight, scores,
            P, M, N, D, v_width, size, 0 if near is None else near.size(-1), 0 if cos is None else cos.size(-1),
            scale, softcap,
            *(n for x in (k, k_scale, k_zero, v, v_scale, v_zero) for n in _strides(x, 3)),
            *_strides(seen, 4), *_strides(marked, 3), *_strides(angles[0], 3), *_strides(angles[1], 3),
            K_KIND=k_kind, K_GROUP=k_group, K_BYTES=k.size(-1), V_KIND=v_kind, V_GROUP=v_group, V_BYTES=v.size(-1),
            HAS_MASK=mask is not None, HAS_NEAR=near is not None, HAS_ANGLES=cos is not None, HAS_CAP=softcap > 0,
            WITH_SCORES=with_mass, HIDDEN=torch.finfo(torch.float32).min,
            BLOCK_M=block_m, BLOCK_N=step, BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_DV=block_dv,
            num_stages=stages,
        )  # fmt: skip
        _join_parts[B * P, tiles + (triton.cdiv(N, JOINED) if with_mass else 0)](
            part_sum, part_max, part_weight, scores, y, mass, M, N, v_width, parts, tiles, 1 / per_group,
            BLOCK_M=block_m, BLOCK_N=JOINED, BLOCK_DV=block_dv,
        )  # fmt: skip
    return y, mass


@decode_attention.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    v_width, extent, with_mass = args[10], args[11], args[20]
    B, P, M, _ = q.shape
    return q.new_empty(B, P, M, v_width), q.new_empty((B, P, extent if with_mass else 0), dtype=torch.float32)


def _part_size(N: int, programs: int, parts: int, device: torch.device) -> tuple[int, int]:
    """Slots of a part, whole steps of a program, and the number of parts, none of them empty."""
    parts = parts or max(1, WAVES * _processors(device) // programs)
    size = triton.cdiv(triton.cdiv(N, parts), SLOTS) * SLOTS
    return size, triton.cdiv(N, size)


def _step(width: int, dtype: torch.dtype, coded: bool, angles: bool) -> tuple[int, int]:
    """Slots of a step of a program, and steps whose loads are under way.

    Compiled for capabilities 8.0 and 9.0, this needs at most 50 kB of shared memory, and 128 registers a thread for
    plain bfloat16 keys of 128 elements: what fills a multiprocessor with four programs.
    """
    heavy = (width > 128) + (dtype == torch.float32) + angles
    return max(16, SLOTS >> (heavy + coded)), 1 if heavy else 2


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]
