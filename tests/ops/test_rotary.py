import pytest
import torch

from cgpt_ext import dispatch, rotary, rotary_ref
from numerics import DTYPES, compare, run

# (B, T, H, D), R: 1 and the least head, primes, no multiple of a vector, a part of the head, several heads, GPT sizes
SHAPES = [
    ((1, 1, 1, 2), 2),
    ((2, 3, 5, 7), 6),
    ((1, 13, 2, 24), 24),
    ((2, 5, 3, 64), 64),
    ((1, 64, 2, 80), 32),
    ((1, 3, 12, 128), 100),
    ((2, 7, 1, 40), 18),
]


def angles(time, rotated, spare=2):
    frequency = 10000.0 ** (-torch.arange(0, rotated, 2) / rotated)
    at = torch.arange(time + spare)[:, None] * frequency
    return at.cos(), at.sin()


def in_fp32(x, cos, sin, interleaved):
    return rotary_ref(x.float(), cos, sin, interleaved).to(x.dtype)


def check(x, cos, sin, interleaved, dout):
    def bound(function):
        return lambda x: function(x, cos, sin, interleaved)

    compare(bound(rotary), bound(rotary_ref), bound(in_fp32), (x,), dout)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rotated"), SHAPES)
def test_values_and_gradients(isa, shape, rotated, dtype, interleaved):
    x, dout = (torch.randn(shape).to(dtype) for _ in range(2))
    check(x, *angles(shape[1], rotated), interleaved, dout)


@pytest.mark.parametrize("interleaved", [False, True])
def test_views_of_a_packed_projection(isa, interleaved):
    packed = torch.randn(2, 9, 3, 4, 64).bfloat16()
    cos, sin = angles(9, 48)
    for x in packed.unbind(2):
        assert not x.is_contiguous()
        out = rotary(x, cos, sin, interleaved)
        assert out.is_contiguous()
        assert torch.equal(out, rotary(x.contiguous(), cos, sin, interleaved))
    turned = packed[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotary(turned, cos, sin, interleaved), rotary(packed[:, :, 0], cos, sin, interleaved))
    leaf = packed[:, :, 1].float().requires_grad_()
    rotary(leaf, cos, sin, interleaved).sum().backward()  # a gradient of stride 0
    want = rotary_ref(torch.ones_like(leaf), cos, -sin, interleaved)
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distance_alone(isa, interleaved):
    q, k = torch.randn(2, 1, 1, 1, 32).expand(2, 1, 20, 1, 32)
    cos, sin = angles(20, 32)
    turned_q, turned_k = (rotary(x, cos, sin, interleaved)[0, :, 0] for x in (q, k))
    products = turned_q @ turned_k.T
    for distance in range(20):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-5, atol=1e-5)


def test_the_gradient_turns_back():
    x = torch.randn(2, 6, 3, 16)
    cos, sin = angles(6, 12)
    out = rotary(x, cos, sin)
    (back,) = torch.autograd.grad(rotary(x.requires_grad_(), cos, sin), x, out)
    torch.testing.assert_close(back, x.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(out[..., 12:], x[..., 12:])
    assert torch.equal(out[:, 0], x[:, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_comes_out(isa, bad):
    x = torch.randn(1, 3, 2, 8)
    x[0, 1, 1, 2] = bad
    out = rotary(x, *angles(3, 8))
    spoilt = ~out.isfinite()
    assert spoilt[0, 1, 1, 2]
    assert spoilt[0, 1, 1, 6]
    assert spoilt.sum() == 2


def test_empty_and_repeats():
    cos, sin = angles(4, 8)
    assert rotary(torch.empty(0, 4, 2, 8), cos, sin).shape == (0, 4, 2, 8)
    assert rotary(torch.empty(2, 0, 2, 8), cos, sin).shape == (2, 0, 2, 8)
    x = torch.randn(2, 4, 3, 8).bfloat16()
    first = run(lambda x: rotary(x, cos, sin), x, dout=x)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(50):
            again = run(lambda x: rotary(x, cos, sin), x, dout=x)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_registered_with_torch(interleaved):
    x, (cos, sin) = torch.randn(2, 4, 3, 16).bfloat16(), angles(4, 8)
    torch.library.opcheck(torch.ops.cgpt_ext.rotary.default, (x, cos, sin, interleaved, False))
    torch.library.opcheck(torch.ops.cgpt_ext.rotary.default, (x.transpose(0, 1), cos, sin, interleaved, True))
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")

    def both(function):
        return run(lambda x: function(x, cos, sin, interleaved), x, dout=x)

    assert all(torch.equal(a, b) for a, b in zip(both(rotary), both(compiled), strict=True))
    with dispatch.use(rotary="reference"):
        assert torch.equal(rotary(x, cos, sin, interleaved), rotary_ref(x, cos, sin, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_gradients(interleaved):
    cos, sin = (a.double() for a in angles(3, 4))
    x = torch.randn(2, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary_ref(x, cos, sin, interleaved), (x,))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x, c, s: (x[0], c, s), ValueError, "x must be 4-dimensional, got shape (3, 2, 8)"),
        (
            lambda x, c, s: (x.transpose(2, 3), c, s),
            ValueError,
            "x must be contiguous in its last dimension, got strides (48, 16, 1, 8)",
        ),
        (lambda x, c, s: (x, c[:2], s), ValueError, "cos must be at least 3 rows, got (2, 4)"),
        (
            lambda x, c, s: (x[..., :7], c, s),
            ValueError,
            "cos must be 1 to 3 columns for x (2, 3, 2, 7), got (5, 4)",
        ),
        (lambda x, c, s: (x, c[:, :0], s), ValueError, "cos must be 1 to 4 columns for x (2, 3, 2, 8), got (5, 0)"),
        (lambda x, c, s: (x, c, s[:, :3]), ValueError, "sin must be (5, 4), got (5, 3)"),
        (lambda x, c, s: (x, c.bfloat16(), s), TypeError, "cos must be float32, got bfloat16"),
        (lambda x, c, s: (x.int(), c, s), TypeError, "x must be float32 or bfloat16 or float16, got int32"),
        (lambda x, c, s: (x, c, None), TypeError, "sin must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as caught:
        rotary(*arguments(torch.randn(2, 3, 2, 8), *angles(3, 8)))
    assert str(caught.value) == f"rotary: {message}"
