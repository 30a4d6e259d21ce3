import math
import re

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import _native, gelu_mlp, gelu_mlp_ref
from cgpt_ext.dispatch import use
from cgpt_ext.nn import GeluMLP, SwiGLU
from numerics import DTYPES, assert_as_good_as_torch, compare, error, run

ACTIVATIONS = ["gelu", "gelu_tanh", "swiglu"]
# (x's shape, F): primes, no multiple of a vector or of a block of rows, an empty batch, one token, T % 128 == 64
SHAPES = [((3, 5), 7), ((2, 3, 16), 64), ((7, 127), 131), ((1, 1, 64), 48), ((2, 64, 24), 96)]


def torch_gelu_mlp(x, w1, b1, w2, b2, activation="gelu"):
    z = F.linear(x, w1, b1)
    if activation == "swiglu":
        gate, up = z.chunk(2, -1)
        return F.linear(F.silu(gate) * up, w2, b2)
    return F.linear(F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none"), w2, b2)


def make(shape, hidden, dtype, scale=1.0, activation="gelu"):
    d, width = shape[-1], 2 * hidden if activation == "swiglu" else hidden
    x, w1, b1 = torch.randn(shape), scale * torch.randn(width, d) / d**0.5, torch.randn(width)
    w2, b2, dy = torch.randn(d, hidden) / hidden**0.5, torch.randn(d), torch.randn(shape)
    return [t.to(dtype) for t in (x, w1, b1, w2, b2)], dy.to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "hidden"), SHAPES)
def test_values_and_gradients(isa, shape, hidden, dtype, activation):
    inputs, dy = make(shape, hidden, dtype, activation=activation)
    compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, (*inputs, activation), dy)


def check_one_element(dtype, activation):
    """D = F = 1, a hundred problems under one bar: how near one rounded number comes to the truth is luck."""
    sides = [[], [], []]
    for _ in range(100):
        inputs, dy = make((1, 1), 1, dtype, activation=activation)
        wide = [t.double() for t in inputs]
        sides[0].append(run(gelu_mlp, *inputs, activation, dout=dy))
        sides[1].append(run(gelu_mlp_ref, *wide, activation, dout=dy.double()))
        sides[2].append(run(torch_gelu_mlp, *inputs, activation, dout=dy))
    for i, results in enumerate(zip(*(zip(*side, strict=True) for side in sides), strict=True)):
        assert_as_good_as_torch(*(torch.stack(numbers) for numbers in results), f"output or gradient {i}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element(isa, dtype, activation):
    check_one_element(dtype, activation)


def test_a_bias_may_cancel_the_product(isa):
    """It is added before z is rounded."""
    x, w1, w2 = (torch.tensor([[value]]).bfloat16() for value in (1.0078125, 1.0078125, 1.0))
    b1, none = -torch.ones(1).bfloat16(), torch.zeros(1).bfloat16()
    assert gelu_mlp(x, w1, b1, w2, none).item() == gelu_mlp_ref(*(t.double() for t in (x, w1, b1, w2, none))).bfloat16()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_magnitudes(isa, dtype, activation):
    inputs, dy = make((33, 48), 70, dtype, 30.0, activation)
    compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, (*inputs, activation), dy)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("without", [(2,), (4,), (2, 4)])
def test_without_biases(isa, dtype, without, activation):
    inputs, dy = make((9, 24), 50, dtype, activation=activation)
    inputs = [None if i in without else t for i, t in enumerate(inputs)]
    compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, (*inputs, activation), dy)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_conv1d_layout(isa, dtype, activation):
    (x, w1, b1, w2, b2), dy = make((2, 9, 24), 50, dtype, activation=activation)
    inputs = (x, w1.t().contiguous().t(), b1, w2.t().contiguous().t(), b2)
    compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, (*inputs, activation), dy)
    leaves = [t.detach().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(gelu_mlp(*leaves, activation), leaves, dy)
    assert [g.stride() for g in grads] == [t.stride() for t in leaves]


def test_strided_views(isa):
    (x, w1, b1, w2, b2), dy = make((6, 5, 24), 50, torch.bfloat16)
    wide = torch.randn(100, 48).to(torch.bfloat16)[::2, :24]  # neither row- nor column-major
    inputs = (x.transpose(0, 1), wide, b1, w2, b2)
    compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, inputs, dy.transpose(0, 1))
    narrow = [t.contiguous() for t in inputs]
    for got, want in zip(
        run(gelu_mlp, *inputs, dout=dy.transpose(0, 1)),
        run(gelu_mlp, *narrow, dout=dy.transpose(0, 1).contiguous()),
        strict=True,
    ):
        assert torch.equal(got, want)
    y = gelu_mlp(x.requires_grad_(), w1, b1, w2, b2)
    y.sum().backward()  # dout is an expanded scalar
    again = x.detach().requires_grad_()
    gelu_mlp(again, w1, b1, w2, b2).backward(torch.ones_like(y))
    assert torch.equal(x.grad, again.grad)


