"""gelu_mlp's CUDA kernels: our GEMM in every tile and layout, its epilogues, and those between torch's products."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import gelu_mlp, gelu_mlp_ref
from cgpt_ext.dispatch import use
from emulator import emulated, native
from numerics import DTYPES, assert_as_good_as_torch, compare, error, run
from test_gelu_mlp import ACTIVATIONS, check_one_element, make, torch_gelu_mlp  # tests/ops/test_gelu_mlp.py

HALVES = [torch.bfloat16, torch.float16]
# One more than a tile each way, and two stages and a quarter deep.
TILES = [("64x64", (65, 72, 72)), ("128x128", (129, 136, 72)), ("128x256", (129, 264, 72))]
LAYOUTS = [(True, True), (True, False), (False, False)]  # whether a and b lie along k


@pytest.fixture(autouse=True)
def on_gpu():
    with mock.patch("cgpt_ext.ops.gelu_mlp.on_gpu", return_value=True):
        yield


def matrix(rows, cols, dtype, along=True):
    return torch.randn(rows, cols).to(dtype) if along else torch.randn(cols, rows).to(dtype).t()


def partials(rows, cols):
    return torch.full(((rows + 31) // 32, cols), float("nan"))


@pytest.mark.parametrize("along", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("tile", "shape"), TILES)
def test_product(tile, shape, dtype, along):
    m, n, k = shape
    m, k = (m, k) if along[0] else (m + 7, k + 1)  # across k it is m that comes in eights, and k is any
    a, b = matrix(m, k, dtype, along[0]), matrix(n, k, dtype, along[1])
    for seed, bias in enumerate((matrix(1, n, dtype)[0], None)):
        out = torch.full((m, n), float("nan"), dtype=dtype)
        with emulated(seed) as device:
            native().gelu_mlp_product(a, b, bias, out, tile)
            counters = device.counters()
        wide = a.double() @ b.double().t() + (0 if bias is None else bias.double())
        assert_as_good_as_torch(out, wide, F.linear(a, b, bias), device.blame(out, wide))
        assert counters["bank_conflicts"] == 0, device.conflict()
        blocks = -(-m // int(tile.split("x")[0])) * -(-n // int(tile.split("x")[1]))
        assert counters["mma"] >= blocks * 3 * 2


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 64, 8), (64, 8, 32), (3, 16, 264), (97, 88, 24)])
def test_product_of_odd_shapes(shape):
    m, n, k = shape
    wide = torch.randn(2 * n, k + 16).bfloat16()  # rows and columns further apart than they are long
    for b in (wide[::2, :k], torch.randn(k + 8, n + 24).bfloat16()[:k, :n].t()):
        a, out = matrix(m, k, torch.bfloat16), torch.empty(m, n, dtype=torch.bfloat16)
        with emulated():
            native().gelu_mlp_product(a, b, None, out, "auto")
        assert_as_good_as_torch(out, a.double() @ b.double().t(), F.linear(a, b))


@pytest.mark.parametrize("depth", [0, 1, 31, 32, 33, 64, 95, 97, 129])
def test_a_sum_over_any_number_of_tokens(depth):
    a, b = matrix(8, depth, torch.bfloat16, False), matrix(16, depth, torch.bfloat16, False)
    out = torch.full((8, 16), float("nan"), dtype=torch.bfloat16)
    with emulated():
        native().gelu_mlp_product(a, b, None, out, "auto")
    assert_as_good_as_torch(out, a.double() @ b.double().t(), torch.mm(a, b.t()))


def test_a_single_line_may_have_any_stride():
    storage = torch.randn(64).bfloat16()
    out, alone = torch.empty(8, 8, dtype=torch.bfloat16), torch.empty(1, 8, dtype=torch.bfloat16)
    a, b = storage.as_strided((8, 1), (1, 5)), storage[8:].as_strided((8, 1), (1, 3))
    row, rows = storage.as_strided((1, 8), (5, 1)), storage.view(8, 8)
    with emulated():
        native().gelu_mlp_product(a, b, None, out, "auto")
        native().gelu_mlp_product(row, rows, None, alone, "auto")
    assert torch.equal(out, a * b.t())
    assert_as_good_as_torch(alone, row.double() @ rows.double().t(), F.linear(row, rows))


def activated(z, activation):
    if activation == "swiglu":
        gate, up = z.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tile", "shape"), TILES)
def test_linear_and_activation(tile, shape, activation, along):
    """Forward and backward of one launch each, in bf16 and fp16, all of it at torch's own error."""
    m, n, k = shape
    width = 2 * n if activation == "swiglu" else n
    dtype = torch.bfloat16 if along else torch.float16
    x, w1, b1 = matrix(m, k, dtype), matrix(width, k, dtype, along), matrix(1, width, dtype)[0]
    dout, w2 = matrix(m, k, dtype), matrix(k, n, dtype, along)
    outputs = [torch.full((m, cols), float("nan"), dtype=dtype) for cols in (width, n, width, n)]
    pre, act, dpre, again = outputs
    db1 = torch.full((width,), float("nan"), dtype=dtype)
    with emulated(3) as device:
        native().gelu_mlp_linear_fwd(x, w1, b1, pre, act, activation, tile)
        assert device.counters()["bank_conflicts"] == 0, device.conflict()
        native().gelu_mlp_linear_bwd(dout, w2, pre, dpre, again, db1, partials(m, width), activation, tile)
    z = F.linear(x.double(), w1.double(), b1.double())
    assert_as_good_as_torch(pre, z, F.linear(x, w1, b1), "pre")
    assert_as_good_as_torch(act, activated(z, activation), activated(F.linear(x, w1, b1), activation), "act")

    def backward(t):
        z = pre.detach().to(t).requires_grad_()
        a = activated(z, activation)
        a.backward(dout.to(t) @ w2.to(t))
        return a, z.grad, z.grad.sum(0)

    names = ("act again", "dpre", "db1")
    for name, got, want, theirs in zip(
        names, (again, dpre, db1), backward(torch.float64), backward(dtype), strict=True
    ):
        assert_as_good_as_torch(got, want, theirs, name)


