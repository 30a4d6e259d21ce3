"""linear against F.linear, forward and backward, at the projections in and out of attention.

in_out is how the trainer and GPT-2's checkpoints keep a weight, (in, out) seen as (out, in); out_in is nn.Linear's.
"""

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import linear
from kinds import KINDS, skip_without_a_peer


@pytest.mark.benchmark(group="linear forward+backward")
@KINDS
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize(
    "shape", [(2048, 768, 2304), (2048, 768, 768), (2048, 2048, 6144)], ids=lambda s: "x".join(map(str, s))
)
def test_linear(versus, shape, layout, dtype, isa):
    skip_without_a_peer(dtype)
    tokens, d_in, d_out = shape
    x, bias, dout = (torch.randn(s).to(dtype) for s in ((tokens, d_in), d_out, (tokens, d_out)))
    weight = (0.02 * torch.randn(d_out, d_in)).to(dtype)
    if layout == "in_out":
        weight = weight.t().contiguous().t()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    versus(
        lambda: torch.autograd.grad(linear(x, weight, bias), leaves, dout),
        {"torch": lambda: torch.autograd.grad(F.linear(x, weight, bias), leaves, dout)},
        flops=6 * tokens * d_in * d_out,
        gemm=dtype,
    )
