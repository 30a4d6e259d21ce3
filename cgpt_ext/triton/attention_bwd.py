"""Attention's backward pass: three kernels, none of which adds into what another program writes.

    delta_i = sum_d dout_id out_id
    p_ij = exp(x_ij - lse_i),  ds_ij = p_ij (dout_i . v_j - delta_i)
    dv = p^T dout,  dk = scale ds^T q,  dq = scale ds k

FlashAttention-2 (Dao 2023, arXiv 2307.08691) adds dq up across programs; here a kernel of its own makes it, one
program a tile of queries going over keys, beside the kernel for dk and dv, one program a tile of keys going over the
queries of every head of its group. Two of seven products are made twice, and two runs give the same bits.

Scores are as in attention_fwd.py: x log2(e) in one fma in 16 bits, q scaled first in fp32.
"""

import triton.language as tl

import triton
from cgpt_ext.triton._jit import LOG2E, config, dot, narrow
from cgpt_ext.triton.attention_tiles import NEVER, load_tile, meets, segments, sequence, store_tile, tuned_for

DELTA_ROWS = 64


@triton.jit(do_not_specialize=["H", "Tq"])
def attention_delta_kernel(
    dout_ptr, out_ptr, delta_ptr, cu_q_ptr,
    stride_gb, stride_gt, stride_gh, stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    H, Tq, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dout, out (B, Tq, H, D) and delta (B, H, Tq) by strides; one program BLOCK_M rows."""
    tiles = tl.cdiv(Tq, BLOCK_M)
    b = tl.program_id(0) // tiles // H
    h = tl.program_id(0) // tiles % H
    start, Tq = sequence(cu_q_ptr, b, Tq)
    first = tl.program_id(0) % tiles * BLOCK_M
    if first >= Tq:
        return
    rows = first + tl.arange(0, BLOCK_M)
    dout_ptr += b.to(tl.int64) * stride_gb + start * stride_gt + h.to(tl.int64) * stride_gh
    out_ptr += b.to(tl.int64) * stride_ob + start * stride_ot + h.to(tl.int64) * stride_oh
    dout = load_tile(dout_ptr, rows, stride_gt, Tq, 0, D0, D, True).to(tl.float32)
    delta = tl.sum(dout * load_tile(out_ptr, rows, stride_ot, Tq, 0, D0, D, True).to(tl.float32), 1)
    if D1 > 0:
        dout = load_tile(dout_ptr, rows, stride_gt, Tq, D0, D1, D, True).to(tl.float32)
        delta += tl.sum(dout * load_tile(out_ptr, rows, stride_ot, Tq, D0, D1, D, True).to(tl.float32), 1)
    delta_ptr += b.to(tl.int64) * stride_lb + start + h.to(tl.int64) * stride_lh
    tl.store(delta_ptr + rows, delta, mask=rows < Tq)


@triton.jit
def _probability(x, lse, distance, scale, slope, ALIBI: tl.constexpr, FP32: tl.constexpr):
    """p of the products x; scale and slope, and lse where not FP32, are in units of log 2."""
    if FP32:
        if ALIBI:
            x -= slope * distance
        return tl.exp2((x - lse) * LOG2E)
    elif ALIBI:
        return tl.exp2(x * scale - slope * distance - lse)
    else:
        return tl.exp2(x * scale - lse)


@triton.jit
def _over_queries(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qt, stride_gt, keys, begin, end,
    Tq, Tk, shift, left, right, scale, slope,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    MASK: tl.constexpr, CUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """CUT where rows may lie past the end: they read as zeros, and as probabilities exp(-inf)."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    for start in tl.range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q0 = load_tile(q_ptr, rows, stride_qt, Tq, 0, D0, D, CUT)
        dout0 = load_tile(dout_ptr, rows, stride_gt, Tq, 0, D0, D, CUT)
        if CUT:
            lse = tl.load(lse_ptr + rows, mask=rows < Tq, other=float("inf"))
            delta = tl.load(delta_ptr + rows, mask=rows < Tq, other=0.0)
        else:
            lse = tl.load(lse_ptr + rows)
            delta = tl.load(delta_ptr + rows)
        if FP32:
            q0 = q0 * scale
        else:
            lse = lse * LOG2E
        x = dot(k0, tl.trans(q0))
        dp = dot(v0, tl.trans(dout0))
        if D1 > 0:
            q1 = load_tile(q_ptr, rows, stride_qt, Tq, D0, D1, D, CUT)
            dout1 = load_tile(dout_ptr, rows, stride_gt, Tq, D0, D1, D, CUT)
            if FP32:
                q1 = q1 * scale
            x = dot(k1, tl.trans(q1), x)
            dp = dot(v1, tl.trans(dout1), dp)
        distance = 0.0
        if ALIBI:
            distance = tl.abs(rows[None, :] + shift - keys[:, None]).to(tl.float32)
        p = _probability(x, lse[None, :], distance, scale, slope, ALIBI, FP32)
        if MASK:
            p = tl.where(meets(rows[None, :], keys[:, None], shift, left, right, Tk, LEFT, RIGHT), p, 0.0)
        ds = narrow(p * (dp - delta[None, :]), dtype)
        p = narrow(p, dtype)
        dv0 = dot(p, dout0, dv0)
        dk0 = dot(ds, q0, dk0)
        if D1 > 0:
            dv1 = dot(p, dout1, dv1)
            dk1 = dot(ds, q1, dk1)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["H", "Tq", "Tk", "left", "right", "tuning_T"])