def test_without_what_is_not_asked_for():
    dtype, m, n, k = torch.bfloat16, 70, 40, 24
    x, w1, dout, w2 = matrix(m, k, dtype), matrix(n, k, dtype), matrix(m, k, dtype), matrix(k, n, dtype)
    pre, act, dpre, db1 = (torch.empty(m, n, dtype=dtype) for _ in range(4))
    alone, bare = torch.empty_like(act), torch.empty_like(dpre)
    with emulated():
        native().gelu_mlp_linear_fwd(x, w1, None, pre, act, "gelu", "auto")
        native().gelu_mlp_linear_fwd(x, w1, None, None, alone, "gelu", "auto")
        native().gelu_mlp_linear_bwd(dout, w2, pre, dpre, torch.empty_like(act), db1[0], partials(m, n), "gelu", "auto")
        native().gelu_mlp_linear_bwd(dout, w2, pre, bare, None, None, None, "gelu", "auto")
    assert torch.equal(act, alone)
    assert torch.equal(dpre, bare)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 8), (70, 1027), (5, 1032)])
def test_between_torchs_products(shape, dtype, activation):
    rows, cols = shape
    width = 2 * cols if activation == "swiglu" else cols
    pre, dact = matrix(rows, width, dtype), matrix(rows, cols, dtype)
    act, again, dpre = torch.empty_like(dact), torch.empty_like(dact), torch.empty_like(pre)
    db1, summed = pre.new_empty(width), pre.new_empty(width)
    with emulated(1):
        native().gelu_mlp_fwd(pre, act, activation)
        native().gelu_mlp_bwd(pre, dact, again, dpre, db1, partials(rows, width), activation)
        native().gelu_mlp_bias_grad(pre, summed, partials(rows, width))

    def both(t):
        z = pre.to(t).requires_grad_()
        a = activated(z, activation)
        a.backward(dact.to(t))
        return a, a, z.grad, z.grad.sum(0), pre.to(t).sum(0)

    results = zip((act, again, dpre, db1, summed), both(torch.float64), both(dtype), strict=True)
    for got, want, theirs in results:
        assert_as_good_as_torch(got, want, theirs)


def test_in_place_and_off_alignment():
    storage = torch.randn(3 * 40 * 64 + 1)[1:]  # rows that begin at no 16-byte boundary
    pre, dact, act = storage.view(3, 40, 64)
    want = (
        F.gelu(pre.double()),
        dact.double() * torch.func.vmap(torch.func.vmap(torch.func.grad(F.gelu)))(pre.double()),
    )
    with emulated():
        native().gelu_mlp_bwd(pre, dact, act, dact, None, None, "gelu")
    assert error(act, want[0]) < 2e-6
    assert error(dact, want[1]) < 2e-6
    with emulated():
        native().gelu_mlp_fwd(pre, pre, "gelu")
    assert torch.equal(pre, act)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out(activation):
    z = torch.tensor([[13.5, 200.0, 1e20, 3e38, -13.5, -200.0, -1e20, -3e38, float("inf"), float("nan")]])
    pre = torch.cat([z, torch.ones_like(z)], 1) if activation == "swiglu" else z
    act, dpre = torch.empty_like(z), torch.empty_like(pre)
    with emulated():
        native().gelu_mlp_bwd(pre, torch.ones_like(z), act, dpre, None, None, activation)
    finite = [1, 2, 3, 5, 6, 7] if activation == "swiglu" else list(range(8))  # silu(-13.5) is not 0 yet
    assert torch.equal(act[:, finite], z[:, finite].clamp(min=0))
    assert torch.equal(dpre[:, finite], (z[:, finite] > 0).float())
    assert act[0, 8] == float("inf")
    assert act[0, 9].isnan()
    assert dpre[0, 9].isnan()


