"""The CUDA kernel of adamw gives the reference's bits, in any order of its blocks and threads."""

import math

import pytest
import torch

from cgpt_ext import adamw_ref
from emulator import emulated
from numerics import DTYPES
from test_adamw import State, same_bits, twin  # tests/ops/test_adamw.py

SHAPES = [(1,), (7,), (127, 3), (2, 3, 64), (16385,)]  # the last is one past a chunk


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, "master"),
        (torch.float16, "master"),
        (torch.bfloat16, "split"),
    ],
)
def test_bits_are_the_references(dtype, kept, grad_dtype):
    want = twin(SHAPES, dtype, kept, grad_dtype).step(adamw_ref)
    for seed in range(2):
        got = twin(SHAPES, dtype, kept, grad_dtype)
        with emulated(seed):
            got.step()
        assert same_bits(got.tensors(), want.tensors())


@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_stochastic_rounding_has_the_references_bits(grad_dtype):
    args, seed = (SHAPES, torch.bfloat16, None, grad_dtype), {"stochastic_rounding_seed": 2**62 + 1}
    want = twin(*args).step(adamw_ref, **seed)
    for order in range(2):
        got = twin(*args)
        with emulated(order):
            got.step(stochastic_rounding_seed=torch.tensor(2**62 + 1))
        assert same_bits(got.tensors(), want.tensors())


def test_more_tensors_than_one_launch_takes():
    shapes = [(3,)] * 450
    with emulated():
        got = twin(shapes).step(steps=1)
    assert same_bits(got.tensors(), twin(shapes).step(adamw_ref, steps=1).tensors())


def test_scalars_from_tensors():
    scalars = {"lr": torch.tensor(2e-3, dtype=torch.float64), "grad_scale": torch.tensor(0.25)}
    with emulated():
        got = twin(SHAPES).step(**scalars)
    assert same_bits(got.tensors(), twin(SHAPES).step(adamw_ref, **scalars).tensors())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradients_come_out(bad):
    with emulated():
        state = twin([(40,)])
        state.grads[0][7] = bad
        state.step(steps=1)
    assert not state.params[0][7].isfinite()
    assert state.params[0].isfinite().sum() == 39


def test_unaligned_tensors():
    def state():
        torch.manual_seed(3)
        s = State([(1001,)])
        for tensors in (s.params, s.grads, s.exp_avgs, s.exp_avg_sqs):
            tensors[0] = torch.cat([torch.zeros(1), tensors[0]])[1:]  # four bytes past a multiple of 16
        return s

    with emulated():
        got = state().step()
    assert same_bits(got.tensors(), state().step(adamw_ref).tensors())


def test_half_moments_are_for_the_cpu():
    state = State([(4,)], torch.bfloat16, "split", state_dtype=torch.bfloat16)
    with emulated(), pytest.raises(TypeError, match=r"exp_avgs\[0\] must be float32 on cuda, got bfloat16"):
        state.step(stochastic_rounding_seed=1)
