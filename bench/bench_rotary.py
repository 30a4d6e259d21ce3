"""rotary forward + backward of queries, as views of a packed projection, against the same in plain torch."""

import pytest
import torch

from cgpt_ext import rotary, rotary_ref


@pytest.mark.benchmark(group="rotary forward+backward")
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(2, 1024, 12, 64), (2, 1024, 10, 128)], ids=lambda s: "x".join(map(str, s)))
def test_rotary(versus, shape, dtype, interleaved):
    B, T, H, D = shape
    x = torch.randn(B, T, 3, H, D).to(dtype)[:, :, 0].requires_grad_()
    dout = torch.randn(shape).to(dtype)
    at = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    cos, sin = at.cos(), at.sin()
    versus(
        lambda: torch.autograd.grad(rotary(x, cos, sin, interleaved), x, dout),
        {"torch": lambda: torch.autograd.grad(rotary_ref(x, cos, sin, interleaved), x, dout)},
        bytes=4 * x.numel() * x.element_size(),
    )
