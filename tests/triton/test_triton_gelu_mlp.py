"""gelu_mlp's Triton kernels: on a GPU where there is one, else under Triton's interpreter in tiles of 32."""

import math

import pytest
import torch
import torch.nn.functional as F

from numerics import DTYPES, assert_as_good_as_torch, compare, run

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the infinities that are meant

from cgpt_ext import gelu_mlp, gelu_mlp_ref  # noqa: E402
from cgpt_ext.dispatch import use  # noqa: E402
from cgpt_ext.triton import gelu_mlp as kernels  # noqa: E402
from cgpt_ext.triton.gelu_mlp import gelu_mlp_linear_bwd_triton, gelu_mlp_linear_fwd_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "BWD_ROWS", 32)


class _GeluMLP(torch.autograd.Function):
    """act = activation(x w1^T + b1) and y = act w2^T, the kernels' products by them, the others by torch."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, activation):
        pre = x.new_full((x.shape[0], w1.shape[0]), math.nan)
        act = x.new_full((x.shape[0], w2.shape[1]), math.nan)
        gelu_mlp_linear_fwd_triton(x, w1, b1, activation, pre, act)
        ctx.save_for_backward(x, w1, b1, w2, pre)
        ctx.activation = activation
        return act @ w2.T

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, pre = ctx.saved_tensors
        dpre, act = torch.full_like(pre, math.nan), pre.new_full((x.shape[0], w2.shape[1]), math.nan)
        db1 = None if b1 is None else torch.full_like(b1, math.nan)
        gelu_mlp_linear_bwd_triton(dy, w2, pre, ctx.activation, dpre, act, db1)
        return dpre @ w1, dpre.T @ x, db1, dy.T @ act, None


def ours(x, w1, b1, w2, activation):
    return _GeluMLP.apply(x, w1, b1, w2, activation)


def activate(pre, activation):
    if activation == "swiglu":
        gate, up = pre.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def reference(x, w1, b1, w2, activation):
    return F.linear(activate(F.linear(x, w1, b1), activation), w2)


def make(M, D, F_, activation, dtype=torch.float32):
    width = 2 * F_ if activation == "swiglu" else F_
    x, w1, b1, w2, dy = (torch.randn(shape) for shape in ((M, D), (width, D), (width,), (D, F_), (M, D)))
    return [t.to(DEVICE, dtype) for t in (x, w1 * D**-0.5, b1, w2 * F_**-0.5, dy)]


ACTIVATIONS = ["gelu", "gelu_tanh", "swiglu"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("M", "D", "F_"), [(1, 8, 8), (37, 64, 40), (65, 33, 97)])
def test_what_the_kernels_write(M, D, F_, activation, dtype):
    x, w1, b1, w2, dy = make(M, D, F_, activation, dtype)
    pre, dpre = (torch.full((M, w1.shape[0]), math.nan).to(x) for _ in range(2))
    act, again = (torch.full((M, F_), math.nan).to(x) for _ in range(2))
    db1 = torch.full_like(b1, math.nan)
    gelu_mlp_linear_fwd_triton(x, w1, b1, activation, pre, act)
    gelu_mlp_linear_bwd_triton(dy, w2, pre, activation, dpre, again, db1)

    def by_torch(dtype):
        want_pre = F.linear(*(t.to(dtype) for t in (x, w1, b1)))
        z = pre.to(dtype).requires_grad_()  # the backward pass is given what the forward pass rounded
        want_act = activate(z, activation)
        (want_dpre,) = torch.autograd.grad(want_act, z, dy.to(dtype) @ w2.to(dtype))
        return want_pre, activate(want_pre, activation), want_dpre, want_act, want_dpre.sum(0)

    names = ("pre", "act", "dpre", "act again", "db1")
    written = (pre, act, dpre, again, db1)
    for name, got, want, torchs in zip(names, written, by_torch(torch.float64), by_torch(dtype), strict=True):
        assert_as_good_as_torch(got, want, torchs, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    x, w1, b1, w2, dy = make(37, 64, 40, activation)
    compare(ours, reference, reference, (x, w1, b1, w2, activation), dy)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strides_and_no_bias(activation):
    """Transposed views of (in, out) weights, and rows apart: the bits of contiguous ones."""
    x, w1, _, w2, dy = make(40, 48, 33, activation, torch.float16)
    want = run(ours, x, w1, None, w2, activation, dout=dy)
    apart = torch.zeros(40, 100).to(x)[:, :48].copy_(x)
    got = run(ours, apart, w1.t().contiguous().t(), None, w2.t().contiguous().t(), activation, dout=dy)
    for a, b in zip(got[:1] + got[2:3], want[:1] + want[2:3], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)  # the products by torch are not bit-equal over strides
    act = [x.new_empty(40, 33) for _ in range(2)]
    gelu_mlp_linear_fwd_triton(x, w1, None, activation, None, act[0])
    gelu_mlp_linear_fwd_triton(apart, w1.t().contiguous().t(), None, activation, None, act[1])
    assert torch.equal(*act)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_small_arguments(activation):
    """The activation's ends, z and -z at a time: the bar is by the larger of the two."""
    ends = [0.0, -0.0, 1e-20, -1e-20, 0.5, -0.5, 5.0, -5.0, 12.0, -12.0, 40.0, -40.0, 1e4, -1e4, 1e15, -1e15]
    x = torch.tensor(ends, device=DEVICE)[:, None].repeat(1, 8)
    w1 = torch.zeros(16 if activation == "swiglu" else 8, 8, device=DEVICE)
    w1[:, 0] = 1
    w2 = torch.eye(8, device=DEVICE)
    args = (w1, None, w2, activation)
    for pair in x.split(2):
        compare(ours, reference, reference, (pair, *args), torch.ones(2, 8, device=DEVICE))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_op(activation, dtype):
    x, w1, b1, w2, _ = make(67, 24, 40, activation, dtype)
    b2, dy = torch.randn(24, device=DEVICE).to(dtype), torch.randn(67, 24, device=DEVICE).to(dtype)
    with use(gelu_mlp="triton"):
        compare(gelu_mlp, gelu_mlp_ref, gelu_mlp_ref, (x, w1, b1, w2, b2, activation), dy)
        y = gelu_mlp(x, w1, None, w2, None, activation)  # keeps nothing for a backward pass
    assert_as_good_as_torch(
        y,
        gelu_mlp_ref(x.double(), w1.double(), None, w2.double(), None, activation),
        gelu_mlp_ref(x, w1, None, w2, None, activation),
    )


def test_no_rows():
    x, w1, b1, w2, dy = make(0, 8, 8, "gelu")
    y, dx, dw1, db1, _ = run(ours, x, w1, b1, w2, "gelu", dout=dy)
    assert y.shape == dx.shape == (0, 8)
    assert torch.equal(db1, torch.zeros_like(b1))
    assert torch.equal(dw1, torch.zeros_like(w1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_come_out(activation, value):
    x, w1, b1, w2, dy = make(3, 16, 8, activation)
    x[1, 2] = value
    y, dx, *_ = run(ours, x, w1, b1, w2, activation, dout=dy)
    assert not y[1].isfinite().all()
    assert y[::2].isfinite().all()
    assert dx[::2].isfinite().all()


def test_repeats_bit_for_bit():
    x, w1, b1, w2, dy = make(70, 40, 40, "gelu", torch.bfloat16)
    first = run(ours, x, w1, b1, w2, "gelu", dout=dy)
    for _ in range(100 if DEVICE == "cuda" else 1):
        again = run(ours, x, w1, b1, w2, "gelu", dout=dy)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
