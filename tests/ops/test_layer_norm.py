import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import layer_norm, layer_norm_ref
from cgpt_ext.nn import LayerNorm
from numerics import DTYPES, compare, run

SHAPES = [(1, 1), (3, 5), (2, 3, 64), (7, 127), (5, 768), (257, 40), (1, 4096)]


def torch_layer_norm(x, weight, bias, eps=1e-5, residual=None):
    h = x if residual is None else x + residual
    y = F.layer_norm(h, (x.shape[-1],), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
    return y if residual is None else (y, h)


def make(shape, dtype, weight_dtype=None):
    d = shape[-1]
    x, residual, dy, dh = (torch.randn(shape).to(dtype) for _ in range(4))
    weight, bias = (1 + 0.1 * torch.randn(d), 0.1 * torch.randn(d))
    return x, residual, weight.to(weight_dtype or dtype), bias.to(weight_dtype or dtype), dy, dh


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(isa, shape, dtype):
    x, residual, weight, bias, dy, dh = make(shape, dtype)
    compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, bias, 1e-5), dy)
    compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, bias, 1e-5, residual), (dy, dh))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weights(isa, dtype):
    x, _, weight, bias, dy, _ = make((9, 77), dtype, torch.float32)
    compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, bias), dy)


def test_without_bias(isa):
    x, _, weight, _, dy, _ = make((9, 96), torch.float32)
    compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, None), dy)


def test_large_mean_keeps_its_variance(isa):
    x, _, weight, bias, dy, _ = make((4, 512), torch.float32)
    x += 30.0  # a one-pass variance would lose three digits here
    compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, bias), dy)


def test_unlike_beginning_keeps_the_variance(isa):
    x, _, weight, bias, dy, _ = make((3, 1 << 15), torch.float32)
    x[:, :32] += 3000.0  # the first pass is centred on these, 32 standard deviations from the mean
    compare(layer_norm, layer_norm_ref, torch_layer_norm, (x, weight, bias), dy)


@pytest.mark.parametrize("width", [96, 101])
def test_sum_is_rounded_as_torch_rounds(isa, width):
    x, residual = torch.randint(-(1 << 15), 1 << 15, (2, 50, width)).to(torch.int16).view(torch.bfloat16)
    residual[::2] = x[::2] * 2.0**-8  # about half of these sums are halfway between two values
    weight = torch.ones(width, dtype=torch.bfloat16)
    _, h = layer_norm(x, weight, residual=residual)
    torch.testing.assert_close(h, x + residual, rtol=0, atol=0, equal_nan=True)


def test_strided_input_and_empty_batch(isa):
    x, _, weight, bias, dy, _ = make((6, 64), torch.bfloat16)
    wide = torch.randn(6, 3, 64).to(torch.bfloat16)
    assert torch.equal(layer_norm(wide[:, 1], weight, bias), layer_norm(wide[:, 1].contiguous(), weight, bias))
    compare(layer_norm, layer_norm_ref, torch_layer_norm, (x.t().contiguous().t(), weight, bias), dy)
    assert layer_norm(x[:0], weight, bias).shape == (0, 64)
    out = run(layer_norm, x[:0], weight, bias, dout=dy[:0])
    assert torch.equal(out[2], torch.zeros_like(weight))


def test_nan_outlives_rounding(isa):
    x, weight = torch.randn(2, 64).bfloat16(), torch.ones(64)
    bias = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounded up, it would be -0
    assert layer_norm(x, weight, bias).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [7, 58])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_comes_out(isa, bad, column, dtype):
    x, _, weight, bias, _, _ = make((3, 64), dtype)
    x[1, column] = bad
    y = layer_norm(x, weight, bias)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_bits_do_not_depend_on_threads(isa):
    x, residual, weight, bias, dy, dh = make((300, 96), torch.bfloat16)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(layer_norm, x, weight, bias, 1e-5, residual, dout=(dy, dh)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_the_sum_is_used():
    x, residual, weight, bias, _, dh = make((4, 8), torch.float32)
    x.requires_grad_()
    _, h = layer_norm(x, weight, bias, residual=residual)
    h.backward(dh)
    assert torch.equal(x.grad, dh)


def test_reference_gradients():
    args = [torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    args = [a.requires_grad_() for a in args]
    assert torch.autograd.gradcheck(lambda x, w: layer_norm_ref(x, w, w, 1e-5, x.flip(0)), args)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_opcheck(save, with_residual):
    x, residual, weight, bias, dy, dh = make((4, 6, 16), torch.float32)
    residual = residual if with_residual else None
    ops = torch.ops.cgpt_ext
    torch.library.opcheck(ops.layer_norm_fwd.default, (x, weight, bias, residual, 1e-5, save))
    torch.library.opcheck(ops.layer_norm_fwd.default, (x.transpose(0, 1), weight, None, None, 1e-5, save))
    _, _, mean, rstd = ops.layer_norm_fwd(x, weight, bias, None, 1e-5, True)
    torch.library.opcheck(ops.layer_norm_bwd.default, (dy, dh if with_residual else None, x, weight, mean, rstd, True))


def test_compiled_equals_eager():
    x, residual, weight, bias, dy, dh = make((4, 6, 64), torch.bfloat16)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    eager = run(layer_norm, x, weight, bias, 1e-5, residual, dout=(dy, dh))
    again = run(compiled, x, weight, bias, 1e-5, residual, dout=(dy, dh))
    assert all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x, w: (x, w[:7]), ValueError, "layer_norm: weight must be (8,), got (7,)"),
        (lambda x, w: (x, w, w[:7]), ValueError, "layer_norm: bias must be (8,), got (7,)"),
        (lambda x, w: (x, w, w, 1e-5, x[:1]), ValueError, "layer_norm: residual must be (2, 8), got (1, 8)"),
        (
            lambda x, w: (x.int(), w),
            TypeError,
            "layer_norm: x must be float32 or bfloat16 or float16, got int32",
        ),
        (lambda x, w: (x, w.bfloat16()), TypeError, "layer_norm: weight must be float32, got bfloat16"),
        (lambda x, w: (3, w), TypeError, "layer_norm: x must be a torch.Tensor, got int"),
        (
            lambda x, w: (x[:, :0], w[:0]),
            ValueError,
            "layer_norm: x must be non-empty in its last dimension, got (2, 0)",
        ),
        (lambda x, w: (x[0, 0], w), ValueError, "layer_norm: x must be at least 1-dimensional, got a scalar"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as caught:
        layer_norm(*arguments(torch.randn(2, 8), torch.randn(8)))
    assert str(caught.value) == message


def test_module_is_torchs(isa):
    torch_module = torch.nn.LayerNorm(48, eps=1e-3)
    ours = LayerNorm(48, eps=1e-3)
    torch.nn.init.normal_(torch_module.weight)
    ours.load_state_dict(torch_module.state_dict())
    x = torch.randn(5, 48)
    torch.testing.assert_close(ours(x), torch_module(x))
    with pytest.raises(ValueError, match="must be one dimension"):
        LayerNorm((4, 8))
