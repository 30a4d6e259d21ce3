"""Stochastic rounding in adamw: the reference's bits, right on average, exact where bf16 can hold the value."""

import math

import pytest
import torch

from cgpt_ext import _native, adamw_, adamw_ref, dispatch, join_master, split_master
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
    first, second = _stochastic(x, far, 1, 1, (0, 0))
    assert torch.equal(first, _stochastic(x[0], torch.empty(64), 1, 1, (0, 0)))
    assert not torch.equal(first, second)


def test_stochastic_rounding_of_a_piece_past_two_to_the_32_elements():
    """A piece's bits are those of its elements in the whole, on either side of the border and across it."""
    x, far = torch.full((2, 64), 1 + 2.0**-9), torch.empty_strided((2, 64), (1 << 32, 1), device="meta")
    whole = _stochastic(x, far, 1, 1, (3, 0))
    for row, first in ((0, 0), (1, 1 << 32)):
        assert torch.equal(_stochastic(x[row], torch.empty(64), 1, 1, (3, first)), whole[row])
    across = _stochastic(x.reshape(-1), torch.empty(128), 1, 1, (3, (1 << 32) - 64))
    assert torch.equal(across[64:], whole[1])
    assert torch.equal(across[:64], _stochastic(x[0], torch.empty(64), 1, 1, (3, (1 << 32) - 64)))


KINDS = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "split": (torch.bfloat16, "split")}
KINDS |= {"bf16-master": (torch.bfloat16, "master"), "fp16-master": (torch.float16, "master")}
HALF = {"state_dtype": torch.bfloat16}


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_half_moments_have_the_references_bits(isa, kind, grad_dtype):
    args, options = (SHAPES, *KINDS[kind], grad_dtype), {"stochastic_rounding_seed": 2**62 + 7}
    want = twin(*args, **HALF).step(adamw_ref, **options).tensors()
    got = twin(*args, **HALF).step(**options)
    assert same_bits(got.tensors(), want)
    assert {x.dtype for x in (*got.exp_avgs, *got.exp_avg_sqs)} == {torch.bfloat16}
    other = twin(*args, **HALF).step(stochastic_rounding_seed=2**62 + 6)
    assert not same_bits(other.exp_avgs, got.exp_avgs)
    assert not same_bits(other.exp_avg_sqs, got.exp_avg_sqs)


# Indices pass a multiple of 2^32 never, within the first piece, behind it, within the second and within the last.
FIRSTS = [0, (1 << 32) - 1024, (1 << 32) - 2048, (1 << 33) - 4096, (1 << 62) - 38 * 1024]
PIECES = [2048, 33 * 1024, 1024, 3333]
RANDOM = [("bf16", {}), *((kind, HALF) for kind in KINDS)]


def in_pieces(state, sizes):
    """The same elements in a list of their own each, as ranks hold them."""
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters", "lows"):
        if getattr(state, name):
            (whole,) = getattr(state, name)
            setattr(state, name, list(whole.split(sizes)))
    return state


def places_of(number, first, sizes):
    return [(number, first + sum(sizes[:i])) for i in range(len(sizes))]


def same_elements(pieces, whole):
    """Of each tensor of a state of one parameter, and of that state in pieces."""
    parts = [torch.cat(part) for part in zip(*[iter(pieces.tensors())] * len(pieces.params), strict=True)]
    return same_bits(parts, whole.tensors())


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize(("kind", "half"), RANDOM)
def test_pieces_are_rounded_as_the_whole(isa, kind, half, first):
    def state():
        return twin([(sum(PIECES),)], *KINDS[kind], **half)

    seed = {"stochastic_rounding_seed": 2**62 + 7, "steps": 2}
    number = 2**32 - 1
    want = state().step(adamw_ref, **seed, rounding_places=[(number, first)])
    whole = state().step(**seed, rounding_places=[(number, first)])
    assert same_bits(whole.tensors(), want.tensors())
    pieces = in_pieces(state(), PIECES).step(**seed, rounding_places=places_of(number, first, PIECES))
    assert same_elements(pieces, want)
    assert not same_bits(state().step(**seed, rounding_places=[(number - 1, first)]).tensors(), want.tensors())
    assert not same_bits(state().step(**seed, rounding_places=[(number, first + 1024)]).tensors(), want.tensors())


