import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import numerics
from cgpt_ext import cross_entropy, cross_entropy_ref, dispatch
from cgpt_ext.nn import LinearCrossEntropyLoss
from numerics import DTYPES, run

# (tokens, D, V): 1, primes, tails of every vector length, T % 128 == 64, a vocabulary of several slabs' tails
SHAPES = [(1, 1, 1), (3, 5, 2), (13, 7, 101), (64, 48, 127), (192, 32, 1027), (5, 64, 4099)]


def torch_cross_entropy(
    x, weight, target, ignore_index=-100, z_loss=0.0, reduction="mean", vocab_size=None, chunk_tokens=None
):
    logits = F.linear(x.reshape(-1, x.shape[-1]), weight[:vocab_size]).float()
    target = target.reshape(-1)
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
    if z_loss == 0.0:
        return loss
    kept = target != ignore_index
    z = torch.where(kept, z_loss * logits.logsumexp(-1).square(), 0)
    if reduction == "none":
        return loss + z
    return loss + (z.sum() / kept.sum() if reduction == "mean" else z.sum())


def reference(x, weight, target, *args):
    return cross_entropy_ref(x, weight, target, *args[:4])


def make(shape, dtype, ids=None):
    n, d, v = shape
    x, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) / d**0.5).to(dtype)
    return x, weight, torch.randint(0, ids or v, (n,))


def check(x, weight, target, *options):
    scalar = len(options) < 3 or options[2] != "none"
    dout = torch.tensor(1.0) if scalar else torch.randn(target.numel())
    compare(x, weight, target, *options, dout=dout)


