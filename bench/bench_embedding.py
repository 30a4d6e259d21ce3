"""embedding with positions against F.embedding + F.embedding, on ids as unevenly spread as text's are."""

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import embedding

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
SHAPES = pytest.mark.parametrize("shape", [(2, 1024), (16, 1024)], ids=lambda s: "x".join(map(str, s)))
VOCABULARY, WIDTH = 50257, 768


def make(shape, dtype):
    ids = (torch.rand(shape) ** 4 * VOCABULARY).long()
    wte, wpe = torch.randn(VOCABULARY, WIDTH).to(dtype), torch.randn(shape[1], WIDTH).to(dtype)
    positions = torch.arange(shape[1])
    return wte, wpe, lambda: embedding(ids, wte, wpe), lambda: F.embedding(ids, wte) + F.embedding(positions, wpe)


@pytest.mark.benchmark(group="embedding forward")
@DTYPES
@SHAPES
def test_forward(versus, shape, dtype):
    _, _, ours, torchs = make(shape, dtype)
    versus(ours, {"torch": torchs}, bytes=2 * shape[0] * shape[1] * WIDTH * dtype.itemsize)


@pytest.mark.benchmark(group="embedding forward+backward")
@DTYPES
@SHAPES
def test_forward_and_backward(versus, shape, dtype):
    wte, wpe, ours, torchs = make(shape, dtype)
    leaves, dout = (wte.requires_grad_(), wpe.requires_grad_()), torch.randn(*shape, WIDTH).to(dtype)
    versus(
        lambda: torch.autograd.grad(ours(), leaves, dout),
        {"torch": lambda: torch.autograd.grad(torchs(), leaves, dout)},
        bytes=wte.numel() * dtype.itemsize,
    )
