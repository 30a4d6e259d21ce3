"""Every parallel region with work for several threads: what four give is what one gives, bit for bit.

Small enough for .ci/sanitize, whose ThreadSanitizer sees a race only where a region has more than one task.
"""

import pytest
import torch

from cgpt_ext import (
    _native,
    adamw_,
    attention,
    cross_entropy,
    embedding,
    gelu_mlp,
    grad_norm,
    join_master,
    layer_norm,
    rotary,
    split_master,
)

N = (1 << 16) + 1000  # elements: three of adamw's and of the norm's tasks
ROWS, D = 160, 512  # of a hidden state


def tensors(dtype, *shapes):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(out, inputs):
    out = out.float()
    return [out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), inputs)]


def norm(dtype):
    x, weight, bias = tensors(dtype, (ROWS, D), (D,), (D,))
    return with_gradients(layer_norm(x, weight, bias), [x, weight, bias])


def mlp(dtype):
    inputs = tensors(dtype, (ROWS, 64), (1024, 64), (1024,), (64, 1024), (64,))
    return with_gradients(gelu_mlp(*inputs), inputs)


def heads(dtype):
    inputs = tensors(dtype, (2, 70, 2, 16), (2, 70, 2, 16), (2, 70, 2, 16))
    return with_gradients(attention(*inputs, causal=True), inputs)


def loss(dtype):
    x, weight = tensors(dtype, (ROWS, 16), (5000, 16))
    return with_gradients(cross_entropy(x, weight, torch.arange(ROWS)), [x, weight])


def rows(dtype):
    ids = torch.arange(2 * ROWS).view(2, ROWS) % 7
    wte, wpe = tensors(dtype, (7, D), (ROWS, D))
    return with_gradients(embedding(ids, wte, wpe), [wte, wpe])


def turns(dtype):
    (x,) = tensors(dtype, (2, 70, 8, 64))
    angles = torch.rand(70, 32)
    return with_gradients(rotary(x, angles.cos(), angles.sin()), [x])


def update(dtype):
    param, grad = (t.detach() for t in tensors(dtype, N, N))
    first, second = torch.zeros(N), torch.zeros(N)
    master = param.float()
    constants = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    masters = {"masters": [master]} if dtype != torch.float32 else {}
    adamw_([param], [grad], [first], [second], 1, **constants, **masters)
    return [param, first, second, master]


def halves(dtype):
    master = torch.randn(N)
    high, low = split_master(master)
    assert torch.equal(join_master(high, low), master)
    return [high, low]


def norms(dtype):
    grads = [t.detach() for t in tensors(dtype, N, 100)]
    return [grad_norm(grads)]


def product(dtype):
    """Its packed operands belong to all threads; the sum has two parts, in the longest of which kernels take it."""
    found = []
    m, n, k = 50, 70, 4100 if dtype == torch.bfloat16 else 1030
    a, b, bias = (x.detach() for x in tensors(dtype, (m, k), (n, k), (n,)))
    for x, y in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
        found.append(torch.full((m, n), float("nan"), dtype=dtype))
        _native.linear(x, y, bias, 0.5, None, found[-1])
    assert torch.equal(*found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [norm, mlp, product, heads, loss, rows, turns, update, halves, norms])
def test_four_threads_give_what_one_gives(isa, op, dtype):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            found.append(op(dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, four) for one, four in zip(*found, strict=True))
    assert all(x.isfinite().all() for x in found[0])
