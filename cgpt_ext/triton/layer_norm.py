"""LayerNorm in Triton, with an optional residual add in front.

    h = x + residual            rounded to the working dtype: what the next block reads
    y = (h - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps)

    xhat = (h - mean) rstd,  g = dout weight
    dx = rstd (g - mean(g) - xhat mean(g xhat)) + dh
    dweight = sum over rows of dout xhat,  dbias = sum over rows of dout

x, residual, h, y (rows, D), weight and bias (D), mean and rstd (rows,). Up to WIDE columns a program holds ROWS whole
rows in registers, so everything is read once; the backward pass runs PROGRAMS programs over the rows, each keeping its
dweight and dbias in registers, and a second kernel adds up theirs in order. Wider rows are read once a pass.
"""

import torch
import triton.language as tl

import triton
from cgpt_ext.triton._jit import bucket, config, narrow, on_device_of, tuned

WIDE = 8192
WIDE_TILE = 4096
PROGRAMS = 264  # two for each of an H100's multiprocessors; fixed, so that the bits do not depend on the device


@triton.jit
def _load(x_ptr, residual_ptr, at, mask):
    """h in fp32, as it is rounded."""
    h = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    if residual_ptr is not None:
        h = narrow(h + tl.load(residual_ptr + at, mask, 0.0).to(tl.float32), x_ptr.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _scaled(xhat, weight_ptr, bias_ptr, cols, inside):
    y = xhat * tl.load(weight_ptr + cols, inside, 0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, inside, 0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["rows", "tuning_D"])
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, rows, D, eps, tuning_D,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * D + cols[None, :]
    h = _load(x_ptr, residual_ptr, at, mask)
    if h_ptr is not None:
        tl.store(h_ptr + at, narrow(h, dtype), mask)
    first = tl.sum(h, 1) / D
    centred = tl.where(mask, h - first[:, None], 0.0)
    # What rounding left in the mean of a large offset is the mean of the centred row.
    rest = tl.sum(centred, 1) / D
    centred = tl.where(mask, centred - rest[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, first + rest, row < rows)
        tl.store(rstd_ptr + row, rstd, row < rows)
    y = _scaled(centred * rstd[:, None], weight_ptr, bias_ptr, cols[None, :], inside[None, :])
    tl.store(y_ptr + at, narrow(y, dtype), mask)


@triton.jit
def layer_norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, D, eps, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row a program, in tiles: the mean, then the variance, then y."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        h = _load(x_ptr, residual_ptr, row * D + cols, cols < D)
        if h_ptr is not None:
            tl.store(h_ptr + row * D + cols, narrow(h, dtype), cols < D)
        total += h
    first = tl.sum(total, 0) / D
    total = tl.zeros((BLOCK_D,), tl.float32)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        centred = tl.where(cols < D, _load(x_ptr, residual_ptr, row * D + cols, cols < D) - first, 0.0)
        total += centred
        squares += centred * centred
    rest = tl.sum(total, 0) / D
    variance = tl.sum(squares, 0) / D - rest * rest
    variance = tl.where(variance < 0.0, 0.0, variance)  # where, not max: NaN stays
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, first + rest)
        tl.store(rstd_ptr + row, rstd)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        centred = _load(x_ptr, residual_ptr, row * D + cols, cols < D) - first - rest
        y = _scaled(centred * rstd, weight_ptr, bias_ptr, cols, cols < D)
        tl.store(y_ptr + row * D + cols, narrow(y, dtype), cols < D)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "tuning_D"])