def test_empty_batch(isa):
    (x, *weights), dy = make((4, 24), 50, torch.bfloat16)
    y, dx, *grads = run(gelu_mlp, x[:0], *weights, dout=dy[:0])
    assert y.shape == dx.shape == (0, 24)
    assert all(torch.equal(g, torch.zeros_like(w)) for g, w in zip(grads, weights, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_comes_out(isa, bad, activation):
    inputs, dy = make((5, 24), 50, torch.float32, activation=activation)
    inputs[0][2, 7] = bad
    y, dx, *_ = run(gelu_mlp, *inputs, activation, dout=dy)
    assert not y[2].isfinite().any()
    assert y[[0, 1, 3, 4]].isfinite().all()
    assert dx[[0, 1, 3, 4]].isfinite().all()


def test_gelu_elementwise(isa):
    """The relative bar in both tails, where 1 + erf would have no digits left; 5.6e-7 was measured."""
    x = torch.linspace(-12, 12, 40001).view(1, -1)
    act, slope = torch.empty_like(x), torch.ones_like(x)
    _native.gelu_mlp_bwd(x, slope, act, slope, None, None, "gelu")
    exact = x.double()
    cdf, pdf = 0.5 * torch.erfc(-exact / math.sqrt(2)), torch.exp(-0.5 * exact**2) / math.sqrt(2 * math.pi)
    inner = exact != 0
    assert float((act[inner] / (exact * cdf)[inner] - 1).abs().max()) < 1e-6
    assert error(slope, cdf + exact * pdf) < 4e-7
    forward = torch.empty_like(x)
    _native.gelu_mlp_fwd(x, forward, "gelu")
    assert torch.equal(forward, act)


def test_gelu_tanh_elementwise(isa):
    x = torch.linspace(-12, 12, 40001).view(1, -1)
    act, slope = torch.empty_like(x), torch.ones_like(x)
    _native.gelu_mlp_bwd(x, slope, act, slope, None, None, "gelu_tanh")
    wide = x.double().requires_grad_()
    want = F.gelu(wide, approximate="tanh")
    want.sum().backward()
    theirs = x.clone().requires_grad_()
    got = F.gelu(theirs, approximate="tanh")
    got.sum().backward()
    assert error(act, want) <= max(error(got, want), 1e-6)
    assert error(slope, wide.grad) <= max(error(theirs.grad, wide.grad), 1e-6)


def test_silu_elementwise(isa):
    gate = torch.linspace(-90, 90, 40001).view(-1, 1)
    pre, act = torch.cat([gate, torch.ones_like(gate)], 1), torch.empty_like(gate)
    dpre = torch.empty_like(pre)
    _native.gelu_mlp_bwd(pre, torch.ones_like(gate), act, dpre, None, None, "swiglu")
    exact = gate.double()
    share = 1 / (1 + torch.exp(-exact))
    assert float(((act / (exact * share)) - 1)[(exact != 0) & (exact > -87)].abs().max()) < 1e-6
    assert error(dpre[:, :1], share * (1 + exact * (1 - share))) < 4e-7
    assert torch.equal(dpre[:, 1:], act)
    forward = torch.empty_like(act)
    _native.gelu_mlp_fwd(pre, forward, "swiglu")
    assert torch.equal(forward, act)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_far_out_is_identity_or_zero(isa, activation):
    x = torch.tensor([[13.5, 200.0, 1e20, 3e38, -13.5, -200.0, -1e20, -3e38]])
    act, slope = torch.empty_like(x), torch.ones_like(x)
    _native.gelu_mlp_bwd(x, slope, act, slope, None, None, activation)
    assert torch.equal(act, x.clamp(min=0))
    assert torch.equal(slope, (x > 0).float())


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_or_runs(isa, dtype, activation):
    inputs, dy = make((300, 24), 72, dtype, activation=activation)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            _, pre = torch.ops.cgpt_ext.gelu_mlp_fwd(*inputs, activation, True, "")
            dact, dpre = torch.cos(pre[:, :72]).contiguous(), torch.empty_like(pre)
            act, db1, db2 = torch.empty_like(dact), torch.empty_like(inputs[2]), dy.new_empty(24)
            _native.gelu_mlp_bwd(pre, dact, act, dpre, db1, None, activation)
            _native.gelu_mlp_bias_grad(dy, db2, None)
            results.append((act, dpre, db1, db2, *run(gelu_mlp, *inputs, activation, dout=dy)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_hundred_runs_are_bit_equal():
    inputs, dy = make((5, 16), 40, torch.bfloat16)
    first = run(gelu_mlp, *inputs, dout=dy)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(gelu_mlp, *inputs, dout=dy), strict=True))


def test_only_the_gradients_asked_for():
    inputs, dy = make((5, 16), 40, torch.float32)
    every = run(gelu_mlp, *inputs, dout=dy)[1:]
    for wanted in range(5):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        gelu_mlp(*leaves).backward(dy)
        assert torch.equal(leaves[wanted].grad, every[wanted])
        assert all(t.grad is None for i, t in enumerate(leaves) if i != wanted)


def test_twice_backward_through_one_graph():
    inputs, dy = make((5, 16), 40, torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    y = gelu_mlp(*leaves)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_gradients(activation):
    inputs, _ = make((3, 4), 5, torch.float64, activation=activation)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *args: gelu_mlp_ref(*args, activation), inputs)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_opcheck(save, transposed):
    (x, w1, b1, w2, b2), dy = make((4, 6, 16), 24, torch.float32)
    if transposed:
        x, w1, w2 = x.transpose(0, 1), w1.t().contiguous().t(), w2.t().contiguous().t()
        dy = dy.transpose(0, 1)
    forward, backward = torch.ops.cgpt_ext.gelu_mlp_fwd.default, torch.ops.cgpt_ext.gelu_mlp_bwd.default
    torch.library.opcheck(forward, (x, w1, b1, w2, b2, "gelu", save, ""))
    torch.library.opcheck(forward, (x, w1, None, w2[:, :12], None, "swiglu", save, "native"))
    if not save:
        return
    _, pre = forward(x, w1, b1, w2, b2, "gelu", True, "")
    for mask in ([True] * 5, [False, True, False, True, False]):
        torch.library.opcheck(backward, (dy, x, w1, b1, w2, pre, "gelu", mask, ""))
    torch.library.opcheck(backward, (dy, x, w1, None, w2[:, :12], pre, "swiglu", [True, True, False, True, False], ""))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_equals_eager(activation):
    (x, w1, b1, w2, b2), dy = make((4, 6, 64), 96, torch.bfloat16, activation=activation)
    inputs = (x, w1.t().contiguous().t(), b1, w2, b2, activation)
    compiled = torch.compile(gelu_mlp, fullgraph=True, backend="aot_eager")
    eager, again = run(gelu_mlp, *inputs, dout=dy), run(compiled, *inputs, dout=dy)
    assert all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))


