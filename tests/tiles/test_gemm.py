"""csrc/cpu/gemm.h on AMX's tiles, against exact sums and against the processor's own order of additions."""

import numpy as np
import pytest
import torch

from tiles import DEFECTS, gemm

ROWS, VECS, DEPTH, SIDE = range(4)


def whole(n, step):
    return -(-n // step) * step


def pairs(x):
    """(m, 2 k) fp32 values that bf16 holds, as (m, k) elements, the first of a pair in the lower half."""
    bits = x.astype(np.float32).view(np.uint32) >> 16
    return np.ascontiguousarray(bits[:, ::2] | bits[:, 1::2] << 16)


def small(generator, *shape):
    return generator.integers(-8, 9, shape).astype(np.float32)


def product(library, a, b, k0, k1, add=0.0, c=None, n=None):
    """c * add + a b over elements [k0, k1): a (rows, 2 k), b (2 k, n); memory beyond what may be read is NaN."""
    rows, columns = a.shape[0], b.shape[1] if n is None else n
    depth, side = library.constant(DEPTH), library.constant(SIDE)
    lda, ldb, ldc = a.shape[1] // 2 + 3, whole(b.shape[1], side) + 16, whole(columns, side) + 16
    first, last = k0 // depth * depth, whole(k1, depth)
    left = np.full((whole(rows, side), lda), 0x7FC07FC0, np.uint32)
    left[:rows, : a.shape[1] // 2] = pairs(a)
    right = np.full((b.shape[0] // 2, ldb), 0x7FC07FC0, np.uint32)
    right[:, : whole(b.shape[1], side)] = 0
    right[:, : b.shape[1]] = pairs(np.ascontiguousarray(b.T)).T
    for k in (*range(first, k0), *range(k1, last)):  # what a whole tile reads more
        left[:rows, k] = right[k] = 0
    out = np.full((rows + 1, ldc), 7.0, np.float32)
    if c is not None:
        out[:rows, :columns] = c
    error = library.product(
        rows, columns, k0, k1, left.ctypes.data, lda, right.ctypes.data, ldb, add, out.ctypes.data, ldc
    )
    if error:
        raise RuntimeError(error.decode())
    assert (out[rows:] == 7).all(), "a row beyond the last was written"
    assert (out[:, whole(columns, side) :] == 7).all(), "a vector beyond the last was written"
    return out[:rows, :columns]


def check_small_integers(library, rows, n, k0, k1):
    """Sums of small integers are exact whatever their order."""
    generator = np.random.default_rng(rows + 7 * n + k0 + k1)
    k = whole(k1, 16)
    a, b, c = small(generator, rows, 2 * k), small(generator, 2 * k, n), small(generator, rows, n)
    got = product(library, a, b, k0, k1, 3.0, c)
    assert np.array_equal(got, 3 * c + a[:, 2 * k0 : 2 * k1] @ b[2 * k0 : 2 * k1])


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 48, 95, 96])
@pytest.mark.parametrize("n", [1, 16, 17, 40, 64, 80])
@pytest.mark.parametrize("span", [(0, 16), (0, 1), (0, 48), (5, 37), (17, 31), (16, 40)], ids=str)
def test_small_integers(rows, n, span):
    check_small_integers(gemm(), rows, n, *span)


@pytest.mark.parametrize("span", [(0, 0), (20, 20)], ids=str)
def test_a_sum_over_nothing_is_what_there_was(span):
    generator = np.random.default_rng(0)
    a, b, c = small(generator, 20, 64), small(generator, 64, 20), small(generator, 20, 20)
    assert np.array_equal(product(gemm(), a, b, *span, 1.0, c), c)


def in_tiles_order(a, b):
    """a b as TDPBF16PS adds it up; a product of two bf16 is exact in fp32, so that fused or not is the same."""
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for k in range(0, a.shape[1], 32):
        even, odd = np.zeros_like(total), np.zeros_like(total)
        for i in range(k, k + 32, 2):
            even += a[:, i, None] * b[None, i]
            odd += a[:, i + 1, None] * b[None, i + 1]
        total += even + odd
    return total


@pytest.mark.parametrize("rows", [7, 16, 40])
def test_bits_are_the_processors(rows):
    a, b = (torch.randn(*shape).bfloat16().float().numpy() for shape in [(rows, 96), (96, 48)])
    got = product(gemm(), a, b, 0, 48)
    assert np.array_equal(got.view(np.uint32), in_tiles_order(a, b).view(np.uint32))
    assert not np.array_equal(got, a @ b)  # or this would not tell orders apart


def test_denormals_are_zero():
    a, b = np.zeros((3, 32), np.float32), np.zeros((32, 1), np.float32)
    a[0, 0], b[0, 0] = 2.0**-130, 2.0**100  # a denormal going in
    a[1, 1], b[1, 0] = 2.0**-70, 2.0**-60  # and one coming out
    a[2, 2], b[2, 0] = 2.0**-60, 2.0**-60
    assert product(gemm(), a, b, 0, 16)[:, 0].tolist() == [0, 0, 2.0**-120]


def whole_tile(library, elements, held=True, exact=True):
    """Runs one whole tile on packed operands as a blocked product has them, checks it, returns the error."""
    rows, columns = library.constant(ROWS), library.constant(VECS) * 16
    assert elements % library.constant(DEPTH) == 0
    generator = np.random.default_rng(elements)
    a, b = small(generator, rows, 2 * elements), small(generator, 2 * elements, columns)
    left, right = pairs(a), np.ascontiguousarray(pairs(np.ascontiguousarray(b.T)).T)
    out = np.zeros((rows, columns), np.float32)
    error = library.whole_tile(elements, left.ctypes.data, elements, right.ctypes.data, held, out.ctypes.data)
    assert error is not None or np.array_equal(out, a @ b)
    return error


@pytest.mark.parametrize("elements", [16, 64, 2048])
def test_packed_operands(elements):
    assert whole_tile(gemm(), elements) is None
    assert not gemm().configured()


def test_tiles_that_nobody_holds():
    assert whole_tile(gemm(), 16, held=False) == b"tiles: used where none are configured"


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_mistake_is_noticed(defect):
    library = gemm(defect)
    try:
        check_small_integers(library, 33, 40, 5, 37)
    except (AssertionError, RuntimeError):
        return
    assert library.configured(), "nothing was noticed"