def layer_norm_bwd_kernel(
    dout_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, rows, rows_per_program, D, tuning_D,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx; partial (PROGRAMS, 2, D) fp32 gets each program's sums for dweight and dbias."""
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    weight = tl.load(weight_ptr + cols, inside, 0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for step in tl.range(0, rows_per_program, ROWS):
        row = begin + step + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & inside[None, :]
        at = row[:, None] * D + cols[None, :]
        dout = tl.load(dout_ptr + at, mask, 0.0).to(tl.float32)
        h = tl.load(h_ptr + at, mask, 0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, row < end, 0.0)
        rstd = tl.load(rstd_ptr + row, row < end, 0.0)
        xhat = tl.where(mask, (h - mean[:, None]) * rstd[:, None], 0.0)
        g = dout * weight[None, :]
        mean_g = tl.sum(g, 1) / D
        mean_gx = tl.sum(g * xhat, 1) / D
        dx = rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at, mask, 0.0).to(tl.float32)
        tl.store(dx_ptr + at, narrow(dx, dx_ptr.dtype.element_ty), mask)
        dweight += tl.sum(dout * xhat, 0)
        dbias += tl.sum(dout, 0)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    tl.store(partial_ptr + cols, dweight, inside)
    tl.store(partial_ptr + D + cols, dbias, inside)


@triton.jit
def layer_norm_dx_wide_kernel(
    dout_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row a program, in tiles: the two means, then dx."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sum_g = tl.zeros((BLOCK_D,), tl.float32)
    sum_gx = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        at = row * D + cols
        g = tl.load(dout_ptr + at, cols < D, 0.0).to(tl.float32) * tl.load(weight_ptr + cols, cols < D, 0.0)
        sum_g += g
        sum_gx += tl.where(cols < D, g * (tl.load(h_ptr + at, cols < D, 0.0).to(tl.float32) - mean) * rstd, 0.0)
    mean_g = tl.sum(sum_g, 0) / D
    mean_gx = tl.sum(sum_gx, 0) / D
    for start in tl.range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        at = row * D + cols
        g = tl.load(dout_ptr + at, cols < D, 0.0).to(tl.float32) * tl.load(weight_ptr + cols, cols < D, 0.0)
        xhat = (tl.load(h_ptr + at, cols < D, 0.0).to(tl.float32) - mean) * rstd
        dx = rstd * (g - mean_g - xhat * mean_gx)
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at, cols < D, 0.0).to(tl.float32)
        tl.store(dx_ptr + at, narrow(dx, dx_ptr.dtype.element_ty), cols < D)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def layer_norm_partial_wide_kernel(
    dout_ptr, h_ptr, mean_ptr, rstd_ptr, partial_ptr, rows, rows_per_program, D, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Program (p, t): the sums of its rows over column tile t, to partial (programs, 2, D)."""
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * rows_per_program
    for row in tl.range(begin, tl.minimum(begin + rows_per_program, rows)):
        at = row * D + cols
        dout = tl.load(dout_ptr + at, inside, 0.0).to(tl.float32)
        h = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
        dweight += dout * ((h - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row))
        dbias += dout
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    tl.store(partial_ptr + cols, dweight, inside)
    tl.store(partial_ptr + D + cols, dbias, inside)


@triton.jit(do_not_specialize=["programs"])
def layer_norm_sum_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, programs, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """dweight and dbias from partial (programs, 2, D), in the order of the programs."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in tl.range(0, programs, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        mask = (program < programs)[:, None] & (cols < D)[None, :]
        at = program.to(tl.int64)[:, None] * 2 * D + cols[None, :]
        dweight += tl.load(partial_ptr + at, mask, 0.0)
        dbias += tl.load(partial_ptr + D + at, mask, 0.0)
    dtype: tl.constexpr = dweight_ptr.dtype.element_ty
    tl.store(dweight_ptr + cols, narrow(tl.sum(dweight, 0), dtype), cols < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cols, narrow(tl.sum(dbias, 0), dtype), cols < D)


# largest D -> rows a program and warps to choose from; BLOCK_D is D up to the next power of two
CONFIGS = {
    1024: [config(1, ROWS=1), config(4, ROWS=4), config(2, ROWS=1), config(4, ROWS=1)],
    2048: [config(4, ROWS=1), config(2, ROWS=1), config(8, ROWS=4)],
    4096: [config(8, ROWS=1), config(16, ROWS=1)],
    8192: [config(8, ROWS=1), config(4, ROWS=1)],
}
BWD_CONFIGS = {
    1024: [config(4, ROWS=4), config(4, ROWS=1), config(2, ROWS=1), config(8, ROWS=4)],
    2048: [config(4, ROWS=1), config(8, ROWS=1), config(8, ROWS=2)],
    4096: [config(8, ROWS=1), config(4, ROWS=1)],
    8192: [config(8, ROWS=1)],
}
TUNED = {D: tuned(layer_norm_fwd_kernel, configs, ["tuning_D"], {"ROWS": 4}) for D, configs in CONFIGS.items()}
TUNED_BWD = {D: tuned(layer_norm_bwd_kernel, configs, ["tuning_D"], {"ROWS": 4}) for D, configs in BWD_CONFIGS.items()}


def layer_norm_fwd_triton(x, residual, weight, bias, eps, y, h, mean, rstd):
    """Fills y, with `residual` h, and mean and rstd (rows,) fp32 unless they are None.

    x, residual, y, h (..., D) contiguous; weight and bias (D,) in x's dtype or fp32; residual and bias may be None.
    The caller vouches for shapes, dtypes, layouts and devices.
    """
    D = x.shape[-1] if x.dim() else 0
    if x.numel() == 0:
        return
    rows = x.numel() // D
    arguments = (x, residual, weight, bias, y, h if residual is not None else None, mean, rstd)
    with on_device_of(x):
        if D > WIDE:
            layer_norm_fwd_wide_kernel[rows,](*arguments, D, eps, BLOCK_D=WIDE_TILE, num_warps=8)
        else:
            TUNED[_row(D)][lambda meta: (triton.cdiv(rows, meta["ROWS"]),)](
                *arguments, rows, D, eps, bucket(D), BLOCK_D=bucket(D)
            )


def layer_norm_bwd_triton(dout, dh, h, weight, mean, rstd, dx, dweight, dbias):
    """Fills dx, dweight and, unless it is None, dbias; dh, the gradient that reached h itself, may be None."""
    D = weight.shape[0]
    if D == 0:
        return
    rows = h.numel() // D
    programs = min(PROGRAMS, rows)
    per_program = triton.cdiv(rows, max(programs, 1))
    partial = torch.empty((programs, 2, D), dtype=torch.float32, device=h.device)
    with on_device_of(h):
        if rows and D > WIDE:
            layer_norm_dx_wide_kernel[rows,](
                dout, dh, h, weight, mean, rstd, dx, D, BLOCK_D=WIDE_TILE, num_warps=8
            )  # fmt: skip
            layer_norm_partial_wide_kernel[programs, triton.cdiv(D, WIDE_TILE)](
                dout, h, mean, rstd, partial, rows, per_program, D, BLOCK_D=WIDE_TILE, num_warps=8
            )
        elif rows:
            TUNED_BWD[_row(D)][programs,](
                dout, dh, h, weight, mean, rstd, dx, partial, rows, per_program, D, bucket(D), BLOCK_D=bucket(D)
            )
        layer_norm_sum_kernel[triton.cdiv(D, 64),](partial, dweight, dbias, programs, D, BLOCK_P=8, BLOCK_D=64)


def _row(D):
    return next(largest for largest in CONFIGS if largest >= D)
