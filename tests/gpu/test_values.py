"""Every op x implementation x dtype x shape against fp64, at the bar that torch sets on the same device."""

import pytest
import torch

import cgpt_ext
from numerics import compare
from problems import GPU, SIZES, attempt, everywhere

HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(("device", "name", "build", "size", "dtype"), everywhere(SIZES))
def test_values_and_gradients(device, name, build, size, dtype):
    problem = build(device, dtype, *size)
    sides = (problem.ours, problem.reference, problem.torchs)
    attempt(problem.op, device, name, lambda: compare(*sides, problem.inputs, problem.dout, dtype))


DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grad_norm(device, dtype):
    """The bits are the CPU's; fp64 says that they are right."""
    grads = [torch.randn(n).to(dtype) for n in (1, 7, 50_001, 768 * 300)]
    truth = torch.cat([g.double() for g in grads]).norm()
    found = cgpt_ext.grad_norm([g.to(device) for g in grads])
    assert found.device.type == device
    assert abs(found.item() - truth.item()) <= 1e-6 * truth.item()
    assert found.item() == pytest.approx(cgpt_ext.grad_norm(grads).item(), rel=1e-7)
    sums = cgpt_ext.grad_square_sums([g.to(device) for g in grads])
    assert torch.equal(sums.cpu(), cgpt_ext.grad_square_sums(grads))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kept", ["plain", "split", "split, bf16 moments"])
def test_adamw_steps_with_its_step_on_the_device(device, kept):
    """Three steps, the bits of `adamw_ref` on the CPU."""

    def state():
        torch.manual_seed(1)
        masters, rest = [torch.randn(n) for n in (1, 33, 16_385)], {}
        if kept != "plain":
            masters, rest["lows"] = (list(half) for half in zip(*map(cgpt_ext.split_master, masters), strict=True))
        half = kept.endswith("moments")
        if half:
            rest["stochastic_rounding_seed"] = 2**62 + 7
            rest["rounding_places"] = [(0, 0), (5, 2**32), (2, 2**32 - 4096)]
        dtype = torch.bfloat16 if half else torch.float32
        moments = [[torch.zeros(p.shape, dtype=dtype) for p in masters] for _ in range(2)]
        return masters, [torch.randn(p.shape).to(p.dtype) for p in masters], *moments, rest

    def moved(part):
        return [x.to(device, copy=True) for x in part]

    params, grads, m, v, rest = state()
    ours = [moved(part) for part in (params, grads, m, v)]
    ours_rest = rest | ({"lows": moved(rest["lows"])} if "lows" in rest else {})
    step, scale = torch.zeros((), device=device), torch.tensor(0.5)
    for t in (1, 2, 3):
        step.fill_(t)
        cgpt_ext.adamw_(*ours, step, grad_scale=scale.to(device), **HYPER, **ours_rest)
        cgpt_ext.adamw_ref(params, grads, m, v, t, grad_scale=scale, **HYPER, **rest)
    kept_by_us = [*ours[0], *ours[2], *ours[3], *ours_rest.get("lows", [])]
    for mine, theirs in zip(kept_by_us, [*params, *m, *v, *rest.get("lows", [])], strict=True):
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_comes_out(device):
    """And nothing hangs."""
    for bad in (float("nan"), float("inf")):
        q, k, v = (torch.randn(1, 70, 2, 64, device=device).bfloat16() for _ in range(3))
        k[0, 3, 0, 5] = bad
        out = cgpt_ext.attention(q, k, v, causal=True)
        assert not out[0, 3:, 0].isfinite().all()
        assert out[0, :, 1].isfinite().all()
        x = torch.randn(5, 768, device=device)
        x[2, 7] = bad
        y = cgpt_ext.layer_norm(x, torch.ones(768, device=device))
        assert y[2].isnan().all()
        assert y[[0, 1, 3, 4]].isfinite().all()
