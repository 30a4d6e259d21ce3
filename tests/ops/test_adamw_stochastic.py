"""Stochastic rounding in adamw: the reference's bits, right on average, exact where bf16 can hold the value."""

import math

import pytest
import torch

from cgpt_ext import adamw_, adamw_ref
from cgpt_ext.ops.adamw import _stochastic
from numerics import DTYPES
from test_adamw import HYPER, SHAPES, State, one_thread, same_bits, twin

__all__ = ["one_thread"]  # pytest finds the fixture by its name here


SEEDS = [0, 7, -1, 2**62 + 12345]


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_stochastic_rounding_has_the_references_bits(isa, seed, grad_dtype):
    args = (SHAPES, torch.bfloat16, None, grad_dtype)
    options = {"stochastic_rounding_seed": seed}
    want = twin(*args).step(adamw_ref, **options).tensors()
    assert same_bits(twin(*args).step(**options).tensors(), want)
    options["stochastic_rounding_seed"] = torch.tensor(seed)
    assert same_bits(twin(*args).step(**options).tensors(), want)
    assert not same_bits(twin(*args).step(stochastic_rounding_seed=seed ^ 1).tensors(), want)


def test_stochastic_rounding_is_right_on_average(isa):
    """Weights at 1, every step a tenth of the distance to the next bf16 below: nearest would never move."""
    below, n, steps = 2.0**-8, 20000, 5
    state = State([(n,)] * 2, torch.bfloat16)
    for tensors in (state.params, state.grads):
        for x in tensors:
            x.fill_(1.0)
    state.step(steps=1, lr=0.1 * below, eps=0.0, weight_decay=0.0, stochastic_rounding_seed=3)
    down = [(1 - p.float()) / below for p in state.params]
    for moved in down:
        assert set(moved.tolist()) == {0.0, 1.0}
        assert abs(moved.mean().item() - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5
    assert 0.5 < (down[0] * down[1]).mean().item() / 0.01 < 2  # two tensors do not share their bits
    assert 0.5 < (down[0][1:] * down[0][:-1]).mean().item() / 0.01 < 2
    state = State([(n,)], torch.bfloat16)
    state.params[0].fill_(-1.0), state.grads[0].fill_(-1.0)
    for t in range(1, steps + 1):
        lists = (state.params, state.grads, state.exp_avgs, state.exp_avg_sqs)
        hyper = {**HYPER, "lr": 0.1 * below, "eps": 0.0, "weight_decay": 0.0}
        adamw_(*lists, t, **hyper, stochastic_rounding_seed=3)
    mean = ((state.params[0].float() + 1) / below).mean().item()
    assert abs(mean - 0.1 * steps) < 4 * (0.1 * 0.9 * steps / n) ** 0.5


def test_stochastic_rounding_leaves_what_it_can_hold(isa):
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-130, 3.3895e38, math.inf, -math.inf, math.nan]).bfloat16()
    state = State([(9,)], torch.bfloat16)
    state.params[0].copy_(exact), state.grads[0].zero_()
    state.step(steps=1, lr=0.0, stochastic_rounding_seed=1)
    assert same_bits(state.params, [exact])
    assert torch.equal(state.params[0][:2].view(torch.int16), exact[:2].view(torch.int16))


def test_stochastic_rounding_counts_elements_in_memory():
    plain, turned = twin([(6, 35), (5,)], torch.bfloat16), twin([(35, 6), (5,)], torch.bfloat16)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        tensors = getattr(turned, name)
        tensors[:] = [getattr(plain, name)[0].reshape(35, 6).clone().t(), getattr(plain, name)[1].clone()]
    for function in (adamw_, adamw_ref):
        a, b = (State([(1,)]) for _ in range(2))
        for copy, state in ((a, plain), (b, turned)):
            for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
                setattr(copy, name, [x.clone() for x in getattr(state, name)])
            copy.step(function, stochastic_rounding_seed=5)
        assert same_bits([x.reshape(-1) for x in a.params], [x.t().reshape(-1) for x in b.params])


def test_stochastic_rounding_past_two_to_the_32_elements():
    """The upper half of an index reaches the bits: the generator itself, since no test holds such a tensor."""
    x, far = torch.full((2, 64), 1 + 2.0**-9), torch.empty_strided((2, 64), (1 << 32, 1), device="meta")
    first, second = _stochastic(x, far, 1, 1, 0)
    assert torch.equal(first, _stochastic(x[0], torch.empty(64), 1, 1, 0))
    assert not torch.equal(first, second)
