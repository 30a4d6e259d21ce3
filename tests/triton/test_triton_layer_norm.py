"""layer_norm's Triton kernels: on a GPU where there is one, else under Triton's interpreter, four rows a program."""

import math

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import layer_norm_ref
from numerics import DTYPES, assert_as_good_as_torch, compare, run

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN that goes in

from cgpt_ext.triton import layer_norm as kernels  # noqa: E402
from cgpt_ext.triton.layer_norm import layer_norm_bwd_triton, layer_norm_fwd_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that on a CPU a program of the backward pass has more rows than it takes at once."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "PROGRAMS", 3)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, residual):
        rows = x.shape[:-1].numel()
        y = torch.full_like(x, math.nan)
        h = None if residual is None else torch.full_like(x, math.nan)
        mean, rstd = torch.full((2, rows), math.nan, device=x.device).unbind()
        layer_norm_fwd_triton(x, residual, weight, bias, eps, y, h, mean, rstd)
        ctx.save_for_backward(x if h is None else h, weight, bias, mean, rstd)
        ctx.has_residual = h is not None
        return y if h is None else (y, h)

    @staticmethod
    def backward(ctx, dout, dh=None):
        h, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dweight = torch.full_like(h, math.nan), torch.full_like(weight, math.nan)
        dbias = None if bias is None else torch.full_like(bias, math.nan)
        layer_norm_bwd_triton(dout, dh, h, weight, mean, rstd, dx, dweight, dbias)
        return dx, dweight, dbias, None, dx if ctx.has_residual else None


def ours(x, weight, bias=None, eps=1e-5, residual=None):
    return _LayerNorm.apply(x, weight, bias, eps, residual)


def torch_op(x, weight, bias=None, eps=1e-5, residual=None):
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), None if bias is None else bias.to(h.dtype), eps)
    return y if residual is None else (y, h)


def make(shape, dtype=torch.float32):
    x, residual, dout, dh = (torch.randn(shape).to(DEVICE, dtype) for _ in range(4))
    weight, bias = (torch.randn(shape[-1]).to(DEVICE, dtype) for _ in range(2))
    return x, weight, bias, residual, dout, dh


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 127), (3, 3, 768), (29, 33)], ids=str)
def test_values_and_gradients(shape, dtype):
    x, weight, bias, residual, dout, dh = make(shape, dtype)
    compare(ours, layer_norm_ref, torch_op, (x, weight, bias, 1e-5, residual), [dout, dh])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_too_wide_for_registers(monkeypatch, dtype):
    """The kernels for rows past WIDE, in tiles of 64."""
    monkeypatch.setattr(kernels, "WIDE", 128)
    monkeypatch.setattr(kernels, "WIDE_TILE", 64)
    x, weight, bias, residual, dout, dh = make((5, 200), dtype)
    compare(ours, layer_norm_ref, torch_op, (x, weight, bias, 1e-5, residual), [dout, dh])
    compare(ours, layer_norm_ref, torch_op, (x, weight, None), dout)


def test_without_bias_and_residual():
    x, weight, _, _, dout, _ = make((7, 50))
    compare(ours, layer_norm_ref, torch_op, (x, weight, None), dout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weights(dtype):
    """Beside 16-bit rows; every row's gradient of weight and bias stays in fp32."""
    x, weight, bias, residual, dout, dh = make((9, 64), dtype)
    want = [*(t.double() for t in (x, weight, bias)), 1e-5, residual.double()]
    truth = run(layer_norm_ref, *want, dout=[dout.double(), dh.double()])
    got = run(ours, x, weight.float(), bias.float(), 1e-5, residual, dout=[dout, dh])
    for i in (3, 4):
        assert got[i].dtype == torch.float32
        # h is rounded to its dtype, in ours alone: eps of it in every term of the sum
        assert (got[i] - truth[i]).abs().max() < 9 * 3 * torch.finfo(dtype).eps


def test_a_large_offset():
    """The mean's own rounding, 2e-4 here, must not stay in y."""
    x, weight, bias, *_ = make((4, 300))
    x = (x * 64).round() / 64 + 4096  # exact, so that only the kernel's own rounding counts
    got, want = ours(x, weight, bias), layer_norm_ref(x.double(), weight.double(), bias.double())
    assert_as_good_as_torch(got, want, torch_op(x, weight, bias))


def test_statistics():
    x, weight, bias, *_ = make((6, 40))
    mean, rstd = torch.empty(2, 6, device=DEVICE).unbind()
    layer_norm_fwd_triton(x, None, weight, bias, 1e-5, torch.empty_like(x), None, mean, rstd)
    wide = x.double()
    torch.testing.assert_close(mean.double(), wide.mean(-1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rstd.double(), (wide.var(-1, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    y, again = torch.empty_like(x), torch.empty_like(x)
    layer_norm_fwd_triton(x, None, weight, bias, 1e-5, y, None, None, None)
    layer_norm_fwd_triton(x, None, weight, bias, 1e-5, again, None, mean, rstd)
    assert torch.equal(y, again)


def test_no_rows():
    x, weight, bias, *_ = make((0, 40))
    _, _, dweight, dbias = run(ours, x, weight, bias, dout=x)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_come_out(value):
    x, weight, bias, _, dout, _ = make((3, 40))
    x[1, 7] = value
    y, dx, dweight, _ = run(ours, x, weight, bias, dout=dout)
    for t in (y, dx):
        assert t[1].isnan().any()
        assert t[::2].isfinite().all()
    assert not dweight.isfinite().all()


def test_repeats_bit_for_bit():
    x, weight, bias, residual, dout, dh = make((20, 20), torch.bfloat16)
    arguments = (ours, x, weight, bias, 1e-5, residual)
    first = run(*arguments, dout=[dout, dh])
    for _ in range(100 if DEVICE == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*arguments, dout=[dout, dh]), strict=True))
