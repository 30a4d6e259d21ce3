"""Attention's Triton kernels: on a GPU where there is one, else under Triton's interpreter in tiles of 32 by 32."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from numerics import compare, run

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the infinities that are meant

from cgpt_ext.triton.attention import attention_bwd_triton, attention_fwd_triton  # noqa: E402
from cgpt_ext.triton.attention_tiles import split_head_dim  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO = -1


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = forward(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        left, right, scale, slopes, *packed = arguments(q, k, **ctx.options)
        grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
        scratch = torch.full_like(lse, math.nan)
        attention_bwd_triton(dout, q, k, v, out, lse, left, right, scale, slopes, *packed, scratch, *grads)
        return *grads, None


def arguments(q, k, window=(NO, NO), scale=None, slopes=None, cu=(None, None), longest=(0, 0)):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return *window, scale, slopes, *cu, *longest


def forward(q, k, v, **options):
    out = torch.full_like(q, math.nan, memory_format=torch.contiguous_format)
    lse = q.new_full((*q.shape[:-3], q.shape[-2], q.shape[-3]), math.nan, dtype=torch.float32)
    attention_fwd_triton(q, k, v, *arguments(q, k, **options), out, lse)
    return out, lse


def attention(q, k, v, options):
    return _Attention.apply(q, k, v, options)


def bias(q, k, window=(NO, NO), scale=None, slopes=None):
    """(H or 1, Tq, Tk) fp64: -inf where a query does not see a key, ALiBi elsewhere."""
    Tq, Tk = q.shape[1], k.shape[1]
    i, j = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq, torch.arange(Tk, device=q.device)
    x = torch.zeros(1, Tq, Tk, dtype=torch.float64, device=q.device)
    if slopes is not None:
        x = -slopes.double()[..., None, None] * (i - j).abs()
    if window[0] >= 0:
        x = x.masked_fill(j < i - window[0], -math.inf)
    if window[1] >= 0:
        x = x.masked_fill(j > i + window[1], -math.inf)
    return x


def reference(q, k, v, options):
    q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))))
    x = bias(q.transpose(1, 2), k.transpose(1, 2), **options)
    scores = q @ k.transpose(-2, -1) * arguments(q, k, **options)[2] + x
    sees_none = (x == -math.inf).all(-1, keepdim=True)
    p = scores.masked_fill(sees_none, 0).softmax(-1).masked_fill(sees_none, 0)
    return (p @ v).transpose(1, 2)


def torch_op(q, k, v, options):
    """Torch's own: in fp32 its fused kernel, in 16 bits the products one by one, as flash-attn's tests have it, because
    its fused kernel on a CPU keeps probabilities in fp32, which no tensor core multiplies.
    """
    x = bias(q, k, **options).to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))))
    if q.dtype == torch.float32:
        x = x.expand(q.shape[0], q.shape[1], -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=x, scale=options.get("scale")).transpose(1, 2)
    scores = q @ k.transpose(-2, -1) * options.get("scale", q.shape[-1] ** -0.5) + x
    return (scores.softmax(-1) @ v).transpose(1, 2)


def make(B, Tq, Tk, H, Hkv, D, dtype=torch.float32):
    shapes = [(B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D), (B, Tq, H, D)]
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


CASES = [  # B, Tq, Tk, H, Hkv, D, window, ALiBi
    ((1, 1, 3, 1, 1, 8), (NO, NO), False),
    ((1, 65, 65, 2, 1, 64), (NO, 0), False),
    ((1, 37, 70, 2, 2, 24), (NO, NO), False),
    ((1, 33, 71, 1, 1, 80), (NO, 0), False),
    ((1, 40, 97, 2, 1, 96), (20, 0), False),
    ((1, 67, 67, 1, 1, 40), (5, 9), True),
    ((2, 33, 64, 2, 1, 16), (NO, 0), True),
    ((1, 97, 97, 1, 1, 16), (40, 40), False),
    ((1, 34, 34, 1, 1, 256), (NO, 0), False),
    ((1, 34, 34, 1, 1, 128), (NO, 3), True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "window", "alibi"), CASES, ids=str)
def test_values_and_gradients(shape, window, alibi, dtype):
    q, k, v, dout = make(*shape, dtype)
    slopes = torch.tensor([0.5, 0.0625], device=DEVICE)[: shape[3]] if alibi else None
    compare(attention, reference, torch_op, (q, k, v, {"window": window, "slopes": slopes}), dout)


@pytest.mark.parametrize(("shape", "window", "alibi"), CASES[1:6:2], ids=str)
def test_bf16(shape, window, alibi):
    test_values_and_gradients(shape, window, alibi, torch.bfloat16)


def test_one_query_and_one_key():
    """The softmax of one score is 1: out is v, dv is dout, and dq and dk, 0 but for rounding, have no scale."""
    q, k, v, dout = make(1, 1, 1, 2, 2, 8)
    out, dq, dk, dv = run(attention, q, k, v, {"window": (NO, 0)}, dout=dout)
    assert torch.equal(out, v)
    assert torch.equal(dv, dout)
    assert dq.abs().max() < 1e-6
    assert dk.abs().max() < 1e-6


def test_any_window():
    """Every way a window can fall across the tiles, values only; -1 is no limit."""
    torch.manual_seed(1)
    for _ in range(10):
        Tq, Tk = torch.randint(1, 110, (2,)).tolist()
        q, k, v, _ = make(1, Tq, Tk, 1, 1, 8)
        options = {"window": tuple(torch.randint(-1, 100, (2,)).tolist())}
        out, _ = forward(q, k, v, **options)
        want = reference(q.double(), k.double(), v.double(), options)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=2e-6, msg=str((Tq, Tk, options)))


def test_slopes_of_every_sequence():
    q, k, v, _ = make(2, 20, 40, 2, 2, 8)
    slopes = torch.rand(2, 2, device=DEVICE)
    out, _ = forward(q, k, v, slopes=slopes)
    for b in range(2):
        assert torch.equal(out[b], forward(q[b : b + 1], k[b : b + 1], v[b : b + 1], slopes=slopes[b])[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.5])
def test_softmax_scale(scale, dtype):
    q, k, v, dout = make(1, 40, 40, 1, 1, 16, dtype)
    compare(attention, reference, torch_op, (q, k, v, {"window": (NO, 0), "scale": scale}), dout)


def test_lse():
    q, k, v, _ = make(2, 35, 66, 2, 1, 24)
    _, lse = forward(q, k, v, window=(NO, 0))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.repeat_interleave(2, 2).double()) * 24**-0.5
    scores += bias(q, k, window=(NO, 0))
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lse_far_below_what_exp_holds(dtype):
    q, k, v, dout = make(1, 50, 50, 1, 1, 64, dtype)
    # Scores near -200: exp of any of them is 0 in fp32. Multiples of 1/8 keep them exact, so 1e-5 can be asked for.
    q, k = q.round() / 8 + 5, k.round() / 8 - 5
    assert forward(q, k, v, window=(NO, 0))[1].max() < -88.7
    compare(attention, reference, torch_op, (q, k, v, {"window": (NO, 0)}), dout)


def test_scores_of_ten_thousand():
    q, k, v, dout = make(1, 50, 50, 2, 2, 64)
    q[0, :, 1], k[0, :, 1] = q[0, :, 1].round(), k[0, :, 1].round()  # exact scores, in whatever order they are summed
    # One such head beside a gentle one. No two of its keys' scores lie within 160 of each other, so that its softmax is
    # one key's and lse that key's score: a sum of two would meet fp32's steps of 0.001, torch's as ours.
    q[0, :, 1, :8] = torch.randint(160, 257, (50, 1)).to(q) * torch.randn(50, 1).sign().to(q)
    k[0, :, 1, :8] = (torch.randperm(50)[:, None].to(q) - 25) * 2
    v[0, :, 1], dout[0, :, 1] = v[0, :, 1].round(), dout[0, :, 1].round()  # dout . v is exact, and its gradient 0
    compare(attention, reference, torch_op, (q, k, v, {"window": (NO, 0)}), dout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_that_see_nothing(dtype):
    q, k, v, dout = make(1, 75, 20, 2, 1, 16, dtype)
    causal = {"window": (NO, 0)}
    out, dq, dk, dv = run(attention, q, k, v, causal, dout=dout)
    _, lse = forward(q, k, v, **causal)
    assert torch.equal(out[:, :55], torch.zeros_like(out[:, :55]))
    assert torch.equal(dq[:, :55], torch.zeros_like(dq[:, :55]))
    assert (lse[:, :, :55] == -math.inf).all()
    assert lse[:, :, 55:].isfinite().all()
    rest = run(attention, q[:, 55:], k, v, causal, dout=dout[:, 55:])
    for got, alone in zip((out[:, 55:], dq[:, 55:], dk, dv), rest, strict=True):
        torch.testing.assert_close(got, alone)


def test_empty():
    for shape in [(0, 5, 5, 2, 2, 8), (2, 0, 5, 2, 2, 8), (2, 5, 0, 2, 2, 8), (2, 5, 5, 0, 0, 8)]:
        q, k, v, dout = make(*shape)
        out, dq, dk, dv = run(attention, q, k, v, {}, dout=dout)
        for x, like in ((out, q), (dq, q), (dk, k), (dv, v)):
            assert torch.equal(x, torch.zeros_like(like))


def test_packed_sequences():
    """Sequences by cu_seqlens have the bits they have alone; one is empty, one has queries and no keys."""
    lengths = [(33, 40), (0, 5), (7, 0), (1, 1)]
    options = {"window": (30, 0), "slopes": torch.tensor([0.25, 0.5], device=DEVICE)}
    packs = [make(1, Tq, Tk, 2, 1, 16) for Tq, Tk in lengths]
    packed = [torch.cat([pack[i] for pack in packs], 1)[0] for i in range(4)]
    cu = [torch.tensor([0, *x], device=DEVICE).cumsum(0).int() for x in zip(*lengths, strict=True)]
    together = run(attention, *packed[:3], options | {"cu": cu, "longest": (33, 40)}, dout=packed[3])
    _, lse = forward(*packed[:3], **options, cu=cu, longest=(33, 40))
    for b, (q, k, v, dout) in enumerate(packs):
        alone = run(attention, q, k, v, options, dout=dout)
        for got, want, ends in zip(together, alone, (cu[0], cu[0], cu[1], cu[1]), strict=True):
            assert torch.equal(got[ends[b] : ends[b + 1]], want[0])
        assert torch.equal(lse[:, cu[0][b] : cu[0][b + 1]], forward(q, k, v, **options)[1][0])


def test_packed_sequences_longer_than_said():
    """What the longest length does not reach is left alone, and nothing past it is read."""
    q, k, v, _ = make(1, 50, 50, 1, 1, 8)
    cu = [torch.tensor([0, 50], dtype=torch.int32, device=DEVICE)] * 2
    out, _ = forward(q[0], k[0], v[0], cu=cu, longest=(32, 32))
    assert torch.equal(out[:32], forward(q[:, :32], k[:, :32], v[:, :32])[0][0])
    assert out[32:].isnan().all()


def test_strided_views():
    B, T, H, D = 1, 35, 2, 40
    q, k, v = torch.randn(B, T, 3, H, D).to(DEVICE, torch.float16).unbind(2)
    dout = torch.randn(B, H, T, D).to(DEVICE, torch.float16).transpose(1, 2)
    causal = {"window": (NO, 0)}
    apart = run(attention, *(x.contiguous() for x in (q, k, v)), causal, dout=dout.contiguous())
    together = run(attention, q, k, v, causal, dout=dout)
    by_head = run(attention, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), causal, dout=dout)
    for other in (together, by_head):
        assert all(torch.equal(a, b) for a, b in zip(apart, other, strict=True))


def test_strides_past_two_to_the_31():
    far = 2**31 + 64
    huge = torch.empty(2 * far, dtype=torch.float16, device=DEVICE)  # on a CPU only the pages touched
    views = [huge.as_strided((2, 5, 1, 16), (far, 48, 16, 1), 16 * i) for i in range(3)]
    near = make(2, 5, 5, 1, 1, 16, torch.float16)[:3]
    for view, x in zip(views, near, strict=True):
        view.copy_(x)
    assert torch.equal(forward(*views)[0], forward(*near)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_come_out(value):
    q, k, v, dout = make(1, 40, 40, 1, 1, 16)
    k[0, 35, 0, 3] = value
    out, dq, _, _ = run(attention, q, k, v, {"window": (NO, 0)}, dout=dout)
    assert out[:, 36:].isnan().any(-1).all() if value != value else not out[:, 36:].isfinite().all()
    assert out[:, :35].isfinite().all()
    assert dq[:, :32].isfinite().all()


def test_repeats_bit_for_bit():
    q, k, v, dout = make(1, 40, 40, 2, 1, 16, torch.float16)
    first = run(attention, q, k, v, {"window": (NO, 0)}, dout=dout)
    for _ in range(100 if DEVICE == "cuda" else 1):
        again = run(attention, q, k, v, {"window": (NO, 0)}, dout=dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_every_call_has_a_tile():
    from cgpt_ext.triton import attention_bwd, attention_fwd
    from cgpt_ext.triton.attention_tiles import ARCHS, HEAD_DIMS, choices

    for table in (attention_fwd.CONFIGS, attention_bwd.DKDV_CONFIGS, attention_bwd.DQ_CONFIGS):
        for D, itemsize, full, arch in product(HEAD_DIMS, (2, 4), (False, True), ARCHS):
            assert choices(table, D, itemsize, full, arch)


def test_split_head_dim():
    for D in range(8, 257, 8):
        D0, D1 = split_head_dim(D)
        assert D <= D0 + D1 <= max(16, 2 ** math.ceil(math.log2(D)))
        assert D1 == 0 or D > D0
    assert [split_head_dim(D) for D in (64, 80, 96, 112, 128, 192)] == [
        (64, 0), (64, 16), (64, 32), (128, 0), (128, 0), (128, 64)
    ]  # fmt: skip
