"""The CUDA kernels of cross_entropy: rows of logits to losses and dlogits, sums over the tokens, and the whole op."""

import pytest
import torch
import torch.nn.functional as F

import cgpt_ext
from cgpt_ext import cross_entropy
from emulator import emulated, native
from numerics import DTYPES, assert_as_good_as_torch, run
from test_cross_entropy import check, make  # tests/ops/test_cross_entropy.py

# tokens, D, V: 1, primes, one row of several vectors a thread, vectors' tails, T % 128 == 64
SHAPES = [(1, 1, 1), (3, 5, 2), (13, 7, 101), (3, 8, 4099), (64, 16, 127)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    with emulated():
        check(*make(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_options_at_once(dtype, reduction):
    x, weight, target = make((30, 24, 96), dtype, ids=89)
    target[::4] = 3
    with emulated():
        check(x, weight, target, 3, 1e-2, reduction, 89, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(dtype):
    x, weight, target = make((16, 32, 203), dtype)
    with emulated():
        for scale in (30, 1000):  # logits to about 1e2 and 1e4
            scaled = x * scale
            target[:8] = (scaled[:8].float() @ weight.float().T).argmax(-1)
            check(scaled, weight, target, -100, 0.0, "none")


def rows(logits, target, dout=None, ignore_index=-100, z_loss=0.0):
    """Losses, and dlogits where the logits were."""
    logits, loss = logits.contiguous().clone(), torch.empty(len(logits))
    with emulated():
        native().cross_entropy_rows(logits, target, dout, loss, ignore_index, z_loss)
    return loss, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_logits(dtype):
    logits = torch.randn(4, 5003).to(dtype)  # odd rows: no alignment
    logits[:, ::2] = -float("inf")
    logits[1, :4900] = -float("inf")  # whole threads see nothing else
    target = torch.tensor([1, 4999, 101, 5])
    wide, theirs = (logits.to(t).requires_grad_() for t in (torch.float64, torch.float32))
    for leaf in (wide, theirs):
        F.cross_entropy(leaf, target, reduction="sum").backward()
    loss, dlogits = rows(logits, target, torch.ones(4))
    assert not dlogits[:, ::2].any()
    assert_as_good_as_torch(dlogits, wide.grad, theirs.grad.to(dtype))
    want, torchs = (F.cross_entropy(leaf.detach(), target, reduction="none") for leaf in (wide, theirs))
    assert_as_good_as_torch(loss, want, torchs)
    loss, dlogits = rows(logits, target - 1, torch.ones(4))  # a masked target cannot be right
    assert (loss == float("inf")).all()
    assert torch.equal(dlogits.gather(1, (target - 1)[:, None]), -torch.ones(4, 1, dtype=dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_comes_out(bad):
    for column in (0, 50, 102):
        logits = torch.randn(3, 103)
        logits[1, column] = bad
        for result in rows(logits, torch.tensor([1, 2, 3]), torch.ones(3)):
            assert result[1].isnan().all()
            assert result[[0, 2]].isfinite().all()
    assert rows(torch.full((1, 9), -float("inf")), torch.tensor([0]))[0].isnan()


def test_a_target_out_of_range_makes_its_row_nan():
    logits = torch.randn(4, 50)
    for bad in (-1, 50, 2**62, -(2**63)):
        for result in rows(logits, torch.tensor([1, bad, -100, 3]), torch.ones(4)):
            assert result[1].isnan().all()
            assert result[[0, 2, 3]].isfinite().all()
    x, weight, target = make((6, 8, 20), torch.float32)
    target[2] = 20
    with emulated():
        assert cross_entropy(x, weight, target).isnan()


def test_ignored_alone_is_nan_with_gradient_zero():
    x, weight, target = make((5, 8, 20), torch.bfloat16)
    with emulated():
        loss, dx, dweight = run(cross_entropy, x, weight, target.fill_(-100), dout=torch.tensor(1.0))
        empty = cross_entropy(x[:0], weight, target[:0])
        assert cross_entropy(x, weight, target, reduction="sum") == 0
    assert loss.isnan()
    assert empty.isnan()
    assert not dx.any()
    assert not dweight.any()


@pytest.mark.parametrize("mean", [False, True])
def test_sums_over_the_tokens(mean):
    losses, target = torch.rand(2500), torch.randint(0, 4, (2500,))
    total, dout = torch.empty(()), torch.empty(2500)
    with emulated():
        native().cross_entropy_total(losses, target, 3, mean, total)
        native().cross_entropy_share(target, 3, dout)
    kept = (target != 3).sum()
    want = losses.double().sum() / (kept if mean else 1)
    assert total == want.float()
    assert torch.equal(dout, (1.0 / kept.double()).float().expand(2500))


@pytest.mark.parametrize("a_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_add_rounds_once(a_dtype, out_dtype):
    a, b = torch.randn(7, 333).to(a_dtype), torch.randn(7, 333).bfloat16()
    out = torch.empty(7, 333, dtype=out_dtype)
    with emulated():
        native().cross_entropy_add(a, b, out)
        assert torch.equal(out, (a.float() + b.float()).to(out_dtype))
        if a_dtype == out_dtype:
            native().cross_entropy_add(a, b, a)
            assert torch.equal(a, out)


def test_bits_do_not_depend_on_the_order_of_threads():
    x, weight, target = make((9, 24, 301), torch.bfloat16)
    results = []
    for seed in range(3):
        with emulated(seed):
            results.append(run(cross_entropy, x, weight, target, -100, 1e-3, "mean", None, 4, dout=torch.tensor(1.0)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_native_module_is_the_cpus_again():
    with emulated():
        pass
    assert cgpt_ext._native is not native()