def test_autocast_casts_as_torch_does():
    ours = GeluMLP(16, 40)
    x = torch.randn(5, 16, requires_grad=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        want = ours.c_proj(F.gelu(ours.c_fc(x)))
        y, again = ours(x), compiled(x)
        y.sum().backward()  # fp32 leaves: autocast must not reach the products inside
    assert y.dtype == want.dtype == torch.bfloat16
    assert x.grad.dtype == ours.c_fc.weight.grad.dtype == torch.float32
    cast = [t.bfloat16() for t in (x, *ours.parameters())]
    assert torch.equal(y, gelu_mlp(*cast))
    assert torch.equal(y, again)
    wide = GeluMLP(16, 40)
    loss = wide(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert wide.c_fc.weight.grad.dtype == torch.float32


BAD_INPUT = [
    (lambda x, *p: (x[0, 0], *p), ValueError, "x must be at least 1-dimensional, got a scalar"),
    (lambda x, *p: (x[:, :0], *p), ValueError, "x must be non-empty in its last dimension, got (2, 0)"),
    (lambda x, *p: (x.int(), *p), TypeError, "x must be float32 or bfloat16 or float16, got int32"),
    (lambda x, *p: (x.double(), *p), TypeError, "x must be float32 or bfloat16 or float16, got float64"),
    (lambda x, *p: (3, *p), TypeError, "x must be a torch.Tensor, got int"),
    (lambda x, w1, *p: (x, w1.to("meta"), *p), ValueError, "w1 must be on a cpu or cuda device, got another device"),
    (lambda x, w1, *p: (x, w1[:, :7], *p), ValueError, "w1 must be (*, 8), got (12, 7)"),
    (lambda x, w1, *p: (x, w1[:0], *p), ValueError, "w1 must be non-empty, got (0, 8)"),
    (lambda x, w1, *p: (x, w1.bfloat16(), *p), TypeError, "w1 must be float32, got bfloat16"),
    (lambda x, w1, b1, *p: (x, w1, b1[:7], *p), ValueError, "b1 must be (12,), got (7,)"),
    (lambda x, w1, b1, *p: (x, w1, b1.half(), *p), TypeError, "b1 must be float32, got float16"),
    (
        lambda x, w1, b1, *p: (x, w1, b1.repeat(2)[::2], *p),
        ValueError,
        "b1 must be contiguous, got shape (12,) with strides (2,)",
    ),
    (lambda x, w1, b1, w2, b2: (x, w1, b1, w2.t(), b2), ValueError, "w2 must be (8, 12), got (12, 8)"),
    (lambda x, w1, b1, w2, b2: (x, w1, b1, None, b2), TypeError, "w2 must be a torch.Tensor, got NoneType"),
    (lambda x, w1, b1, w2, b2: (x, w1, 0, w2, b2), TypeError, "b1 must be a torch.Tensor, got int"),
    (lambda x, w1, b1, w2, b2: (x, w1, b1, w2, b2[:1]), ValueError, "b2 must be (8,), got (1,)"),
    (lambda *p: (*p, "relu"), ValueError, "activation must be gelu or gelu_tanh or swiglu, got relu"),
    (lambda *p: (*p, "swiglu"), ValueError, "w2 must be (8, 6), got (8, 12)"),
    (
        lambda x, w1, *p: (x, w1[:11], *p, "swiglu"),
        ValueError,
        "w1 must be even in its first dimension, gate rows and up rows, got (11, 8)",
    ),
]


@pytest.mark.parametrize(("arguments", "exception", "message"), BAD_INPUT)
def test_bad_input(arguments, exception, message):
    inputs, _ = make((2, 8), 12, torch.float32)
    with pytest.raises(exception) as caught:
        gelu_mlp(*arguments(*inputs))
    assert str(caught.value) == f"gelu_mlp: {message}"


def test_the_kernels_themselves_refuse_what_does_not_fit():
    pre, bias = torch.randn(4, 8), torch.randn(8)
    out = torch.empty_like(pre)
    half, f = torch.empty(4, 4), "gelu"
    for call in (
        lambda: _native.gelu_mlp_fwd(pre, out[:3], f),
        lambda: _native.gelu_mlp_fwd(pre.t(), out, f),
        lambda: _native.gelu_mlp_fwd(pre[:, :0], out[:, :0], f),
        lambda: _native.gelu_mlp_fwd(pre, out, "swiglu"),
        lambda: _native.gelu_mlp_fwd(pre[:, :7].contiguous(), half[:, :3].contiguous(), "swiglu"),
        lambda: _native.gelu_mlp_bwd(pre, pre[:, :7], out, out, bias, None, f),
        lambda: _native.gelu_mlp_bwd(pre, pre, out.t(), out, bias, None, f),
        lambda: _native.gelu_mlp_bwd(pre, pre, out, out[:1], bias, None, f),
        lambda: _native.gelu_mlp_bwd(pre, pre, out, out, bias[:1], None, f),
        lambda: _native.gelu_mlp_bwd(pre, pre, out, out, bias, pre, f),
        lambda: _native.gelu_mlp_bwd(pre, half, half, half, bias, None, "swiglu"),
        lambda: _native.gelu_mlp_bias_grad(pre, bias[:7], None),
        lambda: _native.gelu_mlp_bias_grad(pre.t(), bias, None),
        lambda: _native.gelu_mlp_bias_grad(pre[0], bias, None),
    ):
        with pytest.raises(ValueError, match=r"^gelu_mlp: \w+ must be "):
            call()
    with pytest.raises(TypeError, match="gelu_mlp: act must be float32, got bfloat16"):
        _native.gelu_mlp_fwd(pre, out.bfloat16(), f)


def half_precision(*shape):
    return torch.randn(shape).bfloat16()


BAD_PRODUCT = [
    (
        dict(a=half_precision(16, 20)),
        "a must be contiguous in rows or in columns, in multiples of 8, got shape (16, 20)",
    ),
    (
        dict(a=half_precision(16, 48)[:, ::2]),
        "a must be contiguous in rows or in columns, in multiples of 8, got shape",
    ),
    (
        dict(a=half_precision(16, 28)[:, :24]),
        "a must be contiguous in rows or in columns, in multiples of 8, got shape",
    ),
    (dict(a=half_precision(400)[1:385].view(16, 24)), "a must be at a 16-byte boundary, got one that is not"),
    (dict(b=half_precision(8, 25)), "b must be (*, 24), got (8, 25)"),
    (
        dict(a=half_precision(24, 16).t()),
        "b must be contiguous in columns, as a is, got one that is contiguous in rows",
    ),
    (dict(out=half_precision(16, 9)), "out must be (16, 8), got (16, 9)"),
    (dict(bias=half_precision(9)), "bias must be (8,), got (9,)"),
    (dict(b=half_precision(7, 24), out=half_precision(16, 7)), "out must be a multiple of 8 in its last dimension"),
    (dict(tile="1x1"), "tile must be auto or 128x256 or 128x128 or 64x64, got 1x1"),
    ({}, "no kernel in this build for device cpu"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_PRODUCT)
def test_the_gemm_refuses_what_does_not_fit(wrong, message):
    right = dict(a=half_precision(16, 24), b=half_precision(8, 24), bias=None, out=half_precision(16, 8), tile="auto")
    with pytest.raises(ValueError, match=re.escape(f"gelu_mlp: {message}")):
        _native.gelu_mlp_product(*(right | wrong).values())


def test_an_implementation_that_does_not_serve_is_named():
    inputs, _ = make((2, 8), 12, torch.float32)
    with use(gelu_mlp="cublas"), pytest.raises(ValueError, match="tensors must be on cuda for cublas, got cpu"):
        gelu_mlp(*inputs)
    with use(gelu_mlp="reference"):
        assert torch.equal(gelu_mlp(*inputs), gelu_mlp_ref(*inputs))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_module(isa, activation, bias):
    ours = GeluMLP(16, 40, activation, bias=bias)
    theirs = torch.nn.ModuleDict({"c_fc": torch.nn.Linear(16, 40, bias), "c_proj": torch.nn.Linear(40, 16, bias)})
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 16)
    want = theirs.c_proj(F.gelu(theirs.c_fc(x), approximate="tanh" if activation == "gelu_tanh" else "none"))
    torch.testing.assert_close(ours(x), want)
    with pytest.raises(ValueError, match="activation must be gelu or gelu_tanh, got relu"):
        GeluMLP(16, 40, "relu")


@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_module(isa, bias):
    ours, x = SwiGLU(16, 40, bias=bias), torch.randn(5, 16)
    assert ours.c_fc.weight.shape == (80, 16)
    gate, up = ours.c_fc(x).chunk(2, -1)
    torch.testing.assert_close(ours(x), ours.c_proj(F.silu(gate) * up))
