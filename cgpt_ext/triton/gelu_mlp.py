"""The perceptron's two products that an activation touches, in Triton, with the activation in their epilogues.

    forward    pre = x w1^T + b1,  act = activation(pre)
    backward   dact = dy w2,  dpre = dact activation'(pre),  act once more,  db1 = sum over rows of dpre

    gelu       z Phi(z);                              derivative Phi(z) + z phi(z)
    gelu_tanh  z s, s = sigmoid(2 c (z + a z^3));     derivative s + z s (1 - s) 2 c (1 + 3 a z^2),  c = sqrt(2 / pi)
    swiglu     silu(gate) up, gate and up the halves of pre

M rows, x (M, D), w1 (F, D) or (2 F, D) for swiglu, w2 (D, F), act (M, F), pre like w1's rows. GELU is Hendrycks &
Gimpel's (2016, arXiv 1606.08415), SwiGLU Shazeer's (2020, arXiv 2002.05202). One program a tile of act; programs go
down GROUP_M tiles of rows before the next columns, so that both operands' tiles are found in the cache. db1 is summed
per tile of rows, each term before it is rounded, and a second kernel adds up the tiles in order.
"""

import torch
import triton.language as tl

import triton
from cgpt_ext.triton._jit import LOG2E, bucket, config, dot, narrow, on_device_of, tuned

GELU, GELU_TANH, SWIGLU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "swiglu": 2}
GROUP_M = tl.constexpr(8)
BWD_ROWS = 128  # rows of a tile in the backward pass, whatever the config: each leaves one row of partial sums


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-z * LOG2E))


@triton.jit
def _share(z, ACTIVATION: tl.constexpr):
    """(activation(z) / z, activation'(z)); silu where ACTIVATION is SWIGLU."""
    if ACTIVATION == GELU:
        share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        slope = share + z * (0.3989422804014327 * tl.exp2(z * z * (-0.5 * LOG2E)))
    elif ACTIVATION == GELU_TANH:
        # Past 16 the share is 0 or 1 and the slope's second term 0; held there, z^2 cannot overflow against that 0.
        near = tl.minimum(tl.maximum(z, -16.0), 16.0)
        square = near * near
        share = _sigmoid(near * (1.5957691216057308 + 0.07135481282553305 * square))
        slope = share + z * (share * (1.0 - share) * (1.5957691216057308 + 0.21406443847659914 * square))
    else:
        share = _sigmoid(z)
        slope = share + z * (share * (1.0 - share))
    return share, slope


