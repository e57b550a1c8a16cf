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

from litgpt_kv_triton.stored import ELEMENTS, HALVES, how_read, load_codes, load_elements, load_halves, load_scales

SLOTS = 64  # of a step of a program, at most
ROWS = 64  # query heads of a program, at most
JOINED = 256  # slots of a program that makes probabilities


@triton.jit(do_not_specialize=["N", "part_size"])
def _attend_part(
    q, near_q, near, k, k_scale, k_zero, v, v_scale, v_zero, mask, cos, sin, part_sum, part_max, part_weight, scores,
    P, M, N, D, DV, part_size, n_near, E, scale, softcap,
    k_b, k_p, k_s, ks_b, ks_p, ks_s, kz_b, kz_p, kz_s,
    v_b, v_p, v_s, vs_b, vs_p, vs_s, vz_b, vz_p, vz_s,
    mask_b, mask_p, mask_m, mask_s, near_b, near_p, near_s, cos_b, cos_p, cos_s, sin_b, sin_p, sin_s,
    K_KIND: tl.constexpr, K_GROUP: tl.constexpr, K_BYTES: tl.constexpr, K_READ: tl.constexpr,
    V_KIND: tl.constexpr, V_GROUP: tl.constexpr, V_BYTES: tl.constexpr, V_READ: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_NEAR: tl.constexpr, HAS_ANGLES: tl.constexpr, HAS_CAP: tl.constexpr,
    WITH_SCORES: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Attend to one part of the slots: grid (B * P, K, tiles of M). See `decode_attention`.

    K_READ, V_READ: ELEMENTS, CODES or HALVES, see `how_read`. Of HALVES, BLOCK_D and BLOCK_DV are half of a token.
    """
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
    if K_READ == 2:
        x_high = tl.load(q + at_q + BLOCK_D, mask=real, other=0.0)
    if HAS_NEAR:
        near_x = tl.load(near_q + at_q, mask=real & (d < D), other=0.0)
        if K_READ == 2:
            near_high = tl.load(near_q + at_q + BLOCK_D, mask=real, other=0.0)

    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.full((BLOCK_M,), 0.0, tl.float32)
    total = tl.full((BLOCK_M, BLOCK_DV), 0.0, tl.float32)
    if V_READ == 2:
        total_high = tl.full((BLOCK_M, BLOCK_DV), 0.0, tl.float32)
    start = part * part_size
    stop = tl.minimum(start + part_size, N)
    for first in range(start, stop, BLOCK_N):
        s = first + tl.arange(0, BLOCK_N)
        slot, inside = s[:, None], s[:, None] < stop
        if K_READ == 0:
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
        elif K_READ == 1:
            keys = tl.trans(load_codes(k, slot, d, inside, d < D, k_s, x.dtype, K_KIND))
            factor = scale * load_scales(k_scale, s, s < stop, ks_s, K_KIND)[None, :]
            found = tl.dot(x, keys, input_precision="ieee") * factor
        else:
            low, high = load_halves(k, k_scale, k_zero, s, s < stop, k_s, ks_s, kz_s, x.dtype, K_GROUP, K_BYTES)
            keys, high = tl.trans(low), tl.trans(high)
            found = tl.dot(x_high, high, tl.dot(x, keys, input_precision="ieee"), input_precision="ieee") * scale
        if HAS_NEAR:  # noqa: SIM102 (the compiler drops this one)
            if first < n_near:
                marked = tl.load(near + s * near_s, mask=s < n_near, other=0) != 0
                own = tl.dot(near_x, keys, input_precision="ieee")
                if K_READ == 1:
                    own *= factor
                elif K_READ == 2:
                    own = tl.dot(near_high, high, own, input_precision="ieee") * scale
                else:
                    own *= scale
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
        weight = weight * shrink + tl.sum(probs, 1)
        total *= shrink[:, None]
        if V_READ == 0:
            values = load_elements(
                v, v_scale, v_zero, slot, dv, inside, dv < DV, v_s, vs_s, vz_s, V_KIND, V_GROUP, V_BYTES
            ).to(x.dtype)
        elif V_READ == 1:
            values = load_codes(v, slot, dv, inside, dv < DV, v_s, x.dtype, V_KIND)
            probs *= load_scales(v_scale, s, s < stop, vs_s, V_KIND)[None, :]
        else:
            values, high = load_halves(v, v_scale, v_zero, s, s < stop, v_s, vs_s, vz_s, x.dtype, V_GROUP, V_BYTES)
            total_high = tl.dot(probs.to(x.dtype), high, total_high * shrink[:, None], input_precision="ieee")
        total = tl.dot(probs.to(x.dtype), values, total, input_precision="ieee")
        most = new_most

    row = (pair * tl.num_programs(1) + part) * M + m  # (B, P, K, M)
    tl.store(part_max + row, most, mask=m < M)
    tl.store(part_weight + row, weight, mask=m < M)
    tl.store(part_sum + row[:, None] * DV + dv, total, mask=real & (dv < DV))
    if V_READ == 2:
        tl.store(part_sum + row[:, None] * DV + BLOCK_DV + dv, total_high, mask=real)


@triton.jit(do_not_specialize=["N", "parts"])
def _join_parts(
    part_sum, part_max, part_weight, scores, y, mass, M, N, DV, parts, share,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Join the parts: grid (B * P, M query heads, then blocks of slots whose mass is summed).

    Many parts are read at once, BLOCK_K for outputs: one after the other would take as long as attention does.
    """
    pair, job = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if job < M:
        dv = tl.arange(0, BLOCK_DV)
        most, weight = float("-inf"), 0.0
        total = tl.full((BLOCK_DV,), 0.0, tl.float32)
        for first in range(0, parts, BLOCK_K):
            part = first + tl.arange(0, BLOCK_K)
            row = (pair * parts + part) * M + job
            own = tl.load(part_max + row, mask=part < parts, other=float("-inf"))
            added = tl.load(part_weight + row, mask=part < parts, other=0.0)
            found = tl.load(
                part_sum + row[:, None] * DV + dv[None, :], mask=(part[:, None] < parts) & (dv[None, :] < DV), other=0.0
            )  # (BLOCK_K, BLOCK_DV)
            new_most = tl.maximum(most, tl.max(own, 0))
            shrink, grow = tl.exp(most - new_most), tl.exp(own - new_most)
            weight = weight * shrink + tl.sum(added * grow, 0)
            total = total * shrink + tl.sum(found * grow[:, None], 0)
            most = new_most
        tl.store(y + (pair * M + job) * DV + dv, (total / weight).to(y.dtype.element_ty), mask=dv < DV)
    else:
        s = (job - M) * BLOCK_N + tl.arange(0, BLOCK_N)
        received = tl.full((BLOCK_N,), 0.0, tl.float32)
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            weight = tl.full((BLOCK_M,), 0.0, tl.float32)
            BLOCK_P: tl.constexpr = 2048 // BLOCK_M
            for first in range(0, parts, BLOCK_P):
                part = first + tl.arange(0, BLOCK_P)
                row = (pair * parts + part[:, None]) * M + m[None, :]
                there = (part[:, None] < parts) & (m[None, :] < M)
                own = tl.load(part_max + row, mask=there, other=float("-inf"))  # (BLOCK_P, BLOCK_M)
                added = tl.load(part_weight + row, mask=there, other=0.0)
                new_most = tl.maximum(tl.maximum(most, tl.max(own, 0)), -3.4028234663852886e38)  # finite beyond M
                weight = weight * tl.exp(most - new_most) + tl.sum(added * tl.exp(own - new_most[None, :]), 0)
                most = new_most
            inside = (m[:, None] < M) & (s[None, :] < N)
            found = tl.load(scores + (pair * M + m[:, None]) * N + s[None, :], mask=inside, other=float("-inf"))
            weight = tl.where(m < M, weight, 1.0)
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
    k_read = ELEMENTS if cos is not None else how_read(k_kind, k_group, k.size(-1), D, dtype)
    v_read = how_read(v_kind, v_group, v.size(-1), v_width, dtype)
    step, stages, warps, waves = _launch(max(D, v_width), dtype, k_read, v_read, k_kind > 0, cos is not None)
    size, parts = _part_size(N, parts or max(1, waves * _processors(q.device) // (B * P * tiles)))
    new = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    part_sum, part_max, part_weight = new(B, P, parts, M, v_width), new(B, P, parts, M), new(B, P, parts, M)
    scores = new((B, P, M, N) if with_mass else 0)
    mass, y = new((B, P, N) if with_mass else (B, P, 0)), torch.empty(B, P, M, v_width, dtype=dtype, device=q.device)
    unused = q  # a pointer that is never read
    seen = None if mask is None else mask.expand(B, P, M, N).view(torch.uint8)
    marked = None if near is None else near.expand(B, P, -1).view(torch.uint8)
    angles = [None if x is None else x.expand(B, P, N, -1) for x in (cos, sin)]
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
            K_KIND=k_kind, K_GROUP=k_group, K_BYTES=k.size(-1), K_READ=k_read,
            V_KIND=v_kind, V_GROUP=v_group, V_BYTES=v.size(-1), V_READ=v_read,
            HAS_MASK=mask is not None, HAS_NEAR=near is not None, HAS_ANGLES=cos is not None, HAS_CAP=softcap > 0,
            WITH_SCORES=with_mass, HIDDEN=torch.finfo(torch.float32).min,
            BLOCK_M=block_m, BLOCK_N=step,
            BLOCK_D=D // 2 if k_read == HALVES else max(16, triton.next_power_of_2(D)),
            BLOCK_DV=v_width // 2 if v_read == HALVES else block_dv,
            num_stages=stages, num_warps=warps,
        )  # fmt: skip
        _join_parts[B * P, M + (triton.cdiv(N, JOINED) if with_mass else 0)](
            part_sum, part_max, part_weight, scores, y, mass, M, N, v_width, parts, 1 / per_group,
            BLOCK_K=min(64, triton.next_power_of_2(parts)), BLOCK_M=block_m, BLOCK_N=JOINED, BLOCK_DV=block_dv,
        )  # fmt: skip
    return y, mass


@decode_attention.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    v_width, extent, with_mass = args[10], args[11], args[20]
    B, P, M, _ = q.shape
    return q.new_empty(B, P, M, v_width), q.new_empty((B, P, extent if with_mass else 0), dtype=torch.float32)


def _part_size(N: int, parts: int) -> tuple[int, int]:
    """Slots of a part, whole steps of a program, and the number of parts, none of them empty."""
    size = triton.cdiv(triton.cdiv(N, parts), SLOTS) * SLOTS
    return size, triton.cdiv(N, size)


def _launch(
    width: int, dtype: torch.dtype, k_read: int, v_read: int, coded: bool, angles: bool
) -> tuple[int, int, int, int]:
    """How the first kernel runs: slots of a step, steps whose loads are under way, warps, programs a multiprocessor.

    The best of those that were tried on an H100 with heads of 128 elements in bfloat16 (README.md); what needs more
    registers or shared memory reads fewer slots at a time.
    """
    heavy = (width > 128) + (dtype == torch.float32) + angles
    slow = v_read == ELEMENTS or (k_read == ELEMENTS and (coded or not angles))  # dequantises element by element
    halves = HALVES in (k_read, v_read)  # loads byte by byte: more programs hide how long that takes
    slots = max(16, SLOTS >> (heavy + slow))
    return (slots, 1 if heavy else 2, 2, 4) if halves else (slots, 1 if heavy else 3, 4, 4 if heavy or slow else 2)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]
