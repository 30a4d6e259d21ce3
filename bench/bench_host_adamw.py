"""AdamW on the host for weights that a device computes with in bf16, over 120M parameters, all in one interleaved run.

    pytest bench/bench_host_adamw.py --benchmark-only -o addopts=

Ours is the split master with bf16 gradients, 26 bytes a parameter, in a HostArena. torch's fused step and DeepSpeed's
CPU Adam (where deepspeed is installed; it compiles its kernel when first asked) work on fp32 parameters and gradients,
28 bytes. "in bf16" adds what such a step needs around it when gradients arrive and weights leave in bf16, as in
ZeRO-Offload: one conversion each. The limits move as many bytes as ours does, half of them read and half written.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from cgpt_ext._native import HostArena

from cgpt_ext import adamw_, split_master
from copies import copies

N, TILE = 120_000_000, 1_000_000
BYTES = 26  # a parameter: gradient, high and low half, exp_avg and exp_avg_sq; all but the gradient are written too
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def buffer(dtype):
    return torch.frombuffer(HostArena(N * dtype.itemsize), dtype=dtype)


def random(dtype=torch.float32):
    x = buffer(dtype)
    x.view(-1, TILE).copy_(0.02 * torch.randn(TILE))  # drawing every number would take longer than the measuring
    return x


def step_of_ours():
    high, low = buffer(torch.bfloat16), buffer(torch.int16)
    for part, given in zip((high, low), split_master(random()), strict=True):
        part.copy_(given)
    lists = ([high], [random(torch.bfloat16)], [random()], [random().abs_()])
    return lambda: adamw_(*lists, 3, **HYPER, lows=[low])


def step_of_torch():
    lists = ([random()], [random()], [random()], [random().abs_()])
    step = torch.tensor(3.0)
    return lambda: torch._fused_adamw_(*lists, [], [step], amsgrad=False, maximize=False, **HYPER), lists


def step_of_deepspeed():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    param = torch.nn.Parameter(random())
    param.grad = random()
    betas = (HYPER["beta1"], HYPER["beta2"])
    optimizer = DeepSpeedCPUAdam([param], lr=HYPER["lr"], betas=betas, weight_decay=HYPER["weight_decay"])
    return optimizer.step, ([param.data], [param.grad])


def in_bf16(step, lists):
    """The step, with its gradients from bf16 and its parameters to bf16."""
    grad, weight = random(torch.bfloat16), buffer(torch.bfloat16)

    def call():
        lists[1][0].copy_(grad)
        step()
        weight.copy_(lists[0][0])

    return call


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.benchmark(group="host adamw")
def test_host_adamw(versus, threads):
    rivals = {"torch fused fp32": step_of_torch()}
    if find_spec("deepspeed"):
        rivals["DeepSpeed fp32"] = step_of_deepspeed()
    peers = {name: step for name, (step, _) in rivals.items()}
    peers |= {name.replace("fp32", "in bf16"): in_bf16(*rival) for name, rival in rivals.items()}
    versus(step_of_ours(), peers, bytes=BYTES * N, limits=copies(BYTES * N, threads), seconds=10.0)