# (x's shape, F): one token, one more than a small tile of tokens, none
SHAPES = [((1, 8), 8), ((2, 33, 24), 72), ((0, 16), 24)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("shape", "hidden"), SHAPES)
def test_whole_op_by_our_gemm(shape, hidden, dtype, activation):
    inputs, dy = make(shape, hidden, dtype, activation=activation)
    with emulated(), use(gelu_mlp="native"):
        compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, (*inputs, activation), dy)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "hidden"), [((3, 5), 7), *SHAPES[1:]])
def test_whole_op_by_torchs_products(shape, hidden, dtype, activation):
    inputs, dy = make(shape, hidden, dtype, activation=activation)
    with emulated(), use(gelu_mlp="cublas"):
        compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, (*inputs, activation), dy)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element(dtype, activation):
    with emulated(), use(gelu_mlp="cublas"):
        check_one_element(dtype, activation)


@pytest.mark.parametrize("implementation", ["native", "cublas"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_layouts_biases_and_masks(implementation, activation):
    (x, w1, b1, w2, b2), dy = make((2, 40, 24), 40, torch.bfloat16, activation=activation)
    inputs = (x.transpose(0, 1), w1.t().contiguous().t(), b1, w2.t().contiguous().t(), b2, activation)
    wide = torch.randn(w1.shape[0], 48).bfloat16()[:, ::2]  # neither rows nor columns are contiguous
    with emulated(), use(gelu_mlp=implementation):
        compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, inputs, dy.transpose(0, 1))
        compare(gelu_mlp, gelu_mlp_ref, torch_gelu_mlp, (x, wide, None, w2, None, activation), dy)
        every = run(gelu_mlp, x, w1, b1, w2, b2, activation, dout=dy)
        again = run(gelu_mlp, x, w1, b1, w2, b2, activation, dout=dy)
        assert all(torch.equal(a, b) for a, b in zip(every, again, strict=True))
        for wanted in range(5):
            leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, w1, b1, w2, b2))]
            gelu_mlp(*leaves, activation).backward(dy)
            assert torch.equal(leaves[wanted].grad, every[wanted + 1])
        with torch.no_grad():
            assert torch.equal(gelu_mlp(x, w1, b1, w2, b2, activation), every[0])


@pytest.mark.parametrize("seed", range(3))
def test_bits_do_not_depend_on_the_order_of_threads(seed):
    inputs, dy = make((97, 24), 72, torch.bfloat16)
    with use(gelu_mlp="native"):
        with emulated(100):
            first = run(gelu_mlp, *inputs, dout=dy)
        with emulated(seed):
            again = run(gelu_mlp, *inputs, dout=dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("implementation", ["native", "cublas"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_comes_out(bad, implementation):
    inputs, dy = make((66, 24), 48, torch.bfloat16)
    inputs[0][2, 7] = bad
    with emulated(), use(gelu_mlp=implementation):
        y, dx, *_ = run(gelu_mlp, *inputs, dout=dy)
    others = [i for i in range(66) if i != 2]
    assert not y[2].isfinite().any()
    assert y[others].isfinite().all()
    assert dx[others].isfinite().all()


def test_backward_is_served_by_who_served_the_forward():
    inputs, dy = make((5, 16), 24, torch.bfloat16)
    leaves = [t.requires_grad_() for t in inputs]
    with emulated():
        with use(gelu_mlp="native"):
            y = gelu_mlp(*leaves)
            want = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        with use(gelu_mlp="cublas"), mock.patch("torch.mm", side_effect=AssertionError("not torch's product")):
            got = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_our_gemm_does_not_take_is_named():
    with emulated(), use(gelu_mlp="native"):
        inputs, _ = make((4, 16), 24, torch.float32)
        with pytest.raises(TypeError, match="gelu_mlp: x must be bfloat16 or float16, got float32"):
            gelu_mlp(*inputs)
        inputs, _ = make((4, 12), 24, torch.bfloat16)
        with pytest.raises(ValueError, match="gelu_mlp: x must be contiguous in rows or in columns, in multiples of 8"):
            gelu_mlp(*inputs)
        inputs, _ = make((4, 16), 20, torch.bfloat16)
        with pytest.raises(ValueError, match="gelu_mlp: act must be a multiple of 8 in its last dimension"):
            gelu_mlp(*inputs)
