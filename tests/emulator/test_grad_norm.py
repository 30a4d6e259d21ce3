"""The CUDA kernels of grad_norm give the CPU kernel's bits."""

import math

import pytest
import torch

from cgpt_ext import grad_norm
from emulator import emulated
from numerics import DTYPES
from test_grad_norm import make, truth  # tests/ops/test_grad_norm.py


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