def attention_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr, dk_ptr, dv_ptr,
    stride_gb, stride_gt, stride_gh, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    stride_lb, stride_lh, stride_sb,
    H, Tq, Tk, left, right, scale, tuning_T,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, GROUP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_N keys of one key head; the first keys, which a causal mask shows to most queries, first."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    ALIBI: tl.constexpr = slopes_ptr is not None
    tiles = tl.cdiv(Tk, BLOCK_N)
    Hkv = H // GROUP
    first = tl.program_id(0) % tiles * BLOCK_N
    b = tl.program_id(0) // tiles // Hkv
    head = tl.program_id(0) // tiles % Hkv
    start_q, Tq = sequence(cu_q_ptr, b, Tq)
    start_k, Tk = sequence(cu_k_ptr, b, Tk)
    if first >= Tk:
        return
    h = head * GROUP
    q_ptr += b.to(tl.int64) * stride_qb + start_q * stride_qt + h.to(tl.int64) * stride_qh
    dout_ptr += b.to(tl.int64) * stride_gb + start_q * stride_gt + h.to(tl.int64) * stride_gh
    lse_ptr += b.to(tl.int64) * stride_lb + start_q + h.to(tl.int64) * stride_lh
    delta_ptr += b.to(tl.int64) * stride_lb + start_q + h.to(tl.int64) * stride_lh
    k_ptr += b.to(tl.int64) * stride_kb + start_k * stride_kt + head.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + start_k * stride_vt + head.to(tl.int64) * stride_vh
    dk_ptr += b.to(tl.int64) * stride_dkb + start_k * stride_dkt + head.to(tl.int64) * stride_dkh
    dv_ptr += b.to(tl.int64) * stride_dvb + start_k * stride_dvt + head.to(tl.int64) * stride_dvh

    keys = first + tl.arange(0, BLOCK_N)
    k0 = load_tile(k_ptr, keys, stride_kt, Tk, 0, D0, D, True)
    v0 = load_tile(v_ptr, keys, stride_vt, Tk, 0, D0, D, True)
    k1, v1 = k0, v0
    if D1 > 0:
        k1 = load_tile(k_ptr, keys, stride_kt, Tk, D0, D1, D, True)
        v1 = load_tile(v_ptr, keys, stride_vt, Tk, D0, D1, D, True)
    dk0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dv0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dk1 = tl.zeros((BLOCK_N, D1 if D1 > 0 else 16), tl.float32)
    dv1 = tl.zeros((BLOCK_N, D1 if D1 > 0 else 16), tl.float32)
    score_scale = scale
    if not FP32:
        score_scale = scale * LOG2E
    shift = Tk - Tq
    last = tl.minimum(first + BLOCK_N, Tk) - 1
    lo, full_lo, full_hi, hi = segments(first, last, -shift, right, left, Tq, RIGHT, LEFT, BLOCK_M)
    for member in tl.range(0, GROUP):
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + b * stride_sb + h + member)
            if not FP32:
                slope = slope * LOG2E
        if RIGHT:
            dk0, dk1, dv0, dv1 = _over_queries(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qt, stride_gt, keys,
                lo, full_lo, Tq, Tk, shift, left, right, score_scale, slope,
                D, D0, D1, BLOCK_M, True, True, LEFT, RIGHT, ALIBI,
            )  # fmt: skip
        # Without a left side the last rows need no mask, only not to be read past the end.
        dk0, dk1, dv0, dv1 = _over_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qt, stride_gt, keys,
            full_lo, full_hi if LEFT else hi, Tq, Tk, shift, left, right, score_scale, slope,
            D, D0, D1, BLOCK_M, False, not LEFT, LEFT, RIGHT, ALIBI,
        )  # fmt: skip
        if LEFT:
            dk0, dk1, dv0, dv1 = _over_queries(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qt, stride_gt, keys,
                full_hi, hi, Tq, Tk, shift, left, right, score_scale, slope,
                D, D0, D1, BLOCK_M, True, True, LEFT, RIGHT, ALIBI,
            )  # fmt: skip
        q_ptr += stride_qh
        dout_ptr += stride_gh
        lse_ptr += stride_lh
        delta_ptr += stride_lh

    dtype: tl.constexpr = dk_ptr.dtype.element_ty
    if FP32:
        scale = 1.0  # q came scaled
    store_tile(dk_ptr, keys, stride_dkt, Tk, narrow(dk0 * scale, dtype), 0, D0, D)
    store_tile(dv_ptr, keys, stride_dvt, Tk, narrow(dv0, dtype), 0, D0, D)
    if D1 > 0:
        store_tile(dk_ptr, keys, stride_dkt, Tk, narrow(dk1 * scale, dtype), D0, D1, D)
        store_tile(dv_ptr, keys, stride_dvt, Tk, narrow(dv1, dtype), D0, D1, D)


