"""The CUDA kernels of layer_norm, values and gradients: a warp a row, a block a row, and rows of which a part is read
again; the sums over the rows fused and, past 8,192 columns, by a kernel of their own."""

import pytest
import torch

from cgpt_ext import _native, layer_norm, layer_norm_ref
from emulator import emulated
from numerics import DTYPES, assert_as_good_as_torch, compare, run
from test_layer_norm import make, torch_layer_norm  # tests/ops/test_layer_norm.py

SHAPES = [(1, 1), (3, 5), (11, 127), (9, 520), (7, 1024), (3, 1090), (5, 4136), (2, 8193)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    x, residual, weight, bias, dy, dh = make(shape, dtype)
    with emulated():
        compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, bias, 1e-5, residual), (dy, dh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 520), (3, 1090), (5, 4136), (2, 8200)])
def test_fp32_weights(shape, dtype):
    x, _, weight, bias, dy, _ = make(shape, dtype, torch.float32)
    with emulated():
        compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, bias), dy)


@pytest.mark.parametrize("shape", [(64, 40), (3, 1090), (2, 8200)])
def test_bits_do_not_depend_on_the_order_of_threads(shape):
    x, _, weight, bias, dy, _ = make(shape, torch.bfloat16, torch.float32)
    results = []
    for seed in range(2):
        with emulated(seed):
            results.append(run(layer_norm, x, weight, bias, dout=dy))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    with emulated():
        compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, bias), dy)


def test_a_row_longer_than_the_registers_hold():
    x, residual, weight, bias, _, _ = make((1, 16500), torch.bfloat16)
    with emulated():
        y, h = layer_norm(x, weight, bias, 1e-5, residual)
    assert torch.equal(h, x + residual)
    wide = (t.double() for t in (h, weight, bias))
    assert_as_good_as_torch(y, layer_norm_ref(*wide), torch_layer_norm(h, weight, bias))


def test_without_bias_and_without_rows():
    x, _, weight, _, dy, _ = make((9, 96), torch.float32)
    with emulated():
        compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, None), dy)
        out = run(layer_norm, x[:0], weight, weight, dout=dy[:0])
    assert out[0].shape == (0, 96)
    assert all(torch.equal(grad, torch.zeros(96)) for grad in out[2:])


def test_large_mean_keeps_its_variance():
    x, _, weight, bias, dy, _ = make((4, 512), torch.float32)
    with emulated():
        compare(layer_norm, layer_norm_ref, torch_layer_norm, (x + 30.0, weight, bias), dy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_comes_out(bad):
    x, _, weight, bias, dy, _ = make((3, 64), torch.float32)
    x[1, 7] = bad
    with emulated():
        y, dx, *_ = run(layer_norm, x, weight, bias, dout=dy)
    for result in (y, dx):
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


def test_addresses_of_no_alignment():
    def shifted(t):
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)

    x, residual, weight, bias, dy, dh = make((5, 72), torch.bfloat16)
    with emulated():
        want = run(layer_norm, x, weight, bias, 1e-5, residual, dout=(dy, dh))
        leaves = [shifted(t).requires_grad_() for t in (x, weight, bias, residual)]
        y, h = layer_norm(*leaves[:3], 1e-5, leaves[3])
        grads = torch.autograd.grad((y, h), leaves, (shifted(dy), shifted(dh)))
    assert all(torch.equal(a, b) for a, b in zip(want, (y, h, *grads), strict=True))


def test_the_cpus_border_asks_for_no_workspace():
    assert _native.layer_norm_workspace(torch.randn(4, 8)) == 0
