"""The CUDA kernel of adamw gives the reference's bits, in any order of its blocks and threads."""

import math

import pytest
import torch

from cgpt_ext import adamw_, adamw_ref
from emulator import emulated
from numerics import DTYPES
from test_adamw import HYPER, same_bits, twin  # tests/ops/test_adamw.py
from test_adamw_stochastic import FIRSTS, HALF, KINDS, RANDOM, in_pieces, places_of, same_elements

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


@pytest.mark.parametrize("first", FIRSTS[:4])
@pytest.mark.parametrize(("kind", "half"), RANDOM)
def test_pieces_are_rounded_as_the_whole(kind, half, first):
    """On a device or on the CPU, whoever holds them."""
    sizes = [2048, 3072, 1027]

    def state():
        return twin([(sum(sizes),)], *KINDS[kind], **half)

    options = {"stochastic_rounding_seed": 2**62 + 7, "steps": 1}
    want = state().step(adamw_ref, **options, rounding_places=[(7, first)])
    with emulated():
        whole = state().step(**options, rounding_places=[(7, first)])
        pieces = in_pieces(state(), sizes).step(**options, rounding_places=places_of(7, first, sizes))
    assert same_bits(whole.tensors(), want.tensors())
    assert same_elements(pieces, want)


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


@pytest.mark.parametrize("half", [False, True], ids=["fp32-moments", "bf16-moments"])
@pytest.mark.parametrize("kind", ["fp32", "bf16-master", "split"])
def test_unaligned_tensors(kind, half):
    """One element past a multiple of 16 bytes: one of the lists alone, and all of them."""
    options = {"stochastic_rounding_seed": 9} if half else {}
    lists = ["params", "grads", "exp_avgs", "exp_avg_sqs", "masters", "lows"]

    def state(moved):
        s = twin([(1001,)], *KINDS[kind], **(HALF if half else {}))
        for tensors in (getattr(s, name) for name in moved):
            if tensors:
                tensors[0] = torch.cat([tensors[0][:1], tensors[0]])[1:]
                assert tensors[0].data_ptr() % 16 == tensors[0].element_size()
        return s

    want = state([]).step(adamw_ref, steps=2, **options).tensors()
    for moved in (lists, *([name] for name in lists)):
        with emulated():
            got = state(moved).step(steps=2, **options)
        assert same_bits(got.tensors(), want), moved


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_moments_have_the_references_bits(kind, grad_dtype):
    for order, seed in enumerate((0, -1, 2**62 + 7)):
        args, options = (SHAPES, *KINDS[kind], grad_dtype), {"stochastic_rounding_seed": seed}
        want = twin(*args, **HALF).step(adamw_ref, **options)
        got = twin(*args, **HALF)
        with emulated(order):
            got.step(stochastic_rounding_seed=torch.tensor(seed) if order else seed)
        assert same_bits(got.tensors(), want.tensors())
        assert {x.dtype for x in (*got.exp_avgs, *got.exp_avg_sqs)} == {torch.bfloat16}


def test_half_moments_are_the_cpus_of_a_transposed_layout():
    """Elements are counted as they lie in memory, on either device."""

    def state():
        s = twin([(35, 6)], torch.bfloat16, "split", **HALF)
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "lows"):
            setattr(s, name, [x.t() for x in getattr(s, name)])
        return s

    with emulated():
        got = state().step(stochastic_rounding_seed=4)
    for function in (adamw_, adamw_ref):
        assert same_bits(got.tensors(), state().step(function, stochastic_rounding_seed=4).tensors())


@pytest.mark.parametrize("kind", KINDS)
def test_half_moments_of_gradients_that_are_no_numbers(kind):
    """The NaN is a GPU's own, which the random bits would carry over into zero."""

    def state():
        s = twin([(40,)], *KINDS[kind], torch.float32, **HALF)
        s.grads[0][:3] = torch.tensor([0x7FFFFFFF, 0x7F800000, -0x800000], dtype=torch.int32).view(torch.float32)
        return s

    with emulated():
        got = state().step(steps=2, stochastic_rounding_seed=6)
    assert same_bits(got.tensors(), state().step(adamw_ref, steps=2, stochastic_rounding_seed=6).tensors())
    assert got.exp_avgs[0].isfinite().tolist() == [False] * 3 + [True] * 37
    assert got.exp_avg_sqs[0].isnan().tolist() == [True] + [False] * 39


def test_half_moments_are_left_alone_by_a_step_that_is_skipped():
    state = twin([(40,)], torch.bfloat16, "split", **HALF)
    before = [x.clone() for x in state.tensors()]
    lists = (state.params, state.grads, state.exp_avgs, state.exp_avg_sqs)
    with emulated():
        adamw_(*lists, torch.zeros(()), **HYPER, lows=state.lows, stochastic_rounding_seed=1)
    assert same_bits(state.tensors(), before)
