"""Causal attention beside torch's scaled_dot_product_attention: `pytest bench/bench_attention.py --benchmark-only`.

Groups are a direction and a shape (B, T, H, D); q, k, v are slices of one packed projection, as GPT-2's models make them.
`packed` is `attention_qkv`. The backward figures of the other two hold the slices' own gradients.
"""

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import attention, attention_qkv

SHAPES = [(2, 1024, 12, 64), (1, 1024, 8, 128), (1, 2048, 32, 80), (8, 256, 12, 64)]


def slices(qkv, shape):
    return [x.view(shape) for x in qkv.chunk(3, -1)]


def ours(qkv, shape):
    return attention(*slices(qkv, shape), causal=True).flatten(2)


def packed(qkv, shape):
    return attention_qkv(qkv, shape[2], causal=True)


def sdpa(qkv, shape):
    q, k, v = (x.transpose(1, 2) for x in slices(qkv, shape))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("function", [ours, packed, sdpa], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(benchmark, direction, shape, dtype, function):
    B, T, H, D = shape
    benchmark.group = f"attention {direction} {shape} {dtype}"
    qkv = torch.randn(B, T, 3 * H * D).to(dtype)
    if direction == "forward":
        benchmark.pedantic(function, (qkv, shape), rounds=15, warmup_rounds=2)
        return
    out = function(qkv.requires_grad_(), shape)
    dout = torch.randn(B, T, H * D).to(dtype)

    def backward():
        qkv.grad = None
        out.backward(dout, retain_graph=True)

    benchmark.pedantic(backward, rounds=15, warmup_rounds=2)
