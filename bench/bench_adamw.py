"""AdamW and the gradient norm against torch, over 95M parameters in GPT-like tensors: well past any cache.

    pytest bench/bench_adamw.py --benchmark-only -o addopts=

torch's rival is its fused step on fp32 parameters; it has no master weights, so the mixed-precision rows stand beside
that same step.
"""

import pytest
import torch

from cgpt_ext import adamw_, grad_norm, split_master
from cgpt_ext.optim import AdamW

SHAPES = [(50257, 768), (2048, 768)] + 8 * [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768,), (3072,)]
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def random(dtype=torch.float32):
    return [(0.02 * torch.randn(shape)).to(dtype) for shape in SHAPES]


def step_of_ours(kept, grad_dtype):
    weights, rest = random(), {}
    if kept == "master":
        rest = {"masters": weights}
        weights = [w.bfloat16() for w in weights]
    if kept == "split":
        weights, lows = (list(half) for half in zip(*map(split_master, weights), strict=True))
        rest = {"lows": lows}
    lists = (weights, random(grad_dtype), random(), [x.abs() for x in random()])
    return lambda: adamw_(*lists, 3, **HYPER, **rest)


def step_of_torch():
    lists = (random(), random(), random(), [x.abs() for x in random()])
    steps = [torch.tensor(3.0) for _ in SHAPES]
    return lambda: torch._fused_adamw_(*lists, [], steps, amsgrad=False, maximize=False, **HYPER)


def step_of_optimizer(kind, **options):
    params = [torch.nn.Parameter(x) for x in random()]
    for p in params:
        p.grad = torch.randn_like(p)
    return kind(params, lr=1e-3, **options).step


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


OURS = {
    "fp32": lambda: step_of_ours(None, torch.float32),
    "bf16-fp32-master": lambda: step_of_ours("master", torch.bfloat16),
    "bf16-split-master": lambda: step_of_ours("split", torch.bfloat16),
}


@pytest.mark.benchmark(group="adamw")
@pytest.mark.parametrize("kept", OURS)
def test_adamw(versus, threads, kept):
    versus(OURS[kept](), {"torch fused fp32": step_of_torch()})


@pytest.mark.benchmark(group="adamw")
def test_optimizer(versus, threads):
    ours = step_of_optimizer(AdamW)
    versus(ours, {"torch.optim.AdamW(fused)": step_of_optimizer(torch.optim.AdamW, fused=True)})


@pytest.mark.benchmark(group="grad_norm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grad_norm(versus, threads, dtype):
    grads = random(dtype)
    read = sum(g.numel() * g.element_size() for g in grads)
    versus(lambda: grad_norm(grads), {"torch": lambda: torch.nn.utils.get_total_norm(grads)}, bytes=read)
