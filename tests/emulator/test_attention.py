"""The CUDA kernels of attention at every class of head dim, with every mask, against what torch makes of the same."""

import math

import pytest
import torch

from cgpt_ext import _native, attention, attention_qkv, attention_ref, attention_varlen
from cgpt_ext.ops.attention import attention_varlen_ref
from emulator import emulated, native
from numerics import compare, run
from test_attention_masks import bias, each, make, pack, sdpa  # tests/ops/test_attention_masks.py

HALVES = [torch.bfloat16, torch.float16]

# B, Tq, Tk, H, Hkv, D, causal, window. Tiles are 128 or 64 queries by 16 to 128 keys, their head dims
# padded to 64, 80, 96, 128, 192 and 256.
CASES = [
    (1, 1, 1, 1, 1, 8, True, (-1, -1)),
    (2, 7, 13, 3, 3, 24, False, (-1, -1)),
    (1, 129, 129, 2, 1, 64, True, (-1, -1)),
    (1, 65, 193, 1, 1, 64, False, (-1, -1)),
    (1, 130, 130, 1, 1, 80, True, (-1, -1)),
    (1, 131, 67, 2, 2, 72, True, (-1, -1)),
    (1, 67, 131, 1, 1, 88, True, (-1, -1)),
    (1, 97, 129, 1, 1, 96, False, (63, 0)),
    (1, 129, 145, 1, 1, 128, True, (-1, -1)),
    (1, 1, 130, 4, 2, 128, False, (-1, -1)),
    (1, 70, 67, 2, 1, 104, False, (5, 20)),
    (1, 66, 130, 1, 1, 192, True, (-1, -1)),
    (1, 129, 65, 1, 1, 136, False, (-1, 31)),
    (1, 129, 66, 1, 1, 256, True, (-1, -1)),
    (1, 33, 97, 2, 1, 200, False, (40, 3)),
    (1, 300, 300, 1, 1, 64, False, (31, 31)),
    (1, 200, 300, 1, 1, 64, True, (100, -1)),
    (1, 131, 131, 1, 1, 128, False, (0, 0)),
]


def within(*options):
    """The op, the reference and torch with the same (causal, window, slopes)."""
    causal, window, slopes = (*options, None)[:3]
    return (
        lambda *x: attention(*x, causal, None, window, slopes),
        lambda *x: attention_ref(*x, causal, None, window, slopes),
        lambda *x: sdpa(*x, causal, window, slopes),
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, dtype):
    *shape, causal, window = case
    q, k, v, dout = make(*shape, dtype)
    with emulated():
        compare(*within(causal, window), (q, k, v), dout)


@pytest.mark.parametrize("D", [64, 80, 96, 128, 192, 256])
def test_no_bank_conflicts(D):
    q, k, v, dout = make(1, 70, 130, 2, 1, D, torch.bfloat16)
    out, lse, delta = torch.empty_like(q), torch.zeros(1, 2, 70), torch.zeros(1, 2, 70)
    options = (-1, 0, 0.1, None, None, None, 0, 0)
    with emulated() as device:
        native().attention_fwd(q, k, v, *options, out, lse)
        native().attention_bwd(dout, q, k, v, out, lse, *options, delta, *map(torch.empty_like, (q, k, v)))
        counters = device.counters()
    assert counters["mma"] > 0
    assert counters["ldmatrix"] > 0
    assert counters["bank_conflicts"] == 0, device.conflict()


@pytest.mark.parametrize(("D", "causal", "window"), [(64, True, (-1, -1)), (96, False, (20, 3)), (256, True, (-1, -1))])
def test_alibi(D, causal, window):
    q, k, v, dout = make(2, 67, 131, 2, 1, D, torch.bfloat16)
    with emulated():
        for slopes in (torch.tensor([0.5, 0.25]), torch.rand(2, 2)):
            compare(*within(causal, window, slopes), (q, k, v), dout)


@pytest.mark.parametrize(
    ("D", "causal", "window", "biased"),
    [(24, True, (-1, -1), False), (128, False, (40, 3), True)],
)
def test_varlen(D, causal, window, biased):
    lengths = [(5, 5), (0, 7), (131, 70), (1, 0), (67, 131), (0, 0), (1, 1)]
    q, k, v, dout, seqlens = pack(lengths, 4, 2, D, torch.bfloat16)
    slopes = torch.rand(len(lengths), 4)
    options = (causal, None, window, slopes if biased else None)
    with emulated():
        compare(
            lambda *x: attention_varlen(*x, *seqlens, *options),
            lambda *x: attention_varlen_ref(*x, *seqlens, *options),
            each(lambda q, k, v, b: sdpa(q, k, v, causal, window, slopes[b] if biased else None), lengths),
            (q, k, v),
            dout,
        )


