"""csrc/cpu/matmul.h on AMX's tiles: sums of small integers are exact whatever their order."""

import pytest
import torch

from tiles import native

# m, n, k. Tiles are 32 rows by 32 columns, steps 32 values, parts of the sum thousands of them.
SHAPES = [(1, 1, 1), (31, 40, 33), (32, 32, 32), (33, 17, 64), (150, 200, 96), (5, 70, 9000), (600, 33, 130)]


def operand(lines, k, along):
    x = torch.randint(-8, 9, (lines, k) if along else (k, lines)).bfloat16()
    return x if along else x.T


@pytest.mark.parametrize("along", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_small_integers(shape, along, threads):
    m, n, k = shape
    native().poison_scratch(1 << 20)
    a, b, out = operand(m, k, along[0]), operand(n, k, along[1]), torch.empty(m, n)
    torch.set_num_threads(threads)
    before = native().products()
    native().matmul(a, b, out)
    assert torch.equal(out, a.float() @ b.float().T)
    assert not native().configured()
    if threads == 1:
        assert native().products() - before >= -(-m // 32) * -(-n // 16) * -(-k // 32) * 2