@triton.jit
def _over_keys(
    dq0, dq1, q0, q1, dout0, dout1, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, begin, end,
    Tk, shift, left, right, scale, slope,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    FP32: tl.constexpr = k_ptr.dtype.element_ty == tl.float32
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k0 = load_tile(k_ptr, keys, stride_kt, Tk, 0, D0, D, MASK)
        x = dot(q0, tl.trans(k0))
        dp = dot(dout0, tl.trans(load_tile(v_ptr, keys, stride_vt, Tk, 0, D0, D, MASK)))
        if D1 > 0:
            k1 = load_tile(k_ptr, keys, stride_kt, Tk, D0, D1, D, MASK)
            x = dot(q1, tl.trans(k1), x)
            dp = dot(dout1, tl.trans(load_tile(v_ptr, keys, stride_vt, Tk, D0, D1, D, MASK)), dp)
        distance = 0.0
        if ALIBI:
            distance = tl.abs(rows[:, None] + shift - keys[None, :]).to(tl.float32)
        p = _probability(x, lse[:, None], distance, scale, slope, ALIBI, FP32)
        if MASK:
            p = tl.where(meets(rows[:, None], keys[None, :], shift, left, right, Tk, LEFT, RIGHT), p, 0.0)
        ds = narrow(p * (dp - delta[:, None]), k_ptr.dtype.element_ty)
        dq0 = dot(ds, k0, dq0)
        if D1 > 0:
            dq1 = dot(ds, k1, dq1)
    return dq0, dq1


@triton.jit(do_not_specialize=["H", "group", "Tq", "Tk", "left", "right", "tuning_T"])
def attention_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, slopes_ptr, cu_q_ptr, cu_k_ptr, dq_ptr,
    stride_gb, stride_gt, stride_gh, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_dqb, stride_dqt, stride_dqh, stride_lb, stride_lh, stride_sb,
    H, group, Tq, Tk, left, right, scale, tuning_T,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_M queries of one head."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    ALIBI: tl.constexpr = slopes_ptr is not None
    tiles = tl.cdiv(Tq, BLOCK_M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b = tl.program_id(0) // tiles // H
    h = tl.program_id(0) // tiles % H
    start_q, Tq = sequence(cu_q_ptr, b, Tq)
    start_k, Tk = sequence(cu_k_ptr, b, Tk)
    if first >= Tq:
        return
    q_ptr += b.to(tl.int64) * stride_qb + start_q * stride_qt + h.to(tl.int64) * stride_qh
    dout_ptr += b.to(tl.int64) * stride_gb + start_q * stride_gt + h.to(tl.int64) * stride_gh
    dq_ptr += b.to(tl.int64) * stride_dqb + start_q * stride_dqt + h.to(tl.int64) * stride_dqh
    lse_ptr += b.to(tl.int64) * stride_lb + start_q + h.to(tl.int64) * stride_lh
    delta_ptr += b.to(tl.int64) * stride_lb + start_q + h.to(tl.int64) * stride_lh
    k_ptr += b.to(tl.int64) * stride_kb + start_k * stride_kt + (h // group).to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + start_k * stride_vt + (h // group).to(tl.int64) * stride_vh

    rows = first + tl.arange(0, BLOCK_M)
    q0 = load_tile(q_ptr, rows, stride_qt, Tq, 0, D0, D, True)
    dout0 = load_tile(dout_ptr, rows, stride_gt, Tq, 0, D0, D, True)
    q1, dout1 = q0, dout0
    if D1 > 0:
        q1 = load_tile(q_ptr, rows, stride_qt, Tq, D0, D1, D, True)
        dout1 = load_tile(dout_ptr, rows, stride_gt, Tq, D0, D1, D, True)
    lse = tl.load(lse_ptr + rows, mask=rows < Tq, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=rows < Tq, other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + b * stride_sb + h)
    score_scale = scale
    if FP32:
        q0 = q0 * scale
        if D1 > 0:
            q1 = q1 * scale
    else:
        score_scale = scale * LOG2E
        slope = slope * LOG2E
        lse = lse * LOG2E
    dq0 = tl.zeros((BLOCK_M, D0), tl.float32)
    dq1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 16), tl.float32)
    shift = Tk - Tq
    last = tl.minimum(first + BLOCK_M, Tq) - 1
    lo, full_lo, full_hi, hi = segments(first, last, shift, left, right, Tk, LEFT, RIGHT, BLOCK_N)
    if LEFT:
        dq0, dq1 = _over_keys(
            dq0, dq1, q0, q1, dout0, dout1, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, lo, full_lo,
            Tk, shift, left, right, score_scale, slope, D, D0, D1, BLOCK_N, True, LEFT, RIGHT, ALIBI,
        )  # fmt: skip
    dq0, dq1 = _over_keys(
        dq0, dq1, q0, q1, dout0, dout1, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, full_lo, full_hi,
        Tk, shift, left, right, score_scale, slope, D, D0, D1, BLOCK_N, False, LEFT, RIGHT, ALIBI,
    )  # fmt: skip
    dq0, dq1 = _over_keys(
        dq0, dq1, q0, q1, dout0, dout1, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, full_hi, hi,
        Tk, shift, left, right, score_scale, slope, D, D0, D1, BLOCK_N, True, LEFT, RIGHT, ALIBI,
    )  # fmt: skip

    dtype: tl.constexpr = dq_ptr.dtype.element_ty
    store_tile(dq_ptr, rows, stride_dqt, Tq, narrow(dq0 * scale, dtype), 0, D0, D)
    if D1 > 0:
        store_tile(dq_ptr, rows, stride_dqt, Tq, narrow(dq1 * scale, dtype), D0, D1, D)


# bytes an element, largest head dim, least arch with a causal mask or none, least arch with everything, tile
DKDV_CONFIGS = [
    (2, 64, 80, NEVER, config(8, 2, BLOCK_M=64, BLOCK_N=128)),
    (2, 64, 80, NEVER, config(8, 2, BLOCK_M=64, BLOCK_N=64)),
    (2, 64, 80, 80, config(8, 2, BLOCK_M=32, BLOCK_N=128)),
    (2, 64, 80, 90, config(4, 2, BLOCK_M=32, BLOCK_N=64)),
    (2, 128, 90, NEVER, config(8, 2, BLOCK_M=64, BLOCK_N=64)),
    (2, 128, 80, NEVER, config(8, 2, BLOCK_M=32, BLOCK_N=64)),
    (2, 128, 80, NEVER, config(8, 2, BLOCK_M=16, BLOCK_N=128)),
    (2, 128, NEVER, 80, config(8, 2, BLOCK_M=16, BLOCK_N=64)),
    (2, 192, 90, NEVER, config(8, 2, BLOCK_M=16, BLOCK_N=64)),
    (2, 192, 80, 80, config(8, 2, BLOCK_M=16, BLOCK_N=32)),
    (2, 256, 80, NEVER, config(8, 2, BLOCK_M=16, BLOCK_N=64)),
    (2, 256, 80, 80, config(8, 2, BLOCK_M=16, BLOCK_N=32)),
    (4, 64, 80, 80, config(8, 1, BLOCK_M=16, BLOCK_N=32)),
    (4, 64, 80, 80, config(4, 1, BLOCK_M=16, BLOCK_N=16)),
    (4, 128, 80, NEVER, config(8, 1, BLOCK_M=16, BLOCK_N=32)),
    (4, 128, 80, 80, config(8, 1, BLOCK_M=16, BLOCK_N=16)),
    (4, 192, 80, 80, config(8, 1, BLOCK_M=16, BLOCK_N=16)),
    (4, 256, 80, 80, config(8, 1, BLOCK_M=16, BLOCK_N=16)),
]
DQ_CONFIGS = [
    (2, 64, 80, 80, config(8, 3, BLOCK_M=128, BLOCK_N=64)),
    (2, 64, 80, 80, config(4, 3, BLOCK_M=64, BLOCK_N=64)),
    (2, 64, 80, 80, config(8, 2, BLOCK_M=128, BLOCK_N=32)),
    (2, 128, 90, 90, config(8, 2, BLOCK_M=128, BLOCK_N=64)),
    (2, 128, 80, 80, config(8, 2, BLOCK_M=128, BLOCK_N=32)),
    (2, 128, 80, 80, config(8, 2, BLOCK_M=64, BLOCK_N=64)),
    (2, 192, 90, 90, config(8, 2, BLOCK_M=64, BLOCK_N=32)),
    (2, 192, 80, 80, config(8, 2, BLOCK_M=32, BLOCK_N=32)),
    (2, 256, 90, 90, config(8, 2, BLOCK_M=64, BLOCK_N=32)),
    (2, 256, 80, 80, config(8, 2, BLOCK_M=32, BLOCK_N=32)),
    (4, 64, 80, 80, config(8, 2, BLOCK_M=64, BLOCK_N=32)),
    (4, 64, 80, 80, config(4, 2, BLOCK_M=32, BLOCK_N=32)),
    (4, 128, 80, 80, config(8, 2, BLOCK_M=32, BLOCK_N=32)),
    (4, 128, 80, 80, config(8, 2, BLOCK_M=32, BLOCK_N=16)),
    (4, 192, 80, 80, config(8, 2, BLOCK_M=16, BLOCK_N=32)),
    (4, 256, 80, 80, config(8, 2, BLOCK_M=16, BLOCK_N=32)),
]
DKDV = tuned_for(attention_dkdv_kernel, DKDV_CONFIGS)
DQ = tuned_for(attention_dq_kernel, DQ_CONFIGS)
