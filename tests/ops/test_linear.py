import re

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import _native, linear, linear_ref
from cgpt_ext.nn import Linear
from cgpt_ext.ops.linear import product
from numerics import DTYPES, TINY, assert_as_good_as_torch, compare, error, run


def make(shape, width, dtype, bias=True):
    x, weight = torch.randn(shape), torch.randn(width, shape[-1]) / shape[-1] ** 0.5
    dout = torch.randn(*shape[:-1], width)
    return [t.to(dtype) for t in (x, weight, *([torch.randn(width)] if bias else []))], dout.to(dtype)


# (x's shape, width): primes, one row, few rows, several blocks of rows, of columns and of both
SHAPES = [((1, 5), 3), ((3, 7, 13), 31), ((17, 1), 1), ((2, 64, 24), 96), ((131, 67), 257), ((300, 96), 130)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_values_and_gradients(isa, shape, width, dtype):
    inputs, dout = make(shape, width, dtype)
    compare(linear, linear_ref, F.linear, inputs, dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_scale(isa, dtype, scale):
    inputs, dout = make((70, 40), 65, dtype)

    def torchs(x, weight, bias):
        return torch.addmm(bias, x, weight.t(), beta=scale, alpha=scale)

    compare(lambda *x: linear(*x, scale), lambda *x: linear_ref(*x, scale), torchs, inputs, dout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bias_and_by_a_transposed_parameter(isa, dtype):
    (x, weight), dout = make((70, 40), 66, dtype, bias=False)
    weight = weight.t().contiguous().t()
    compare(linear, linear_ref, F.linear, [x, weight], dout)
    leaf = weight.detach().requires_grad_()
    linear(x, leaf).backward(dout)
    assert leaf.grad.stride() == leaf.stride()


# Sums longer than one part of them, for pairs of bf16 (4096) and for floats (1024), whole parts and not.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1023, 1025, 2048, 4096, 4099, 9001])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_long_sums(isa, dtype, depth, layout):
    a, b = torch.randn(37, depth).to(dtype), torch.randn(70, depth).to(dtype)
    if layout == "columns":
        a, b = (t.t().contiguous().t() for t in (a, b))
    want = a.double() @ b.double().t()
    assert_as_good_as_torch(product(a, b), want, torch.mm(a, b.t()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_rows_and_columns_that_are_packed_in_turn(isa, dtype):
    """More than 6 MiB of B and 16 MiB of A across the sum, at a depth that is cheap to check in full."""
    a, b = torch.randn(2, 4500).to(dtype), torch.randn(2, 65000).to(dtype)
    rows, columns = torch.randint(4500, (50,)), torch.randint(65000, (50,))
    out = torch.empty(4500, 65000, dtype=dtype)
    _native.linear(a.t(), b.t(), None, 1.0, None, out)
    want = a.double().t()[rows] @ b.double()[:, columns]
    assert error(out[rows][:, columns], want) <= torch.finfo(dtype).eps * float(want.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", ["none", "own", "float"])
@pytest.mark.parametrize("to", ["own", "float"])
def test_adding_to_what_is_there(isa, dtype, add, to):
    a, b = torch.randn(40, 30).to(dtype), torch.randn(70, 30).to(dtype)
    kinds = {"own": dtype, "float": torch.float32}
    before = None if add == "none" else torch.randn(40, 80).to(kinds[add])[:, :70]
    out = torch.zeros(40, 90, dtype=kinds[to])[:, :70]
    _native.linear(a, b, None, 0.5, before, out)
    want = 0.5 * (a.double() @ b.double().t()) + (0 if before is None else before.double())
    theirs = (0.5 * (a.float() @ b.float().t()) + (0 if before is None else before)).to(kinds[to])
    assert_as_good_as_torch(out, want, theirs)


def test_in_place(isa):
    a, b = torch.randn(40, 30).bfloat16(), torch.randn(70, 30).bfloat16()
    total = torch.randn(40, 70).bfloat16()
    want, before = torch.empty_like(total), total.clone()
    _native.linear(a, b, None, 1.0, before, want)
    _native.linear(a, b, None, 1.0, total, total)
    assert torch.equal(total, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(isa, dtype):
    (x, weight, bias), dout = make((6, 50, 24), 66, dtype)
    neither = torch.randn(132, 48).to(dtype)[::2, ::2]  # contiguous in no direction
    compare(linear, linear_ref, F.linear, (x.transpose(0, 1), neither, bias), dout.transpose(0, 1))
    compare(linear, linear_ref, F.linear, (x[:, ::2], weight[:, :], bias), dout[:, ::2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_stays_in_its_row(isa, bad):
    (x, weight), _ = make((40, 33), 70, torch.bfloat16, bias=False)
    x[7, 3] = bad
    y = linear(x, weight)
    kept = [i for i in range(40) if i != 7]
    assert not y[7].isfinite().any()
    assert y[kept].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_or_runs(isa, dtype):
    inputs, dout = make((500, 72), 330, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run(linear, *inputs, dout=dout))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_batch(isa):
    (x, weight, bias), dout = make((4, 24), 50, torch.bfloat16)
    y, dx, dweight, dbias = run(linear, x[:0], weight, bias, dout=dout[:0])
    assert y.shape == (0, 50)
    assert dx.shape == (0, 24)
    assert not dweight.any()
    assert not dbias.any()


def test_in_autocast(isa):
    (x, weight, bias), _ = make((40, 24), 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_module_is_torchs(isa):
    theirs = torch.nn.Linear(24, 50)
    ours = Linear(24, 50)
    ours.load_state_dict(theirs.state_dict())
    x, dout = torch.randn(2, 20, 24), torch.randn(2, 20, 50)
    for module in (ours, theirs):
        module(x).backward(dout)
    assert isinstance(ours, torch.nn.Linear)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_on_a_gpu_it_is_torchs(monkeypatch, scale, with_bias):
    """Played on a CPU in fp64, which our products would refuse."""
    monkeypatch.setattr("cgpt_ext.ops.linear.on_gpu", lambda x: True)
    (x, weight, bias), _ = make((2, 20, 24), 50, torch.float64)
    bias = bias if with_bias else None
    torch.testing.assert_close(linear(x, weight, bias, scale), linear_ref(x, weight, bias, scale))


def test_only_what_needs_a_gradient_gets_one():
    (x, weight, bias), dout = make((40, 24), 50, torch.float32)
    weight.requires_grad_()
    linear(x, weight, bias).backward(dout)
    assert x.grad is None
    assert bias.grad is None
    assert error(weight.grad, dout.double().t() @ x.double()) < TINY[torch.float32] * 100


def test_opcheck():
    (x, weight, bias), _ = make((20, 24), 50, torch.float32)
    torch.library.opcheck(torch.ops.cgpt_ext.linear_fwd.default, (x, weight, bias, 0.5))
    dout = torch.randn(20, 50)
    torch.library.opcheck(torch.ops.cgpt_ext.linear_bwd.default, (dout, x, weight, 0.5, [True, True, True]))


def test_gradcheck_of_the_reference():
    (x, weight, bias), _ = make((3, 4), 5, torch.float64)
    torch.autograd.gradcheck(lambda *t: linear_ref(*t, 0.5), [t.requires_grad_() for t in (x, weight, bias)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(())}, "linear: x must be at least 1-dimensional, got a scalar"),
        ({"weight": torch.randn(5, 7)}, "linear: weight must be (*, 8), got (5, 7)"),
        ({"bias": torch.randn(4)}, "linear: bias must be (5,), got (4,)"),
    ],
)
def test_shapes_are_named(change, message):
    arguments = {"x": torch.randn(3, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)} | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        linear(**arguments)


def test_types_are_named():
    with pytest.raises(TypeError, match=r"linear: weight must be a torch\.Tensor, got NoneType"):
        linear(torch.randn(3, 8), None)
    with pytest.raises(TypeError, match=r"linear: weight must be .*float32"):
        linear(torch.randn(3, 8), torch.randn(5, 8).double())
