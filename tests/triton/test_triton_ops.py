"""The ops served by Triton when asked for by name: what they hand the launchers, forward and backward."""

import pytest
import torch

from cgpt_ext import (
    attention,
    attention_qkv,
    attention_ref,
    cross_entropy,
    cross_entropy_ref,
    dispatch,
    gelu_mlp,
    gelu_mlp_ref,
    layer_norm,
    layer_norm_ref,
)
from numerics import run

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape):
    return torch.randn(shape).to(DEVICE)


def assert_like_reference(op, reference, name, inputs, dout):
    with dispatch.use(**{name: "triton"}):
        got = run(op, *inputs, dout=dout)
    for ours, want in zip(got, run(reference, *inputs, dout=dout), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_attention():
    q, k, v = randn(1, 20, 2, 16), randn(1, 37, 1, 16), randn(1, 37, 1, 16)
    assert_like_reference(attention, attention_ref, "attention", (q, k, v, True), randn(1, 20, 2, 16))


def test_attention_qkv():
    """The gradient is written into one packed tensor."""

    def reference(qkv, n_head, causal):
        q, k, v = qkv.view(1, 21, 3, n_head, 8).unbind(2)
        return attention_ref(q, k, v, causal).flatten(2)

    assert_like_reference(attention_qkv, reference, "attention", (randn(1, 21, 48), 2, True), randn(1, 21, 16))


def test_layer_norm():
    x, residual, weight, bias = randn(3, 50), randn(3, 50), randn(50), randn(50)
    dout = [randn(3, 50), randn(3, 50)]
    assert_like_reference(layer_norm, layer_norm_ref, "layer_norm", (x, weight, bias, 1e-5, residual), dout)


def test_cross_entropy():
    x, weight, target = randn(6, 16), randn(70, 16), torch.randint(70, (6,), device=DEVICE)
    target[2] = -100
    arguments = (x, weight, target, -100, 1e-3)
    assert_like_reference(cross_entropy, cross_entropy_ref, "cross_entropy", arguments, torch.ones((), device=DEVICE))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_gelu_mlp(activation):
    width = 80 if activation == "swiglu" else 40
    x, w1, b1, w2, b2 = randn(2, 7, 16), randn(width, 16), randn(width), randn(16, 40), randn(16)
    assert_like_reference(gelu_mlp, gelu_mlp_ref, "gelu_mlp", (x, w1, b1, w2, b2, activation), randn(2, 7, 16))
