"""gelu_mlp against nn.Linear, F.gelu, nn.Linear: the whole, and what stands between the matrix products alone."""

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import _native, gelu_mlp
from kinds import KINDS, skip_without_a_peer

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
SHAPE = (2048, 768, 3072)  # the 111M model's
CASES = {
    f"{layout}-{activation}": (SHAPE, layout, activation)
    for layout in ("out_in", "in_out")
    for activation in ("gelu", "gelu_tanh")
}
CASES["2048x2048x8192-in_out-gelu"] = (2048, 2048, 8192), "in_out", "gelu"  # the 1.3B model's


def approximate(activation):
    return "tanh" if activation == "gelu_tanh" else "none"


@pytest.mark.benchmark(group="gelu_mlp forward+backward")
@KINDS
@pytest.mark.parametrize(("shape", "layout", "activation"), CASES.values(), ids=CASES)
def test_gelu_mlp(versus, shape, layout, activation, dtype, isa):
    skip_without_a_peer(dtype)
    tokens, d, hidden = shape
    x, b1, b2, dout = (torch.randn(s).to(dtype) for s in ((tokens, d), hidden, d, (tokens, d)))
    w1, w2 = (0.02 * torch.randn(hidden, d)).to(dtype), (0.02 * torch.randn(d, hidden)).to(dtype)
    if layout == "in_out":  # the (in, out) parameters of a Conv1D, seen as (out, in)
        w1, w2 = w1.t().contiguous().t(), w2.t().contiguous().t()
    leaves = [t.requires_grad_() for t in (x, w1, b1, w2, b2)]

    def torchs():
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate(activation)), w2, b2)

    versus(
        lambda: torch.autograd.grad(gelu_mlp(x, w1, b1, w2, b2, activation), leaves, dout),
        {"torch": lambda: torch.autograd.grad(torchs(), leaves, dout)},
        flops=12 * tokens * d * hidden,
        gemm=dtype,
        seconds=6.0,
    )


@pytest.mark.benchmark(group="swiglu forward+backward")
@KINDS
def test_swiglu(versus, dtype, isa):
    skip_without_a_peer(dtype)
    tokens, d, hidden = SHAPE
    x, b1, b2, dout = (torch.randn(s).to(dtype) for s in ((tokens, d), 2 * hidden, d, (tokens, d)))
    w1, w2 = (0.02 * torch.randn(2 * hidden, d)).to(dtype), (0.02 * torch.randn(d, hidden)).to(dtype)
    leaves = [t.requires_grad_() for t in (x, w1, b1, w2, b2)]

    def torchs():
        gate, up = F.linear(x, w1, b1).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w2, b2)

    versus(
        lambda: torch.autograd.grad(gelu_mlp(x, w1, b1, w2, b2, "swiglu"), leaves, dout),
        {"torch": lambda: torch.autograd.grad(torchs(), leaves, dout)},
        flops=18 * tokens * d * hidden,
        gemm=dtype,
        seconds=6.0,
    )


@pytest.mark.benchmark(group="gelu_mlp, between the products, forward")
@DTYPES
@ACTIVATIONS
def test_gelu(versus, activation, dtype):
    pre = torch.randn(SHAPE[0], SHAPE[2]).to(dtype)
    act = torch.empty_like(pre)
    versus(
        lambda: _native.gelu_mlp_fwd(pre, act, activation),
        {"torch": lambda: torch.ops.aten.gelu.out(pre, approximate=approximate(activation), out=act)},
        bytes=2 * pre.numel() * pre.element_size(),
    )


@pytest.mark.benchmark(group="gelu_mlp, between the products, backward")
@DTYPES
@ACTIVATIONS
def test_gelu_backward(versus, activation, dtype):
    pre, dact = (torch.randn(SHAPE[0], SHAPE[2]).to(dtype) for _ in range(2))
    act, dpre = torch.empty_like(pre), torch.empty_like(pre)
    dbias, mode = pre.new_empty(SHAPE[2]), approximate(activation)

    def torchs():
        torch.ops.aten.gelu_backward.grad_input(dact, pre, approximate=mode, grad_input=dpre)
        return dpre.sum(0)

    versus(
        lambda: _native.gelu_mlp_bwd(pre, dact, act, dpre, dbias, None, activation),
        {"torch, which keeps act": torchs},
        bytes=4 * pre.numel() * pre.element_size(),
    )


@pytest.mark.benchmark(group="gelu_mlp, bias gradient")
@DTYPES
@pytest.mark.parametrize("cols", [768, 2304])
def test_bias_grad(versus, cols, dtype):
    dout, dbias = torch.randn(SHAPE[0], cols).to(dtype), torch.empty(cols, dtype=dtype)
    versus(
        lambda: _native.gelu_mlp_bias_grad(dout, dbias, None),
        {"torch": lambda: dout.sum(0)},
        bytes=dout.numel() * dout.element_size(),
    )
