"""Linear layer + cross-entropy against torch's two, as people write them: logits in bf16, and logits.float()."""

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import cross_entropy
from kinds import KINDS, skip_without_a_peer


def make(shape, dtype):
    n, d, v = shape
    x = torch.randn(n, d).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(v, d)).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, v, (n,))


def peers(x, weight, target):
    plain = {"torch": lambda: F.cross_entropy(F.linear(x, weight), target)}
    if x.dtype != torch.float32:
        plain["torch .float()"] = lambda: F.cross_entropy(F.linear(x, weight).float(), target)
    return plain


SHAPE = (2048, 768, 50257)


@pytest.mark.benchmark(group="cross_entropy forward+backward")
@KINDS
@pytest.mark.parametrize("shape", [SHAPE], ids=lambda s: "x".join(map(str, s)))
def test_cross_entropy(versus, shape, dtype, isa):
    skip_without_a_peer(dtype)
    x, weight, target = make(shape, dtype)

    def gradients(loss):
        return lambda: torch.autograd.grad(loss(), (x, weight))

    versus(
        gradients(lambda: cross_entropy(x, weight, target)),
        {name: gradients(loss) for name, loss in peers(x, weight, target).items()},
        flops=6 * shape[0] * shape[1] * shape[2],
        gemm=dtype,
        seconds=15.0,
    )


@pytest.mark.benchmark(group="cross_entropy forward, no grad")
@pytest.mark.parametrize("shape", [SHAPE], ids=lambda s: "x".join(map(str, s)))
def test_cross_entropy_evaluation(versus, shape):
    skip_without_a_peer(torch.bfloat16)
    x, weight, target = (t.detach() for t in make(shape, torch.bfloat16))
    versus(
        lambda: cross_entropy(x, weight, target),
        peers(x, weight, target),
        flops=2 * shape[0] * shape[1] * shape[2],
        seconds=15.0,
    )


@pytest.mark.benchmark(group="torch's GEMM alone: the three products of one step")
def test_gemm_share(versus):
    """Reads as a ratio: how much of our time torch's own three products, unchunked, would take by themselves."""
    skip_without_a_peer(torch.bfloat16)
    n, d, v = SHAPE
    x, weight, target = make(SHAPE, torch.bfloat16)
    plain_x, plain_weight = x.detach(), weight.detach()
    logits, dx, dweight = plain_x.new_empty(n, v), torch.empty_like(plain_x), torch.empty_like(plain_weight)
    logits.normal_()
    out = torch.empty_like(logits)

    def products():
        torch.mm(plain_x, plain_weight.T, out=out)
        torch.mm(logits, plain_weight, out=dx)
        torch.mm(logits.T, plain_x, out=dweight)

    versus(
        lambda: torch.autograd.grad(cross_entropy(x, weight, target), (x, weight)),
        {"three GEMMs": products},
        flops=6 * n * d * v,
        seconds=15.0,
    )
