"""Causal attention against torch's scaled_dot_product_attention, a direction at a time, at the family's head dims.

q, k, v are slices of one packed projection, as GPT-2's models make them, and the gradient asked for is the packed one.
`attention` leaves joining the slices' gradients to autograd, as torch's does; `attention_qkv` writes them in place.
"""

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import attention, attention_qkv
from kinds import KINDS


def slices(qkv, shape):
    return [x.view(shape) for x in qkv.chunk(3, -1)]


def sliced(qkv, shape):
    return attention(*slices(qkv, shape), causal=True).flatten(2)


def packed(qkv, shape):
    return attention_qkv(qkv, shape[2], causal=True)


def sdpa(qkv, shape):
    q, k, v = (x.transpose(1, 2) for x in slices(qkv, shape))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("ours", [sliced, packed], ids=["attention", "attention_qkv"])
@KINDS
@pytest.mark.parametrize(
    "shape",
    [(2, 1024, 12, 64), (2, 1024, 12, 128), (1, 1024, 8, 128), (1, 2048, 32, 80)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(benchmark, versus, direction, shape, dtype, isa, ours):
    B, T, H, D = shape
    benchmark.group = f"attention {direction}"
    qkv = torch.randn(B, T, 3 * H * D).to(dtype)
    flops = 2 * B * H * T * T * D  # half of the square
    if direction == "forward":
        versus(lambda: ours(qkv, shape), {"sdpa": lambda: sdpa(qkv, shape)}, flops=flops, gemm=dtype)
        return
    qkv.requires_grad_()
    dout = torch.randn(B, T, H * D).to(dtype)

    def gradient(function):
        out = function(qkv, shape)
        return lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True)

    versus(gradient(ours), {"sdpa": gradient(sdpa)}, flops=2.5 * flops, gemm=dtype)