@triton.jit
def _tile(M, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile of act: (row of tiles, column of tiles)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(F, BLOCK_N)
    first = tl.program_id(0) // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tl.program_id(0) % per_group
    return first + within % height, within // height


@triton.jit
def _product(
    a_ptr, b_ptr, rows, cols, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 of a (M, K) times b (K, N)."""
    inner = tl.arange(0, BLOCK_K)
    a_ptr += rows.to(tl.int64)[:, None] * stride_am + inner.to(tl.int64)[None, :] * stride_ak
    b_ptr += cols.to(tl.int64)[None, :] * stride_bn + inner.to(tl.int64)[:, None] * stride_bk
    row_mask = (rows < M)[:, None]
    col_mask = (cols < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptr, row_mask, 0.0)
            b = tl.load(b_ptr, col_mask, 0.0)
        else:
            a = tl.load(a_ptr, row_mask & (inner < K - k)[None, :], 0.0)
            b = tl.load(b_ptr, col_mask & (inner < K - k)[:, None], 0.0)
        acc = dot(a, b, acc)
        a_ptr += BLOCK_K * stride_ak
        b_ptr += BLOCK_K * stride_bk
    return acc


@triton.jit(do_not_specialize=["M", "tuning_M"])
def gelu_mlp_fwd_kernel(
    x_ptr, w1_ptr, b1_ptr, pre_ptr, act_ptr, M, F, D, stride_xm, stride_xd, stride_wf, stride_wd, tuning_M,
    ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    tile_m, tile_n = _tile(M, F, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    width = 2 * F if ACTIVATION == SWIGLU else F
    z = _product(
        x_ptr, w1_ptr, rows, cols, M, F, D, stride_xm, stride_xd, stride_wf, stride_wd,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    if b1_ptr is not None:
        z += tl.load(b1_ptr + cols, cols < F, 0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    at = rows.to(tl.int64)[:, None] * width + cols[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + at, narrow(z, dtype), mask)
    act = z * _share(z, ACTIVATION)[0]
    if ACTIVATION == SWIGLU:
        w1_ptr += (tl.full((), 0, tl.int64) + F) * stride_wf
        up = _product(
            x_ptr, w1_ptr, rows, cols, M, F, D, stride_xm, stride_xd, stride_wf, stride_wd,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
        )  # fmt: skip
        if b1_ptr is not None:
            up += tl.load(b1_ptr + F + cols, cols < F, 0.0).to(tl.float32)[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + F + at, narrow(up, dtype), mask)
        act = act * up
    tl.store(act_ptr + rows.to(tl.int64)[:, None] * F + cols[None, :], narrow(act, dtype), mask)


@triton.jit(do_not_specialize=["M", "tuning_M"])
def gelu_mlp_bwd_kernel(
    dy_ptr, w2_ptr, pre_ptr, dpre_ptr, act_ptr, partial_ptr, M, F, D, stride_ym, stride_yd, stride_wd, stride_wf,
    tuning_M, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial (tiles of rows, width of pre) fp32 gets each tile's column sums of dpre; it may be None."""
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    tile_m, tile_n = _tile(M, F, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    width = 2 * F if ACTIVATION == SWIGLU else F
    dact = _product(
        dy_ptr, w2_ptr, rows, cols, M, F, D, stride_ym, stride_yd, stride_wf, stride_wd,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    at = rows.to(tl.int64)[:, None] * width + cols[None, :]
    z = tl.load(pre_ptr + at, mask, 0.0).to(tl.float32)
    share, slope = _share(z, ACTIVATION)
    act = z * share
    dpre = dact * slope
    partial_at = tile_m.to(tl.int64) * width + cols
    if ACTIVATION == SWIGLU:
        up = tl.load(pre_ptr + F + at, mask, 0.0).to(tl.float32)
        dup = dact * act
        dpre = dpre * up
        act = act * up
        tl.store(dpre_ptr + F + at, narrow(dup, dtype), mask)
        if partial_ptr is not None:
            tl.store(partial_ptr + F + partial_at, tl.sum(tl.where(mask, dup, 0.0), 0), cols < F)
    tl.store(dpre_ptr + at, narrow(dpre, dtype), mask)
    tl.store(act_ptr + rows.to(tl.int64)[:, None] * F + cols[None, :], narrow(act, dtype), mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + partial_at, tl.sum(tl.where(mask, dpre, 0.0), 0), cols < F)


@triton.jit(do_not_specialize=["tiles"])
def gelu_mlp_bias_kernel(partial_ptr, db1_ptr, tiles, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """db1 (N,) from partial (tiles, N), in the order of the tiles."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, tiles, BLOCK_M):
        tile = start + tl.arange(0, BLOCK_M)
        mask = (tile < tiles)[:, None] & (cols < N)[None, :]
        total += tl.load(partial_ptr + tile.to(tl.int64)[:, None] * N + cols[None, :], mask, 0.0)
    tl.store(db1_ptr + cols, narrow(tl.sum(total, 0), db1_ptr.dtype.element_ty), cols < N)


# (bytes an element, whether gated) -> tiles to choose from
CONFIGS = {
    (2, False): [
        config(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        config(4, 4, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
        config(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
    ],
    (2, True): [
        config(8, 4, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        config(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
    ],
    (4, False): [config(8, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16), config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=16)],
    (4, True): [config(8, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16)],
}
BWD_CONFIGS = {
    (2, False): [config(8, 4, BLOCK_N=64, BLOCK_K=64), config(8, 3, BLOCK_N=64, BLOCK_K=32)],
    (2, True): [config(8, 4, BLOCK_N=64, BLOCK_K=64), config(8, 4, BLOCK_N=32, BLOCK_K=64)],
    (4, False): [config(8, 3, BLOCK_N=64, BLOCK_K=16), config(8, 3, BLOCK_N=32, BLOCK_K=16)],
    (4, True): [config(8, 3, BLOCK_N=64, BLOCK_K=16), config(8, 3, BLOCK_N=32, BLOCK_K=16)],
}
_KEY = ["tuning_M", "F", "D", "ACTIVATION"]
TUNED = {
    row: tuned(gelu_mlp_fwd_kernel, configs, _KEY, {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32})
    for row, configs in CONFIGS.items()
}
TUNED_BWD = {
    row: tuned(gelu_mlp_bwd_kernel, configs, _KEY, {"BLOCK_N": 32, "BLOCK_K": 32})
    for row, configs in BWD_CONFIGS.items()
}


def gelu_mlp_linear_fwd_triton(x2d, w1, b1, activation, pre, act):
    """Fills act (M, F) and, unless it is None, pre; both contiguous.

    x2d (M, D) and w1 (F, D), for "swiglu" (2 F, D) with the gate's rows first, of any strides; b1 like w1's rows, or
    None. One dtype: fp32, bf16 or fp16. The caller vouches for shapes, dtypes and devices.
    """
    M, F = act.shape
    D = x2d.shape[1]
    if act.numel() == 0:
        return
    with on_device_of(x2d):
        TUNED[x2d.element_size(), activation == "swiglu"][_grid(M, F)](
            x2d, w1, b1, pre, act, M, F, D, *x2d.stride(), *w1.stride(), bucket(M),
            ACTIVATION=ACTIVATIONS[activation], EVEN_K=D % 64 == 0,
        )  # fmt: skip


def gelu_mlp_linear_bwd_triton(dy2d, w2, pre, activation, dpre, act, db1):
    """Fills dpre like pre, act (M, F) and, unless it is None, db1 like pre's columns; dy2d (M, D), w2 (D, F)."""
    M, F = act.shape
    D, width = dy2d.shape[1], pre.shape[1]
    tiles = triton.cdiv(M, BWD_ROWS)
    partial = None if db1 is None else torch.empty((tiles, width), dtype=torch.float32, device=pre.device)
    with on_device_of(dy2d):
        if act.numel():
            TUNED_BWD[dy2d.element_size(), activation == "swiglu"][_grid(M, F)](
                dy2d, w2, pre, dpre, act, partial, M, F, D, *dy2d.stride(), *w2.stride(), bucket(M),
                ACTIVATION=ACTIVATIONS[activation], EVEN_K=D % 64 == 0, BLOCK_M=BWD_ROWS,
            )  # fmt: skip
        if db1 is not None and db1.numel():
            gelu_mlp_bias_kernel[triton.cdiv(width, 64),](partial, db1, tiles, width, BLOCK_M=8, BLOCK_N=64)


def _grid(M, F):
    return lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(F, meta["BLOCK_N"]),)