@pytest.mark.parametrize(("kind", "half"), RANDOM)
def test_the_references_pieces_are_rounded_as_its_whole(kind, half):
    for first in (0, (1 << 32) - 2048):
        whole, pieces = (twin([(5000,)], *KINDS[kind], **half) for _ in range(2))
        sizes, options = [1024, 2048, 1928], {"stochastic_rounding_seed": 3}
        whole.step(adamw_ref, **options, rounding_places=[(9, first)])
        in_pieces(pieces, sizes).step(adamw_ref, **options, rounding_places=places_of(9, first, sizes))
        assert same_elements(pieces, whole)


def test_places_are_the_list_unless_they_are_given(isa):
    args, seed = (SHAPES, torch.bfloat16, "split"), {"stochastic_rounding_seed": 7}
    listed = [(i, 0) for i in range(len(SHAPES))]
    want = twin(*args, **HALF).step(**seed).tensors()
    assert same_bits(twin(*args, **HALF).step(**seed, rounding_places=listed).tensors(), want)
    with dispatch.use(adamw="reference"):
        assert same_bits(twin(*args, **HALF).step(**seed, rounding_places=listed).tensors(), want)
    turned = [(len(SHAPES) - 1 - i, 0) for i in range(len(SHAPES))]
    assert not same_bits(twin(*args, **HALF).step(**seed, rounding_places=turned).tensors(), want)
    plain = twin(SHAPES).step().tensors()  # without a seed nothing is rounded at random
    assert same_bits(twin(SHAPES).step(rounding_places=turned).tensors(), plain)


def test_compiled_with_places():
    eager, compiled = (twin([(2048,), (3,)], torch.bfloat16, "split", **HALF) for _ in range(2))
    options = {"stochastic_rounding_seed": 7, "rounding_places": [(4, 1024), (2, 0)]}
    eager.step(**options)
    compiled.step(torch.compile(adamw_, fullgraph=True, backend="aot_eager"), **options)
    assert same_bits(eager.tensors(), compiled.tensors())


@pytest.mark.parametrize(
    ("places", "error", "message"),
    [
        ([(0, 0)], ValueError, "rounding_places must be 2 pairs, as many as params, got 2 numbers"),
        ([(0, 0), (-1, 0)], ValueError, "rounding_places[1] must be a number from 0 to 2^32 - 1, got -1"),
        ([(1 << 32, 0), (0, 0)], ValueError, f"rounding_places[0] must be a number from 0 to 2^32 - 1, got {1 << 32}"),
        (
            [(0, 0), (1, 1000)],
            ValueError,
            "rounding_places[1] must be a first element from 0 to 2^62, a multiple of 1024, got 1000",
        ),
        (
            [(0, -1024), (1, 0)],
            ValueError,
            "rounding_places[0] must be a first element from 0 to 2^62, a multiple of 1024, got -1024",
        ),
        (
            [(0, (1 << 62) + 1024), (1, 0)],
            ValueError,
            f"rounding_places[0] must be a first element from 0 to 2^62, a multiple of 1024, got {(1 << 62) + 1024}",
        ),
        ([(0, 0), (0, 1 << 63)], ValueError, f"rounding_places[1] must fit 64 bits, got (0, {1 << 63})"),
        ([(0, 0), 3], TypeError, "rounding_places[1] must be two ints, got 3"),
        ([(0, 0), (1, 0, 0)], TypeError, "rounding_places[1] must be two ints, got (1, 0, 0)"),
        ([(0, 0.0), (1, 0)], TypeError, "rounding_places[0] must be two ints, got (0, 0.0)"),
        ([(True, 0), (1, 0)], TypeError, "rounding_places[0] must be two ints, got (True, 0)"),
        (torch.zeros(2, 2), TypeError, "rounding_places must be a list of pairs, got Tensor"),
    ],
)
def test_bad_places(places, error, message):
    state = State([(4,), (3,)], torch.bfloat16)
    before = [x.clone() for x in state.tensors()]
    with pytest.raises(error) as caught:
        state.step(steps=1, stochastic_rounding_seed=1, rounding_places=places)
    assert str(caught.value) == f"adamw: {message}"
    assert same_bits(state.tensors(), before)


def test_half_moments_do_not_depend_on_threads_or_instructions():
    def run(threads, isa):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with dispatch.cpu_isa(isa):
                state = twin([(3 * 32768 + 5,), (7,)], torch.bfloat16, "split", **HALF)
                return state.step(stochastic_rounding_seed=3).tensors()
        finally:
            torch.set_num_threads(before)

    want = run(1, "scalar")
    for isa in _native.cpu_isas():
        for threads in (1, 2, 5):
            assert same_bits(run(threads, isa), want)


