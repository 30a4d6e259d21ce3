"""layer_norm forward + backward against torch's, over the widths of the family."""

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import layer_norm


@pytest.mark.benchmark(group="layer_norm forward+backward")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(2048, 768), (2048, 2048)], ids=lambda s: "x".join(map(str, s)))
def test_layer_norm(versus, shape, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight, bias = (torch.randn(shape[-1]).to(dtype).requires_grad_() for _ in range(2))
    dout = torch.randn(shape).to(dtype)
    leaves = (x, weight, bias)
    versus(
        lambda: torch.autograd.grad(layer_norm(x, weight, bias), leaves, dout),
        {"torch": lambda: torch.autograd.grad(F.layer_norm(x, shape[-1:], weight, bias), leaves, dout)},
        bytes=5 * x.numel() * x.element_size(),
    )
