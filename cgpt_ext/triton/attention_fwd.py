"""Attention's forward pass: FlashAttention-2's schedule (Dao 2023, arXiv 2307.08691).

    x = scale q k^T - slope |i + Tk - Tq - j|,  out = softmax(x) v,  lse = log sum_j exp(x)

One program a tile of BLOCK_M queries of one head. It goes over the keys those queries see in tiles of BLOCK_N with a
running maximum and sum: tiles that a window, the diagonal or the end cuts run with the mask, the others without. The
last queries, which see the most keys of a causal mask, start first.

In 16 bits the exponent is x log2(e) in one fma. In fp32, held to 1e-5 where scores are in the thousands, q is scaled
first and the maximum taken off before anything is multiplied, so that the largest term is exactly 1.
"""

import triton.language as tl

import triton
from cgpt_ext.triton._jit import LN2, LOG2E, config, dot, narrow
from cgpt_ext.triton.attention_tiles import load_tile, meets, segments, sequence, store_tile, tuned_for


@triton.jit
def _over_keys(
    acc0, acc1, total, largest, q0, q1, k_ptr, v_ptr, stride_kt, stride_vt, rows, begin, end, Tk, shift, left, right,
    scale, slope,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    FP32: tl.constexpr = k_ptr.dtype.element_ty == tl.float32
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        x = dot(q0, tl.trans(load_tile(k_ptr, keys, stride_kt, Tk, 0, D0, D, MASK)))
        if D1 > 0:
            x = dot(q1, tl.trans(load_tile(k_ptr, keys, stride_kt, Tk, D0, D1, D, MASK)), x)
        if MASK or ALIBI or FP32:
            if not FP32:
                x = x * scale
            if ALIBI:
                x -= slope * tl.abs(rows[:, None] + shift - keys[None, :]).to(tl.float32)
            if MASK:
                x = tl.where(meets(rows[:, None], keys[None, :], shift, left, right, Tk, LEFT, RIGHT), x, float("-inf"))
            new = tl.maximum(largest, tl.max(x, 1))
            base = new
            if MASK:  # a row that has seen nothing yet: inf - inf would be NaN
                base = tl.where(new == float("-inf"), 0.0, new)
            if FP32:
                p = tl.exp2((x - base[:, None]) * LOG2E)
                alpha = tl.exp2((largest - base) * LOG2E)
            else:
                p = tl.exp2(x - base[:, None])
                alpha = tl.exp2(largest - base)
        else:
            new = tl.maximum(largest, tl.max(x, 1) * scale)
            p = tl.exp2(x * scale - new[:, None])
            alpha = tl.exp2(largest - new)
        largest = new
        total = total * alpha + tl.sum(p, 1)
        p = narrow(p, v_ptr.dtype.element_ty)
        acc0 = dot(p, load_tile(v_ptr, keys, stride_vt, Tk, 0, D0, D, MASK), acc0 * alpha[:, None])
        if D1 > 0:
            acc1 = dot(p, load_tile(v_ptr, keys, stride_vt, Tk, D0, D1, D, MASK), acc1 * alpha[:, None])
    return acc0, acc1, total, largest


@triton.jit(do_not_specialize=["H", "group", "Tq", "Tk", "left", "right", "tuning_T"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh, stride_sb,
    H, group, Tq, Tk, left, right, scale, tuning_T,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q (B, Tq, H, D), k and v (B, Tk, H / group, D), lse (B, H, Tq) by strides; with cu_seqlens Tq, Tk the longest."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    ALIBI: tl.constexpr = slopes_ptr is not None
    tiles = tl.cdiv(Tq, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    b = tl.program_id(0) // tiles // H
    h = tl.program_id(0) // tiles % H
    start_q, Tq = sequence(cu_q_ptr, b, Tq)
    start_k, Tk = sequence(cu_k_ptr, b, Tk)
    first = tile * BLOCK_M
    if first >= Tq:
        return
    q_ptr += b.to(tl.int64) * stride_qb + start_q * stride_qt + h.to(tl.int64) * stride_qh
    k_ptr += b.to(tl.int64) * stride_kb + start_k * stride_kt + (h // group).to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + start_k * stride_vt + (h // group).to(tl.int64) * stride_vh
    out_ptr += b.to(tl.int64) * stride_ob + start_q * stride_ot + h.to(tl.int64) * stride_oh

    rows = first + tl.arange(0, BLOCK_M)
    q0 = load_tile(q_ptr, rows, stride_qt, Tq, 0, D0, D, True)
    q1 = q0
    if D1 > 0:
        q1 = load_tile(q_ptr, rows, stride_qt, Tq, D0, D1, D, True)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + b * stride_sb + h)
    if FP32:
        q0 = q0 * scale
        if D1 > 0:
            q1 = q1 * scale
    else:
        if NEGATIVE:  # the maximum of scaled scores is the scaled maximum only where the scale is not negative
            q0 = -q0
            if D1 > 0:
                q1 = -q1
            scale = -scale
        scale = scale * LOG2E
        slope = slope * LOG2E

    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 16), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    shift = Tk - Tq
    last = tl.minimum(first + BLOCK_M, Tq) - 1
    lo, full_lo, full_hi, hi = segments(first, last, shift, left, right, Tk, LEFT, RIGHT, BLOCK_N)
    if LEFT:
        acc0, acc1, total, largest = _over_keys(
            acc0, acc1, total, largest, q0, q1, k_ptr, v_ptr, stride_kt, stride_vt, rows, lo, full_lo, Tk, shift,
            left, right, scale, slope, D, D0, D1, BLOCK_N, True, LEFT, RIGHT, ALIBI,
        )  # fmt: skip
    acc0, acc1, total, largest = _over_keys(
        acc0, acc1, total, largest, q0, q1, k_ptr, v_ptr, stride_kt, stride_vt, rows, full_lo, full_hi, Tk, shift,
        left, right, scale, slope, D, D0, D1, BLOCK_N, False, LEFT, RIGHT, ALIBI,
    )  # fmt: skip
    acc0, acc1, total, largest = _over_keys(
        acc0, acc1, total, largest, q0, q1, k_ptr, v_ptr, stride_kt, stride_vt, rows, full_hi, hi, Tk, shift,
        left, right, scale, slope, D, D0, D1, BLOCK_N, True, LEFT, RIGHT, ALIBI,
    )  # fmt: skip

    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    store_tile(out_ptr, rows, stride_ot, Tq, narrow(acc0 * inverse[:, None], out_ptr.dtype.element_ty), 0, D0, D)
    if D1 > 0:
        store_tile(out_ptr, rows, stride_ot, Tq, narrow(acc1 * inverse[:, None], out_ptr.dtype.element_ty), D0, D1, D)
    if lse_ptr is not None:
        if not FP32:
            largest = largest * LN2
        lse_ptr += b.to(tl.int64) * stride_lb + start_q + h.to(tl.int64) * stride_lh
        tl.store(lse_ptr + rows, largest + tl.log(total), mask=rows < Tq)


# bytes an element, largest head dim, least arch with a causal mask or none, least arch with everything, tile
CONFIGS = [
    (2, 64, 80, 80, config(8, 3, BLOCK_M=128, BLOCK_N=128)),
    (2, 64, 80, 80, config(8, 3, BLOCK_M=128, BLOCK_N=64)),
    (2, 64, 80, 90, config(4, 3, BLOCK_M=128, BLOCK_N=64)),
    (2, 64, 80, 80, config(4, 3, BLOCK_M=64, BLOCK_N=64)),
    (2, 128, 90, 90, config(8, 2, BLOCK_M=128, BLOCK_N=128)),
    (2, 128, 80, 80, config(8, 3, BLOCK_M=128, BLOCK_N=64)),
    (2, 128, 90, 90, config(4, 3, BLOCK_M=64, BLOCK_N=64)),
    (2, 128, 80, 80, config(4, 3, BLOCK_M=64, BLOCK_N=32)),
    (2, 192, 90, 90, config(8, 2, BLOCK_M=128, BLOCK_N=64)),
    (2, 192, 90, 90, config(8, 2, BLOCK_M=128, BLOCK_N=32)),
    (2, 192, 80, 80, config(4, 2, BLOCK_M=64, BLOCK_N=16)),
    (2, 192, 80, 80, config(4, 2, BLOCK_M=32, BLOCK_N=32)),
    (2, 256, 90, 90, config(8, 2, BLOCK_M=128, BLOCK_N=32)),
    (2, 256, 80, 80, config(4, 2, BLOCK_M=32, BLOCK_N=32)),
    (4, 64, 80, 80, config(8, 2, BLOCK_M=64, BLOCK_N=32)),
    (4, 64, 80, 80, config(4, 2, BLOCK_M=32, BLOCK_N=32)),
    (4, 128, 80, 80, config(8, 2, BLOCK_M=32, BLOCK_N=16)),
    (4, 128, 80, 80, config(4, 1, BLOCK_M=16, BLOCK_N=32)),
    (4, 192, 80, 80, config(8, 1, BLOCK_M=32, BLOCK_N=16)),
    (4, 256, 80, 80, config(8, 1, BLOCK_M=32, BLOCK_N=16)),
]
TUNED = tuned_for(attention_fwd_kernel, CONFIGS)