def test_varlen_clamps_what_nobody_has_read():
    """On a GPU cu_seqlens' contents are not checked: past the tensor's end nothing is read or written."""
    q, k, v, dout = (x[0] for x in make(1, 40, 50, 1, 1, 16, torch.bfloat16))
    wild = torch.tensor([-7, 20, 1000, 30], dtype=torch.int32)  # rows 0 to 20, 20 to the end, none
    out, lse, delta = torch.zeros_like(q), torch.zeros(1, 40), torch.zeros(1, 40)
    options = (-1, 0, 0.25, None, wild, wild, 30, 30)
    with emulated():
        native().attention_fwd(q, k, v, *options, out, lse)
        native().attention_bwd(dout, q, k, v, out, lse, *options, delta, *map(torch.empty_like, (q, k, v)))
        want = attention(*(x[None, :20] for x in (q, k, v)), True)
    assert torch.equal(out[:20], want[0])


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.5])
def test_softmax_scale(scale):
    q, k, v, dout = make(1, 70, 70, 2, 2, 16, torch.float16)
    with emulated():
        compare(
            lambda *x: attention(*x, True, scale),
            lambda *x: attention_ref(*x, True, scale),
            lambda q, k, v: sdpa(q * (4 * scale), k, v, True),  # whose own scale is 1/4 here
            (q, k, v),
            dout,
        )


def lse_of(q, k, v, *options):
    return torch.ops.cgpt_ext.attention_fwd(q, k, v, *options, True)[1]


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 2.0])])
def test_lse(slopes):
    q, k, v, _ = make(2, 70, 133, 2, 2, 24, torch.bfloat16)
    with emulated():
        lse = lse_of(q, k, v, 40, 3, 0.2, slopes, None, None, 0, 0)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 0.2 + bias(70, 133, (40, 3), slopes)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_lse_far_below_what_exp_holds(dtype):
    q, k, v, dout = make(1, 100, 100, 1, 1, 64, dtype)
    q, k = q.round() / 8 + 5, k.round() / 8 - 5  # scores near -200
    with emulated():
        assert lse_of(q, k, v, -1, 0, 0.125, None, None, None, 0, 0).max() < -88.7
        compare(*within(True, (-1, -1)), (q, k, v), dout)


@pytest.mark.parametrize("dtype", HALVES)
def test_scores_of_ten_thousand(dtype):
    q, k, v, dout = make(1, 100, 100, 2, 2, 64, dtype)
    # One such head beside a gentle one; its keys' scores lie at least 160 apart, so that no query's best two tie.
    q[0, :, 1, :8] = (torch.randint(160, 257, (100, 1)) * torch.randn(100, 1).sign()).to(dtype)
    k[0, :, 1, :8] = (torch.randperm(100)[:, None] - 50).to(dtype)
    assert (q[0, :, 1].double() @ k[0, :, 1].double().T / 8).abs().max() > 1e4
    with emulated():
        compare(*within(True, (-1, -1)), (q, k, v), dout)


def test_queries_that_see_nothing():
    q, k, v, dout = make(1, 250, 20, 2, 1, 16, torch.bfloat16)  # query i stands above key i - 230
    with emulated():
        out, dq, dk, dv = run(lambda *x: attention(*x, window_size=(3, 2)), q, k, v, dout=dout)
        lse = lse_of(q, k, v, 3, 2, 0.25, None, None, None, 0, 0)
    for x in (out, dq):
        assert torch.equal(x[:, :228], torch.zeros_like(x[:, :228]))
        assert x.isfinite().all()
    for x in (dk, dv):
        assert (x != 0).any(-1).all()
    assert (lse[..., :228] == -math.inf).all()
    assert lse[..., 228:].isfinite().all()


def test_keys_that_nobody_sees():
    q, k, v, dout = make(1, 20, 250, 2, 1, 16, torch.bfloat16)  # the first query stands above key 230
    with emulated():
        dk, dv = run(lambda *x: attention(*x, window_size=(3, 2)), q, k, v, dout=dout)[2:]
    for x in (dk, dv):
        assert torch.equal(x[:, :227], torch.zeros_like(x[:, :227]))
        assert (x[:, 227:] != 0).any(-1).all()


