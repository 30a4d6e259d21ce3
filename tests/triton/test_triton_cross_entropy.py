"""cross_entropy's Triton kernel: on a GPU where there is one, else interpreted, 128 columns at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from numerics import DTYPES, assert_as_good_as_torch

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the infinities that are meant

from cgpt_ext.triton.cross_entropy import cross_entropy_rows_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100


def rows(logits, target, dout=None, ignore_index=IGNORED, z_loss=0.0):
    """(loss, dlogits or None); the logits given stay as they are, strides and all."""
    place = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device).copy_(logits)
    loss = torch.full(logits.shape[:1], math.nan, device=logits.device)
    cross_entropy_rows_triton(place, target, dout, loss, ignore_index, z_loss)
    if dout is None:
        assert torch.equal(place.nan_to_num(), logits.nan_to_num())
    return loss, None if dout is None else place


def by_torch(logits, target, dout, z_loss=0.0):
    logits = logits.detach().requires_grad_()
    loss = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
    if z_loss:
        loss = loss + torch.where(target == IGNORED, 0, z_loss * logits.logsumexp(-1).square())
    loss.backward(dout.to(loss.dtype))
    return loss, logits.grad


def make(N, V, dtype=torch.float32):
    target = torch.randint(V, (N,), device=DEVICE)
    target[1::3] = IGNORED
    return torch.randn(N, V).to(DEVICE, dtype) * 3, target, torch.randn(N, device=DEVICE)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "V"), [(1, 1), (3, 7), (4, 129), (5, 1031)])
def test_loss_and_gradient(N, V, dtype, z_loss):
    logits, target, dout = make(N, V, dtype)
    loss, dlogits = rows(logits, target, dout, z_loss=z_loss)
    want = by_torch(logits.double(), target, dout.double(), z_loss)
    assert_as_good_as_torch(loss, want[0], by_torch(logits.float(), target, dout, z_loss)[0], "loss")
    assert_as_good_as_torch(dlogits, want[1], by_torch(logits, target, dout, z_loss)[1], "dlogits")
    ignored = target == IGNORED
    assert (loss[ignored] == 0).all()
    assert (dlogits[ignored] == 0).all()
    assert torch.equal(loss, rows(logits, target, z_loss=z_loss)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart(dtype):
    """A row stride past the vocabulary: what lies between the rows is left alone."""
    logits, target, dout = make(4, 200, dtype)
    wide = torch.full((4, 230), 7.0, dtype=dtype, device=DEVICE)
    wide[:, :200] = logits
    loss = torch.empty(4, device=DEVICE)
    cross_entropy_rows_triton(wide[:, :200], target, dout, loss, IGNORED, 0.0)
    want = rows(logits, target, dout)
    assert torch.equal(loss, want[0])
    assert torch.equal(wide[:, :200], want[1])
    assert (wide[:, 200:] == 7).all()


def test_large_logits():
    logits, target, dout = make(4, 300)
    logits = (logits * 64).round() / 64 + 1000
    loss, dlogits = rows(logits, target, dout)
    want = by_torch(logits.double(), target, dout.double())
    torchs = by_torch(logits, target, dout)
    assert_as_good_as_torch(loss, want[0], torchs[0], "loss")
    assert_as_good_as_torch(dlogits, want[1], torchs[1], "dlogits")


def test_logits_of_minus_infinity():
    """Masked vocabulary entries: probability and gradient 0, also where they fill whole lanes."""
    logits, target, dout = make(3, 600)
    logits[:, 5:580] = -math.inf
    target[target >= 0] = 590
    loss, dlogits = rows(logits, target, dout)
    want = by_torch(logits.double(), target, dout.double())
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dlogits.double(), want[1], rtol=1e-5, atol=1e-7)


def test_nan_comes_out():
    logits, target, dout = make(3, 200)
    logits[0, 150] = math.nan
    loss, dlogits = rows(logits, target, dout)
    assert loss[0].isnan()
    assert dlogits[0].isnan().all()
    assert loss[1:].isfinite().all()
    assert dlogits[1:].isfinite().all()


@pytest.mark.parametrize("beyond", [-1, 200, 2**40])
def test_targets_outside_the_vocabulary(beyond):
    """A GPU cannot raise for them without waiting: they give NaN."""
    logits, target, dout = make(3, 200)
    target[0] = beyond
    loss, dlogits = rows(logits, target, dout)
    assert loss[0].isnan()
    assert dlogits[0].isnan().all()
    assert loss[1:].isfinite().all()


def test_ignore_index_may_be_a_token():
    logits, target, dout = make(4, 50)
    target[:] = torch.tensor([3, 0, 3, 1])
    loss, dlogits = rows(logits, target, dout, ignore_index=3)
    assert (loss[::2] == 0).all()
    assert (dlogits[::2] == 0).all()
    assert (loss[1::2] > 0).all()


def test_no_rows():
    assert rows(*make(0, 9))[0].shape == (0,)


def test_repeats_bit_for_bit():
    logits, target, dout = make(5, 700, torch.float16)
    first = rows(logits, target, dout)
    for _ in range(100 if DEVICE == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, rows(logits, target, dout), strict=True))
