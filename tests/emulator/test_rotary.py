"""The CUDA kernel of rotary, values and gradients, in both pairings."""

import pytest
import torch

from cgpt_ext import rotary
from emulator import emulated
from numerics import DTYPES, run
from test_rotary import SHAPES, angles, check  # tests/ops/test_rotary.py


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rotated"), [*SHAPES, ((1, 1, 20, 128), 128)])
def test_values_and_gradients(shape, rotated, dtype, interleaved):
    x, dout = (torch.randn(shape).to(dtype) for _ in range(2))
    with emulated():
        check(x, *angles(shape[1], rotated), interleaved, dout)


@pytest.mark.parametrize("interleaved", [False, True])
def test_views_of_a_packed_projection(interleaved):
    packed = torch.randn(2, 5, 3, 4, 32).bfloat16()
    cos, sin = angles(5, 32)
    for x in (*packed.unbind(2), packed[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2)):
        results = []
        for seed in range(2):
            with emulated(seed):
                results.append(rotary(x, cos, sin, interleaved))
        assert torch.equal(*results)
        with emulated():
            assert torch.equal(results[0], rotary(x.contiguous(), cos, sin, interleaved))


def test_empty_and_non_finite():
    cos, sin = angles(3, 8)
    x = torch.randn(1, 3, 2, 8)
    x[0, 1, 1, 2] = float("nan")
    with emulated():
        assert rotary(x[:0], cos, sin).shape == (0, 3, 2, 8)
        out, dx = run(lambda x: rotary(x, cos, sin), x, dout=x)
    for result in (out, dx):
        assert result.isnan().nonzero().tolist() == [[0, 1, 1, 2], [0, 1, 1, 6]]