def test_empty():
    for shape in [(0, 5, 5, 2, 2, 8), (2, 0, 5, 2, 2, 8), (2, 5, 0, 2, 2, 8), (2, 5, 5, 0, 0, 8)]:
        q, k, v, dout = make(*shape, torch.bfloat16)
        with emulated():
            out, dq, dk, dv = run(attention, q, k, v, False, dout=dout)
        for x, like in ((out, q), (dq, q), (dk, k), (dv, v)):
            assert torch.equal(x, torch.zeros_like(like))


def test_strided_views():
    qkv, dout = torch.randn(2, 70, 3 * 3 * 40).bfloat16(), torch.randn(2, 70, 3 * 40).bfloat16()
    q, k, v = (x.unflatten(2, (3, 40)) for x in qkv.chunk(3, 2))
    with emulated():
        want = run(attention, *(x.contiguous() for x in (q, k, v)), True, dout=dout.unflatten(2, (3, 40)))
        views = run(attention, q, k, v, True, dout=dout.unflatten(2, (3, 40)))
        by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        by_head = run(attention, *by_head, True, dout=dout.unflatten(2, (3, 40)))
        out, dqkv = run(lambda x: attention_qkv(x, 3, True), qkv, dout=dout)
    for other in (views, by_head):
        assert all(torch.equal(a, b) for a, b in zip(other, want, strict=True))
    assert torch.equal(out, want[0].flatten(2))
    assert torch.equal(dqkv, torch.cat([x.flatten(2) for x in want[1:]], 2))


@pytest.mark.parametrize("D", [64, 192])
def test_bits_do_not_depend_on_the_order_of_threads(D):
    q, k, v, dout = make(1, 131, 131, 2, 1, D, torch.bfloat16)
    results = []
    for seed in range(3):
        with emulated(seed):
            results.append(run(attention, q, k, v, True, dout=dout))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_comes_out(bad):
    q, k, v, dout = make(2, 100, 100, 2, 2, 16, torch.bfloat16)
    q[0, 50, 1, 3] = bad
    with emulated():
        out, dq, dk, dv = run(attention, q, k, v, True, dout=dout)
    assert out[0, 50, 1].isnan().all()
    for x in (out, dq):
        x[0, 50, 1] = 0
        assert x.isfinite().all()
    assert dk[0, 0, 1].isnan().all()
    assert dv[0, 0, 1].isnan().all()
    assert dk[1].isfinite().all()
    q[0, 50, 1, 3] = 0
    v[0, 50, 1, 3] = bad
    with emulated():
        out = attention(q, k, v, True)
    assert not out[0, 50:, 1, 3].isfinite().any()
    assert out[0, :, 0].isfinite().all()
    assert out[1].isfinite().all()


def test_scores_that_are_all_minus_infinity_give_nan():
    q, k, v, _ = make(1, 3, 5, 1, 1, 8, torch.bfloat16)
    q.fill_(1), k.fill_(-math.inf)
    with emulated():
        assert attention(q, k, v).isnan().all()


def test_strides_past_two_to_the_31():
    B, T, H, D = 2, 5, 2, 16
    far = 2**31 + 64
    huge = torch.empty(2 * far, dtype=torch.bfloat16)  # 8 GiB of address space, of which a few pages are touched
    where = [huge.as_strided((B, T, H, D), (far, 48 * H, 48, 1), 16 * i) for i in range(3)]
    q, k, v, dout = make(B, T, T, H, H, D, torch.bfloat16)
    for place, x in zip(where, (q, k, v), strict=True):
        place.copy_(x)
    options = (-1, 0, D**-0.5, None, None, None, 0, 0)
    with emulated():
        want = run(attention, q, k, v, True, dout=dout)
        out, lse = torch.ops.cgpt_ext.attention_fwd(*where, *options, True)
        assert torch.equal(out, want[0])
        native().attention_bwd(dout, q, k, v, out, lse, *options, torch.empty_like(lse), *where)
    assert all(torch.equal(got, x) for got, x in zip(where, want[1:], strict=True))


def test_fp32_is_the_triton_kernels():
    q, k, v, _ = make(1, 3, 3, 1, 1, 8)
    out, options = torch.empty_like(q), (-1, 0, 1.0, None, None, None, 0, 0)
    with emulated(), pytest.raises(TypeError, match="attention: q must be bfloat16 or float16"):
        native().attention_fwd(q, k, v, *options, out, None)
    _native.attention_fwd(q, k, v, *options, out, None)
