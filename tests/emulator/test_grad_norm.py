"""The CUDA kernels of grad_norm give the CPU kernel's bits."""

import math

import pytest
import torch

from cgpt_ext import grad_norm, grad_square_sums
from cgpt_ext.ops.grad_norm import grad_square_sums_ref
from emulator import emulated
from numerics import DTYPES
from test_grad_norm import make, mixed, truth  # tests/ops/test_grad_norm.py


def emulated_norm(grads, seed=0):
    with emulated(seed):
        return grad_norm(grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_the_cpus(dtype):
    grads = make(dtype)
    assert emulated_norm(grads).item() == pytest.approx(truth(grads).item(), rel=1e-7)
    for seed in range(2):
        assert torch.equal(emulated_norm(grads, seed), grad_norm(grads))


def test_mixed_dtypes_and_more_chunks_than_running_sums():
    grads = [torch.randn(70001), torch.randn(33).bfloat16(), torch.randn(40, 6)[::3, 1:4], torch.randn(8, 5).half().t()]
    grads += [torch.randn(3) for _ in range(300)]
    assert torch.equal(emulated_norm(grads), grad_norm(grads))


def test_more_tensors_than_one_launch_takes():
    grads = [torch.randn(2) for _ in range(1003)]
    assert torch.equal(emulated_norm(grads), grad_norm(grads))


def test_range_and_non_finite():
    assert emulated_norm([torch.full((100,), 1e30)]).item() == pytest.approx(1e31)
    assert emulated_norm([torch.full((100,), 1e-30)]).item() == pytest.approx(1e-29)
    assert emulated_norm([torch.full((100,), 3e38)]).isinf()
    assert emulated_norm([torch.tensor([1.0, math.nan])]).isnan()
    assert emulated_norm([torch.tensor([1.0, -math.inf])]).item() == math.inf
    assert emulated_norm([torch.empty(0, 3)]).item() == 0
    assert emulated_norm([torch.empty(0, 3), torch.ones(4)]).item() == 2


@pytest.mark.parametrize("chunk", [1, 31, 32, 1024, 1 << 30])
def test_square_sums_are_the_cpus(chunk):
    grads = [torch.randn(5), *mixed()[1:]] if chunk == 1 else mixed()
    for seed in range(2):
        with emulated(seed):
            sums = grad_square_sums(grads, chunk)
        assert torch.equal(sums, grad_square_sums(grads, chunk))
        assert torch.equal(sums, grad_square_sums_ref(grads, chunk))


@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sums_of_pieces_are_the_whole_tensors(dtype):
    """On the device or the CPU, whoever holds them."""
    whole = torch.randn(9001).to(dtype)
    pieces = whole.split([1024, 4096, 9001 - 5120])
    want = grad_square_sums([whole])
    with emulated():
        assert torch.equal(grad_square_sums([whole]), want)
        assert torch.equal(grad_square_sums(pieces), want)
        assert torch.equal(grad_square_sums([torch.cat([piece[:1], piece])[1:] for piece in pieces]), want)


def test_square_sums_of_more_tensors_than_one_launch_takes():
    grads = [torch.randn(1 + i % 70) for i in range(1003)]
    with emulated():
        sums = grad_square_sums(grads, 32)
    assert torch.equal(sums, grad_square_sums(grads, 32))


def test_square_sums_of_nothing():
    with emulated():
        assert grad_square_sums([torch.empty(0), torch.empty(3, 0)]).shape == (0,)
        assert grad_square_sums([torch.empty(0), torch.ones(4)]).tolist() == [4]
