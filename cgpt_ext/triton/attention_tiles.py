"""What attention's forward and backward kernels share: a sequence's rows, a tile of them, and which tiles meet.

A head dim D is held as D0 columns and, where that is less waste than the next power of two, D1 more: 80 = 64 + 16,
96 = 64 + 32, 192 = 128 + 64. Columns past D read as zeros.
"""

import torch
import triton.language as tl

import triton
from cgpt_ext.triton._jit import tuned

HEAD_DIMS = (64, 128, 192, 256)
ARCHS = (80, 90)
NEVER = 1000


@triton.jit
def sequence(cu_seqlens_ptr, b, longest):
    """First row and length of sequence b; the length is held within `longest`, which sized the grid."""
    if cu_seqlens_ptr is None:
        start = tl.full((), 0, tl.int64)
        length = longest
    else:
        start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + b + 1) - start.to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), longest)
    return start, length


@triton.jit
def segments(first, last, shift, left, right, limit, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first..last meet columns row + shift - left to row + shift + right, within [0, limit).

    Returns lo, full_lo, full_hi, hi: every pair of a tile in [full_lo, full_hi) meets, those of [lo, full_lo) and
    [full_hi, hi) need the mask. lo, and full_lo and full_hi where there is such a tile, are multiples of BLOCK.
    """
    lo = 0
    hi = limit
    full_lo = 0
    full_hi = limit
    if LEFT:
        lo = tl.maximum(first + shift - left, 0)
        full_lo = tl.maximum(last + shift - left, 0)
    if RIGHT:
        hi = tl.maximum(tl.minimum(last + shift + right + 1, limit), 0)
        full_hi = tl.maximum(tl.minimum(first + shift + right + 1, limit), 0)
    lo = lo // BLOCK * BLOCK
    full_lo = tl.minimum((full_lo + BLOCK - 1) // BLOCK * BLOCK, hi)
    full_hi = tl.maximum(full_hi // BLOCK * BLOCK, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def meets(rows, cols, shift, left, right, limit, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The mask of a tile: rows (M, 1) against cols (1, N), or the other way round."""
    seen = cols < limit
    if LEFT:
        seen = seen & (cols >= rows + shift - left)
    if RIGHT:
        seen = seen & (cols <= rows + shift + right)
    return seen


@triton.jit
def load_tile(ptr, rows, stride, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of `rows`; zeros past D, and past `limit` rows where MASK."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if FIRST + WIDTH > D:
        if MASK:
            return tl.load(at, mask=(rows < limit)[:, None] & (cols < D)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(cols < D)[None, :], other=0.0)
    elif MASK:
        return tl.load(at, mask=(rows < limit)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_tile(ptr, rows, stride, limit, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    at = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if FIRST + WIDTH > D:
        tl.store(at, x, mask=(rows < limit)[:, None] & (cols < D)[None, :])
    else:
        tl.store(at, x, mask=(rows < limit)[:, None])


def split_head_dim(D: int) -> tuple[int, int]:
    """(D0, D1), powers of two of at least 16 (D1 may be 0) that hold D columns."""
    whole = max(16, triton.next_power_of_2(D))
    low = whole // 2
    rest = max(16, triton.next_power_of_2(D - low)) if low < D else 0
    return (low, rest) if low >= 16 and low + rest < whole else (whole, 0)


def choices(table, D: int, itemsize: int, full: bool, arch: int) -> list:
    """The configs of `table` for head dims up to D; `full` where there is more than a causal mask, and arch 80 or 90.

    A row of a table is (bytes an element, largest head dim, the least arch with a causal mask or none, the least arch
    with everything, config): below that arch the compiler runs out of registers and the config is left out.
    """
    return [row[4] for row in table if row[:2] == (itemsize, D) and arch >= row[3 if full else 2]]


def tuned_for(kernel, table) -> dict:
    """(itemsize, largest head dim, full, arch) -> `kernel` tuned over what `table` has for them."""
    return {
        (itemsize, D, full, arch): tuned(
            kernel,
            choices(table, D, itemsize, full, arch),
            ["tuning_T", "D", "LEFT", "RIGHT"],
            {"BLOCK_M": 32, "BLOCK_N": 32},
        )
        for itemsize in (2, 4)
        for D in HEAD_DIMS
        for full in (False, True)
        for arch in ARCHS
    }


def row_of(x: torch.Tensor, full: bool) -> tuple[int, int, bool, int]:
    """The key of `tuned_for`'s dict that serves x (..., D). Past Hopper sm_120 again has sm_80's instructions."""
    D = next(most for most in HEAD_DIMS if x.shape[-1] <= most)
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    return x.element_size(), D, full, 90 if hopper else 80
