"""The native part by itself: rows of logits to losses and dlogits, the rounded sum, and what the border refuses."""

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import _native
from numerics import assert_as_good_as_torch


def rows(logits, target, dout=None, ignore_index=-100, z_loss=0.0):
    """Losses, and dlogits where the logits were."""
    logits, loss = logits.contiguous().clone(), torch.empty(len(logits))
    _native.cross_entropy_rows(logits, target, dout, loss, ignore_index, z_loss)
    return loss, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_logits(isa, dtype):
    logits = torch.randn(4, 103).to(dtype)
    logits[:, ::2] = -float("inf")
    target = torch.tensor([1, 3, 101, 5])
    wide = logits.double().requires_grad_()
    F.cross_entropy(wide, target, reduction="sum").backward()
    theirs = logits.float().requires_grad_()
    F.cross_entropy(theirs, target, reduction="sum").backward()
    loss, dlogits = rows(logits, target, torch.ones(4))
    assert torch.equal(dlogits[:, ::2], torch.zeros(4, 52, dtype=dtype))
    assert_as_good_as_torch(dlogits, wide.grad, theirs.grad.to(dtype))
    assert_as_good_as_torch(
        loss,
        F.cross_entropy(wide, target, reduction="none"),
        F.cross_entropy(theirs, target, reduction="none").detach(),
    )
    loss, dlogits = rows(logits, target - 1, torch.ones(4))  # a masked target cannot be right
    assert (loss == float("inf")).all()
    assert torch.equal(dlogits.gather(1, (target - 1)[:, None]), -torch.ones(4, 1, dtype=dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_comes_out(isa, bad, dtype):
    for column in (0, 50, 102):
        logits = torch.randn(3, 103).to(dtype)
        logits[1, column] = bad
        loss, dlogits = rows(logits, torch.tensor([1, 2, 3]), torch.ones(3))
        assert loss[1].isnan()
        assert dlogits[1].isnan().all()
        assert loss[[0, 2]].isfinite().all()
        assert dlogits[[0, 2]].isfinite().all()
    assert rows(torch.full((1, 9), -float("inf")), torch.tensor([0]))[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_rows(isa, dtype):
    for size in (1, 2, 16, 17, 63, 1024, 1031, 50257):
        logits = torch.full((1, size), 0.75).to(dtype)
        loss, dlogits = rows(logits, torch.tensor([size - 1]), torch.ones(1))
        torch.testing.assert_close(loss.double(), torch.tensor([size], dtype=torch.float64).log(), rtol=2e-7, atol=1e-7)
        want = torch.full((size,), 1 / size, dtype=torch.float64)
        want[-1] -= 1
        torch.testing.assert_close(dlogits[0].double(), want, rtol=5e-7 if dtype == torch.float32 else 2**-8, atol=0)


def test_rows_further_apart_than_32_bits_count(isa):
    stride = (1 << 31) + 64  # memory never touched between the two rows is never there
    logits = torch.empty(stride + 100, dtype=torch.bfloat16).as_strided((2, 100), (stride, 1))
    logits.copy_(torch.randn(2, 100))
    target, loss = torch.tensor([3, 99]), torch.empty(2)
    want = rows(logits, target, torch.ones(2))
    _native.cross_entropy_rows(logits, target, torch.ones(2), loss, -100, 0.0)
    assert torch.equal(loss, want[0])
    assert torch.equal(logits, want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_bits_do_not_depend_on_threads(isa, dtype):
    logits, target, dout = 5 * torch.randn(40, 50257).to(dtype), torch.randint(0, 50257, (40,)), torch.randn(40)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(rows(logits, target, dout))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_the_native_border_holds_by_itself():
    logits, loss, target = torch.randn(4, 10), torch.empty(4), torch.tensor([0, 1, 2, 10])
    with pytest.raises(ValueError, match="target must be in"):
        _native.cross_entropy_rows(logits, target, None, loss, -100, 0.0)
    with pytest.raises(ValueError, match="row stride 0"):
        _native.cross_entropy_rows(logits[:1].expand(4, 10), target % 10, None, loss, -100, 0.0)
    with pytest.raises(ValueError, match="row stride 3"):
        _native.cross_entropy_rows(torch.randn(40).as_strided((4, 10), (3, 1)), target % 10, None, loss, -100, 0.0)
    with pytest.raises(ValueError, match=r"loss must be \(4,\)"):
        _native.cross_entropy_rows(logits, target % 10, None, loss[:3], -100, 0.0)
    with pytest.raises(ValueError, match=r"dout must be \(4,\)"):
        _native.cross_entropy_rows(logits, target % 10, loss[:3], loss, -100, 0.0)
    with pytest.raises(TypeError, match="logits must be float32 or bfloat16, got float16"):
        _native.cross_entropy_rows(logits.half(), target % 10, None, loss, -100, 0.0)
    with pytest.raises(ValueError, match=r"b must be \(4, 10\)"):
        _native.cross_entropy_add(logits, logits[:2].bfloat16(), logits)
    with pytest.raises(ValueError, match="out must be contiguous"):
        _native.cross_entropy_add(logits, logits.bfloat16(), torch.empty(10, 4).T)