def compare(x, weight, target, *options, dout):
    """The fp32 loss of narrower inputs has logits that are rounded as the inputs are."""
    inputs = (x, weight, target, *options)
    numerics.compare(cross_entropy, reference, torch_cross_entropy, inputs, dout, dtype=x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(isa, shape, dtype):
    check(*make(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("vocab_size", [None, 89])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("chunk_tokens", [8, None])
def test_every_combination(dtype, reduction, z_loss, vocab_size, ignore_index, chunk_tokens):
    x, weight, target = make((30, 24, 96), dtype, ids=89)
    target[::4] = ignore_index
    check(x, weight, target, ignore_index, z_loss, reduction, vocab_size, chunk_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_options_at_once(isa, dtype, reduction):
    x, weight, target = make((30, 24, 96), dtype, ids=89)
    target[::4] = 3
    check(x, weight, target, 3, 1e-2, reduction, 89, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 31, 32, 1000])
def test_any_chunk_size(dtype, chunk_tokens):
    check(*make((32, 16, 65), dtype), -100, 0.0, "mean", None, chunk_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_of_a_product(isa, dtype):
    check(*make((70, 72, 350), dtype, ids=333), -100, 0.0, "mean", 333, 24)


def test_padded_rows_have_gradient_zero_and_take_no_part(isa):
    x, weight, target = make((9, 16, 40), torch.float32, ids=33)
    weight[33:] = float("nan")
    loss, dx, dweight = run(cross_entropy, x, weight, target, -100, 0.0, "mean", 33, dout=torch.tensor(1.0))
    assert loss.isfinite()
    assert dx.isfinite().all()
    assert torch.equal(dweight[33:], torch.zeros(7, 16))
    assert dweight[:33].abs().sum() > 0


def test_ignored_rows_may_hold_anything(isa):
    x, weight, target = make((6, 8, 20), torch.float32)
    target[2] = -100
    kept = torch.tensor([0, 1, 3, 4, 5])
    want = run(cross_entropy, x[kept], weight, target[kept], dout=torch.tensor(1.0))
    got = run(cross_entropy, x, weight, target, dout=torch.tensor(1.0))
    assert torch.equal(got[1][2], torch.zeros(8))
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[2], want[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_all_ignored_is_what_torch_says(isa, dtype, z_loss):
    x, weight, target = make((5, 8, 20), dtype)
    target.fill_(-100)
    loss, dx, dweight = run(cross_entropy, x, weight, target, -100, z_loss, dout=torch.tensor(1.0))
    assert loss.isnan()
    assert F.cross_entropy(F.linear(x, weight), target).isnan()
    assert not dx.any()
    assert not dweight.any()
    assert cross_entropy(x, weight, target, reduction="sum") == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(isa, reduction):
    x, weight, target = make((4, 8, 20), torch.bfloat16)
    dout = torch.ones(0 if reduction == "none" else ())
    got = run(cross_entropy, x[:0], weight, target[:0], -100, 0.0, reduction, dout=dout)
    want = F.cross_entropy(F.linear(x[:0], weight).float(), target[:0], reduction=reduction)
    torch.testing.assert_close(got[0], want, equal_nan=True)
    assert got[1].shape == (0, 8)
    assert torch.equal(got[2], torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(isa, dtype):
    x, weight, target = make((16, 32, 203), dtype)
    for scale in (30, 1000):  # logits to about 1e2 and 1e4: some losses are exactly 0, some thousands
        scaled = x * scale
        target[:8] = (scaled[:8].float() @ weight.float().T).argmax(-1)
        check(scaled, weight, target)
        check(scaled, weight, target, -100, 0.0, "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_hot_logits(isa, dtype):
    """Logits of exactly +-1e4: the loss of a right answer is 0, of a wrong one 2e4, and the gradients are exact."""
    weight = torch.eye(37).to(dtype)
    x = (-1e4 * torch.ones(3, 37)).to(dtype)
    x[:, 5] = 1e4
    loss, dx, _ = run(cross_entropy, x, weight, torch.tensor([5, 6, 36]), -100, 0.0, "sum", dout=torch.tensor(1.0))
    ten_thousand = float(torch.tensor(1e4).to(dtype))
    assert loss.detach() == 4 * ten_thousand
    want = torch.zeros(3, 37)
    want[1:, 5], want[1, 6], want[2, 36] = 1, -1, -1
    assert torch.equal(dx.float(), want)


def test_lse_below_where_exp_underflows(isa):
    x = torch.full((2, 3), -200.0)
    losses = cross_entropy(x, torch.eye(3), torch.tensor([0, 2]), reduction="none")
    torch.testing.assert_close(losses, torch.full((2,), 3.0).log())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_comes_out(isa, bad, dtype):
    x, weight, target = make((3, 8, 20), dtype)
    x[1, 3] = bad
    assert cross_entropy(x, weight, target).isnan()
    losses, dx, _ = run(cross_entropy, x, weight, target, -100, 0.0, "none", dout=torch.ones(3))
    assert losses[1].isnan()
    assert dx[1].isnan().all()
    assert losses[[0, 2]].isfinite().all()
    assert dx[[0, 2]].isfinite().all()


def test_strided_inputs(isa):
    wide = torch.randn(6, 3, 64).to(torch.bfloat16)
    _, weight, target = make((6, 64, 50), torch.bfloat16)
    check(wide[:, 1], weight, target)
    check(wide, weight, torch.randint(0, 50, (3, 6)).T)
    check(wide[:, 1], weight.T.contiguous().T, torch.randint(0, 50, (12,))[::2])
    check(wide[0, 0], weight, torch.tensor(7))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_alone(wanted, reduction):
    x, weight, target = make((9, 8, 30), torch.float32)
    dout = torch.ones(9 if reduction == "none" else ())
    full = run(cross_entropy, x, weight, target, -100, 0.0, reduction, dout=dout)
    x.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    cross_entropy(x, weight, target, reduction=reduction).sum().backward()
    for got, want, asked in zip((x.grad, weight.grad), full[1:], wanted, strict=True):
        assert torch.equal(got, want) if asked else got is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradient_scales(dtype):
    x, weight, target = make((12, 16, 40), dtype)
    for factor in (0.25, 4096.0):
        compare(x, weight, target, dout=torch.tensor(factor))


def test_fp16_gradients_survive_a_loss_scale():
    """p / N is 1e-9 here, far below fp16; with the loss scaled by 2^16 the gradients must be as good as fp32's."""
    x, weight, target = (t if t.dtype == torch.int64 else t.half() for t in make((200, 16, 3001), torch.float32))
    scale = torch.tensor(65536.0)
    got = run(cross_entropy, x, weight, target, dout=scale)
    want = run(reference, x.double(), weight.double(), target, dout=scale.double())
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2e-3, atol=1e-7 * 65536)
    assert got[2].count_nonzero() > 0.99 * got[2].numel()


def test_backward_twice_and_retained_gradients_are_safe():
    x, weight, target = make((9, 8, 30), torch.float32)
    x.requires_grad_(), weight.requires_grad_()
    loss = cross_entropy(x, weight, target)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    loss.backward(retain_graph=True)
    weight.grad.zero_()  # an optimizer's zero_grad must not reach what the graph still holds
    loss.backward()
    assert torch.equal(weight.grad, first[1])
    assert torch.equal(x.grad, 2 * first[0])


def test_repeats_are_bit_equal():
    x, weight, target = make((37, 24, 201), torch.bfloat16)
    first = run(cross_entropy, x, weight, target, -100, 1e-3, "mean", None, 10, dout=torch.tensor(1.0))
    for _ in range(100):
        again = run(cross_entropy, x, weight, target, -100, 1e-3, "mean", None, 10, dout=torch.tensor(1.0))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from cgpt_ext import cross_entropy
n, d, v = 2048, 64, 50257
grad = sys.argv[1] == "grad"
x = torch.randn(n, d).bfloat16().requires_grad_(grad)
weight = torch.randn(v, d).bfloat16().requires_grad_(grad)
target = torch.randint(0, v, (n,))
def call(rows):
    loss = cross_entropy(x[:rows], weight, target[:rows])
    if grad:
        torch.autograd.grad(loss, (x, weight))
call(64)  # the GEMM's own buffers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("mode", ["grad", "evaluation"])
def test_logits_never_exist_whole(mode):
    """T x V is 206 MB in bf16 and 411 MB in fp32; a chunk may hold 128 MiB of it, and dweight is 6 MB."""
    out = subprocess.run([sys.executable, "-c", MEMORY, mode], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 160e6


def test_evaluation_allocates_no_gradients():
    x, weight, target = make((64, 32, 5000), torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cross_entropy(x, weight, target, chunk_tokens=8)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 8 * 5100 * 4 < weight.numel() * 4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reference_gradients(reduction):
    x, weight = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    target = torch.tensor([1, 0, -100, 5, 2])
    assert torch.autograd.gradcheck(lambda x, w: cross_entropy_ref(x, w, target, -100, 0.1, reduction, 6), (x, weight))


def test_reference_is_torchs():
    x, weight, target = (t.double() if t.is_floating_point() else t for t in make((9, 8, 30), torch.float32))
    target[4] = -100
    for reduction in ("mean", "sum", "none"):
        want = F.cross_entropy(F.linear(x, weight), target, reduction=reduction)
        torch.testing.assert_close(cross_entropy_ref(x, weight, target, reduction=reduction), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(dtype, reduction):
    x, weight, target = make((6, 8, 20), dtype)
    ops = torch.ops.cgpt_ext
    for needs in ((False, False), (True, False), (True, True)):
        args = (x.view(2, 3, 8), weight, target.view(2, 3), -100, 1e-3, reduction, 18, 4, *needs)
        torch.library.opcheck(ops.cross_entropy_fwd.default, (*args[:2], target.view(2, 3) % 18, *args[3:]))
    torch.library.opcheck(
        ops.cross_entropy_bwd.default, (torch.randn(6), x, weight, target, -100, 1e-3, 20, None, True, True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager(dtype, reduction):
    x, weight, target = make((12, 16, 65), dtype)
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    dout = torch.randn(12) if reduction == "none" else torch.tensor(1.0)
    eager = run(cross_entropy, x, weight, target, -100, 1e-3, reduction, 60 + 5, dout=dout)
    again = run(compiled, x, weight, target, -100, 1e-3, reduction, 60 + 5, dout=dout)
    assert all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))


def test_compiled_with_dynamic_shapes():
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, v in ((8, 30), (12, 50), (7, 41)):
        x, weight, target = make((n, 16, v), torch.float32)
        eager = run(cross_entropy, x, weight, target, dout=torch.tensor(1.0))
        again = run(compiled, x, weight, target, dout=torch.tensor(1.0))
        assert all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))


def test_reference_by_name():
    x, weight, target = make((5, 8, 20), torch.float32)
    with dispatch.use(cross_entropy="reference"):
        chosen = cross_entropy(x, weight, target, -100, 1e-2, "none", 20)
    assert torch.equal(chosen, cross_entropy_ref(x, weight, target, -100, 1e-2, "none", 20))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x, w, t: (x, w[:, :7], t), ValueError, "cross_entropy: weight must be (*, 8), got (20, 7)"),
        (lambda x, w, t: (x, w[0], t), ValueError, "cross_entropy: weight must be (*, 8), got (8,)"),
        (lambda x, w, t: (x, w[0, 0], t), ValueError, "cross_entropy: weight must be (*, 8), got ()"),
        (lambda x, w, t: (x, w[:0], t), ValueError, "cross_entropy: vocab_size must be in [1, 0], got 0"),
        (lambda x, w, t: (x, w, t[:2]), ValueError, "cross_entropy: target must be (3,), got (2,)"),
        (lambda x, w, t: (x, w, t[:, None]), ValueError, "cross_entropy: target must be (3,), got (3, 1)"),
        (lambda x, w, t: (x[0, 0], w, t), ValueError, "cross_entropy: x must be at least 1-dimensional, got a scalar"),
        (
            lambda x, w, t: (x[:, :0], w[:, :0], t),
            ValueError,
            "cross_entropy: x must be non-empty in its last dimension, got (3, 0)",
        ),
        (
            lambda x, w, t: (x, w, t + 20),
            ValueError,
            "cross_entropy: target must be in [0, 20) or ignore_index -100, got 20",
        ),
        (
            lambda x, w, t: (x, w, t - 1, 7),
            ValueError,
            "cross_entropy: target must be in [0, 20) or ignore_index 7, got -1",
        ),
        (
            lambda x, w, t: (x, w, t + 5, -100, 0.0, "mean", 5),
            ValueError,
            "cross_entropy: target must be in [0, 5) or ignore_index -100, got 5",
        ),
        (
            lambda x, w, t: (x, w, t, -100, 0.0, "mean", 21),
            ValueError,
            "cross_entropy: vocab_size must be in [1, 20], got 21",
        ),
        (
            lambda x, w, t: (x, w, t, -100, 0.0, "mean", -1),
            ValueError,
            "cross_entropy: vocab_size must be in [1, 20], got -1",
        ),
        (
            lambda x, w, t: (x, w, t, -100, 0.0, "avg"),
            ValueError,
            "cross_entropy: reduction must be mean, sum or none, got avg",
        ),
        (
            lambda x, w, t: (x, w, t, -100, 0.0, "mean", None, 0),
            ValueError,
            "cross_entropy: chunk_tokens must be at least 1, got 0",
        ),
        (lambda x, w, t: (x, w, t, "a"), TypeError, "cross_entropy: ignore_index must be an int, got str"),
        (lambda x, w, t: (x, w, t, -100, None), TypeError, "cross_entropy: z_loss must be a number, got NoneType"),
        (
            lambda x, w, t: (x, w, t, -100, 0.0, "mean", 2.0),
            TypeError,
            "cross_entropy: vocab_size must be an int, got float",
        ),
        (
            lambda x, w, t: (x, w, t, -100, 0.0, "mean", None, 2.0),
            TypeError,
            "cross_entropy: chunk_tokens must be an int, got float",
        ),
        (lambda x, w, t: (x, w, t.int()), TypeError, "cross_entropy: target must be int64, got int32"),
        (lambda x, w, t: (x, w.bfloat16(), t), TypeError, "cross_entropy: weight must be float32, got bfloat16"),
        (
            lambda x, w, t: (x.double(), w.double(), t),
            TypeError,
            "cross_entropy: x must be float32 or bfloat16 or float16, got float64",
        ),
        (lambda x, w, t: (x, None, t), TypeError, "cross_entropy: weight must be a torch.Tensor, got NoneType"),
        (lambda x, w, t: (x, w, [1, 2, 3]), TypeError, "cross_entropy: target must be a torch.Tensor, got list"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_input(arguments, error, message, grad):
    x, weight, target = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([0, 1, 2])
    x.requires_grad_(grad)
    with pytest.raises(error) as caught:
        cross_entropy(*arguments(x, weight, target))
    assert str(caught.value) == message


def test_module(isa):
    x, weight, target = make((12, 16, 40), torch.float32, ids=33)
    target[3] = 7
    module = LinearCrossEntropyLoss(ignore_index=7, reduction="sum", z_loss=1e-2, vocab_size=33)
    want = torch_cross_entropy(x, weight, target, 7, 1e-2, "sum", 33)
    torch.testing.assert_close(module(weight, x, target), want)
    torch.testing.assert_close(module(weight, x.view(3, 4, 16), target.view(3, 4)), want)
    assert "reduction=sum" in repr(module)
    with pytest.raises(ValueError, match="LinearCrossEntropyLoss: reduction must be"):
        LinearCrossEntropyLoss(reduction="avg")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_under_autocast(dtype):
    x, weight, target = make((12, 16, 40), torch.float32)
    module = LinearCrossEntropyLoss()

    def autocast(x, weight):
        with torch.autocast("cpu", dtype):
            return module(weight, x, target)

    want = run(lambda x, w: module(w.to(dtype), x.to(dtype), target), x, weight, dout=torch.tensor(1.0))
    got = run(autocast, x, weight, dout=torch.tensor(1.0))
    assert got[1].dtype == got[2].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