def test_half_moments_are_right_on_average(isa):
    """exp_avg_sq moves by a thousandth of itself a step, less than bf16 holds: to nearest it would stand still."""
    n, steps, beta2 = 20000, 100, 0.999
    state = State([(n,)], torch.bfloat16, "split", **HALF)
    state.grads[0].fill_(0.0), state.exp_avgs[0].fill_(1.0), state.exp_avg_sqs[0].fill_(1.0)
    state.step(steps=steps, beta1=0.99, beta2=beta2, stochastic_rounding_seed=11)
    for x, beta in ((state.exp_avgs[0], 0.99), (state.exp_avg_sqs[0], beta2)):
        x = x.double()
        # each step rounds with a variance of at most a quarter of a bf16 step squared, and the steps are independent
        assert abs(x.mean().item() - beta**steps) < 4 * 2.0**-8 / 2 * (steps / n) ** 0.5
        assert x.std() > 0.001
    m, v = (x.double() - x.double().mean() for x in (state.exp_avgs[0], state.exp_avg_sqs[0]))
    assert abs((m * v).mean() / (m.std() * v.std())) < 4 / n**0.5  # two moments do not share their bits
    assert abs((m[1:] * m[:-1]).mean() / m.var()) < 4 / n**0.5


def test_half_moments_keep_what_bf16_holds(isa):
    exact = torch.tensor([0.0, 1.0, -3.5, 2.0**-130, math.inf, -math.inf, math.nan]).bfloat16()
    state = State([(7,)], torch.bfloat16, "split", **HALF)
    state.grads[0].zero_(), state.exp_avgs[0].copy_(exact), state.exp_avg_sqs[0].copy_(exact.abs())
    state.step(steps=1, beta1=0.0, beta2=0.5, stochastic_rounding_seed=1)
    assert same_bits(state.exp_avg_sqs, [(exact.abs().float() / 2).bfloat16()])
    assert state.exp_avgs[0].isnan().tolist() == [False] * 4 + [True] * 3


def test_half_moments_learn_as_well_as_fp32_ones():
    """A least-squares problem: the loss falls as far, within what one more rounding costs."""
    torch.manual_seed(0)
    a, truth = torch.randn(256, 64), torch.randn(64)

    def loss_after(state_dtype, **options):
        high, low = split_master(torch.zeros(64))
        states = [[torch.zeros(64, dtype=state_dtype)] for _ in range(2)]
        for t in range(1, 401):
            w = join_master(high, low)
            grad = a.T @ (a @ (w - truth)) / len(a)
            hyper = {**HYPER, "lr": 0.03, "beta2": 0.999, "weight_decay": 0.0}
            adamw_([high], [grad], *states, t, **hyper, lows=[low], **options)
        return ((join_master(high, low) - truth) ** 2).mean().item()

    start = (truth**2).mean().item()
    full, half = loss_after(torch.float32), loss_after(torch.bfloat16, stochastic_rounding_seed=5)
    assert full < 1e-3 * start
    assert half < 2e-3 * start


def test_what_half_moments_need():
    def fails(error, match, state, **options):
        before = [x.clone() for x in state.tensors()]
        with pytest.raises(error, match=match):
            state.step(steps=1, **options)
        assert same_bits(state.tensors(), before)

    def half(*args):
        return State([(4,), (3,)], *args, **HALF)

    fails(TypeError, r"exp_avgs\[0\] must be float32, got bfloat16", half(torch.bfloat16, "split"))
    mixed = half(torch.bfloat16, "split")
    mixed.exp_avg_sqs[1] = torch.zeros(3)
    fails(TypeError, r"exp_avg_sqs\[1\] must be bfloat16, got float32", mixed, stochastic_rounding_seed=1)
    mixed = half(torch.bfloat16, "split")
    mixed.exp_avgs[0] = torch.zeros(4)
    fails(ValueError, "stochastic_rounding_seed must be None where masters or lows", mixed, stochastic_rounding_seed=1)
    fails(TypeError, r"params\[0\] must be bfloat16, got float16", half(torch.float16), stochastic_rounding_seed=1)
    mixed = half(torch.float32)
    mixed.params[1] = mixed.params[1].bfloat16()
    fails(TypeError, r"params\[1\] must be float32, got bfloat16", mixed, stochastic_rounding_seed=1)
    with dispatch.use(adamw="triton"):
        fails(
            TypeError,
            "must be float32 for the Triton kernel",
            half(torch.bfloat16, "split"),
            stochastic_rounding_seed=1,
        )
        whole = State([(4,), (3,)], torch.bfloat16)
        for more in ({}, {"rounding_places": [(0, 0), (1, 1024)]}):
            options = {"stochastic_rounding_seed": 1, **more}
            fails(ValueError, "seed must be None for the Triton kernel, got a seed", whole, **options)
