"""Windows, ALiBi and packed sequences; what attention is without them is in test_attention.py."""

import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import _native, attention, attention_qkv, attention_ref, attention_varlen, dispatch
from cgpt_ext.ops.attention import attention_varlen_ref
from numerics import DTYPES, compare, run

# B, Tq, Tk, H, Hkv, D, causal, window. Blocks are 96 queries by 64 keys.
WINDOWS = [
    (1, 1, 1, 1, 1, 8, False, (0, 0)),
    (2, 7, 13, 4, 2, 24, False, (2, 1)),
    (1, 131, 131, 2, 2, 16, True, (63, -1)),
    (1, 131, 131, 1, 1, 64, False, (0, 0)),
    (1, 97, 200, 2, 1, 16, False, (70, 5)),
    (1, 200, 97, 1, 1, 40, False, (5, 70)),
    (1, 300, 300, 1, 1, 8, False, (-1, 31)),
    (1, 300, 300, 1, 1, 8, False, (31, -1)),
    (1, 1, 130, 2, 2, 16, True, (64, 3)),
    (2, 4, 200, 2, 1, 24, False, (70, 1)),
]


def bias(Tq, Tk, window, slopes):
    """What is added to the scores (..., Tq, Tk), written down from the definition."""
    place, key = torch.arange(Tq)[:, None] + Tk - Tq, torch.arange(Tk)
    left, right = (math.inf if w < 0 else w for w in window)
    added = torch.zeros(Tq, Tk).masked_fill((key < place - left) | (key > place + right), -math.inf)
    return added if slopes is None else added - slopes[..., None, None] * (key - place).abs()


def sdpa(q, k, v, causal=False, window=(-1, -1), slopes=None):
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    mask = bias(q.shape[1], k.shape[1], (window[0], 0 if causal else window[1]), slopes)
    mask = mask.double() if q.dtype == torch.float64 else mask
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def make(B, Tq, Tk, H, Hkv, D, dtype=torch.float32):
    shapes = [(B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D), (B, Tq, H, D)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def pack(lengths, H, Hkv, D, dtype=torch.float32):
    """q, k, v, dout, and what attention_varlen needs to know of their (Tq, Tk) lengths."""
    seqlens = [torch.tensor([0, *x]).cumsum(0).int() for x in zip(*lengths, strict=True)]
    totals = [int(cu[-1]) for cu in seqlens]
    q, k, v, dout = (x[0] for x in make(1, *totals, H, Hkv, D, dtype))
    return q, k, v, dout, (*seqlens, *(max(x) for x in zip(*lengths, strict=True)))


def each(function, lengths):
    """`function` on one sequence of a packed batch after the other; it takes (1, T, H, D) and the sequence's number."""

    def packed(q, k, v):
        Tq, Tk = (list(x) for x in zip(*lengths, strict=True))
        sequences = zip(q.split(Tq), k.split(Tk), v.split(Tk), strict=True)
        return torch.cat([function(*(x[None] for x in s), b)[0] for b, s in enumerate(sequences)])

    return packed


LENGTHS = [(5, 5), (0, 7), (100, 131), (1, 0), (131, 70), (0, 0), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_windows(isa, case, dtype):
    *shape, causal, window = case
    q, k, v, dout = make(*shape, dtype)
    compare(
        lambda *x: attention(*x, causal, window_size=window),
        lambda *x: attention_ref(*x, causal, window_size=window),
        lambda *x: sdpa(*x, causal, window),
        (q, k, v),
        dout,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize(
    ("shape", "causal", "window"),
    [
        ((2, 7, 13, 4, 2, 24), False, (-1, -1)),
        ((2, 131, 131, 2, 2, 16), True, (-1, -1)),
        ((2, 3, 150, 2, 2, 16), True, (-1, -1)),
        ((2, 97, 200, 2, 1, 16), False, (70, 5)),
    ],
)
def test_alibi(isa, shape, causal, window, per_sequence, dtype):
    B, H = shape[0], shape[3]
    slopes = torch.rand(B, H) if per_sequence else 2.0 ** -torch.arange(1, H + 1)
    q, k, v, dout = make(*shape, dtype)
    compare(
        lambda *x: attention(*x, causal, None, window, slopes),
        lambda *x: attention_ref(*x, causal, None, window, slopes),
        lambda *x: sdpa(*x, causal, window, slopes),
        (q, k, v),
        dout,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_alibi_far_below_what_exp_holds(isa, dtype):
    """Slopes of 1 over 300 keys: the far half of every row underflows."""
    q, k, v, dout = make(1, 300, 300, 1, 1, 16, dtype)
    slopes = torch.ones(1)
    compare(
        lambda *x: attention(*x, alibi_slopes=slopes),
        lambda *x: attention_ref(*x, alibi_slopes=slopes),
        lambda *x: sdpa(*x, slopes=slopes),
        (q, k, v),
        dout,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "window"), [(True, (-1, -1)), (False, (40, 3))])
def test_varlen(isa, causal, window, dtype):
    q, k, v, dout, seqlens = pack(LENGTHS, 4, 2, 24, dtype)
    slopes = torch.rand(len(LENGTHS), 4)
    compare(
        lambda *x: attention_varlen(*x, *seqlens, causal, None, window, slopes),
        lambda *x: attention_varlen_ref(*x, *seqlens, causal, None, window, slopes),
        each(lambda q, k, v, b: sdpa(q, k, v, causal, window, slopes[b]), LENGTHS),
        (q, k, v),
        dout,
    )


def test_varlen_is_attention_on_each_sequence(isa):
    """To the bit; and rows may lie apart in memory."""
    q, k, v, dout, seqlens = pack(LENGTHS, 2, 2, 16, torch.bfloat16)
    want = run(each(lambda q, k, v, b: attention(q, k, v, True), LENGTHS), q, k, v, dout=dout)
    apart = [torch.stack([x, x], 1)[:, 1] for x in (q, k, v)]
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for inputs in ((q, k, v), apart, by_head, turned):
        got = run(attention_varlen, *inputs, *seqlens, True, dout=dout)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(attention_varlen(q, k, v, *seqlens, True), want[0])
    longer = (*seqlens[:2], 10**6, 2**40)  # max_seqlen may be more than there is
    assert torch.equal(attention_varlen(q, k, v, *longer, True), want[0])


def test_packed_projection(isa):
    B, T, H, D = 2, 130, 3, 24
    qkv, dout, slopes = torch.randn(B, T, 3 * H * D), torch.randn(B, T, H * D), torch.rand(H)

    def apart(x):
        q, k, v = (y.unflatten(2, (H, D)) for y in x.chunk(3, 2))
        return attention(q, k, v, True, 0.3, (40, 0), slopes).flatten(2)

    want = run(apart, qkv, dout=dout)
    got = run(lambda x: attention_qkv(x, H, True, 0.3, (40, 0), slopes), qkv, dout=dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with dispatch.use(attention="reference"):
        torch.testing.assert_close(attention_qkv(qkv, H, True, 0.3, (40, 0), slopes), want[0])


def lse_of(q, k, v, *options):
    return torch.ops.cgpt_ext.attention_fwd(q, k, v, *options, True)[1]


def test_lse(isa):
    H, D = 2, 24
    slopes = torch.rand(len(LENGTHS), H)
    q, k, v, _, seqlens = pack(LENGTHS, H, H, D)
    lse = lse_of(q, k, v, 40, 3, 0.2, slopes, *seqlens)
    assert lse.shape == (H, len(q))
    rows, keys = 0, 0
    for b, (Tq, Tk) in enumerate(LENGTHS):
        one = [q[None, rows : rows + Tq], k[None, keys : keys + Tk]]
        scores = torch.einsum("bihd,bjhd->bhij", *(x.double() for x in one)) * 0.2 + bias(Tq, Tk, (40, 3), slopes[b])
        want = scores.logsumexp(-1)[0]
        torch.testing.assert_close(lse[:, rows : rows + Tq].double(), want, rtol=0, atol=1e-5)
        dense = lse_of(*one, v[None, keys : keys + Tk], 40, 3, 0.2, slopes[b], None, None, 0, 0)
        assert torch.equal(dense[0], lse[:, rows : rows + Tq])
        rows, keys = rows + Tq, keys + Tk


@pytest.mark.parametrize("window", [(200, 200), (150, 2**40), (2**62, 10**9)])
def test_windows_that_nobody_meets_are_none(isa, window):
    q, k, v, dout = make(1, 140, 150, 1, 1, 16, torch.bfloat16)
    for causal in (False, True):
        want = run(attention, q, k, v, causal, dout=dout)
        got = run(lambda *x, causal=causal: attention(*x, causal, window_size=window), q, k, v, dout=dout)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_causal_closes_the_right_side(isa):
    q, k, v, dout = make(1, 140, 150, 1, 1, 16)
    want = run(lambda *x: attention(*x, False, window_size=(20, 0)), q, k, v, dout=dout)
    for right in (-1, 0, 7):
        got = run(lambda *x, right=right: attention(*x, True, window_size=[20, right]), q, k, v, dout=dout)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_queries_that_see_nothing(isa):
    q, k, v, dout = make(1, 250, 20, 2, 1, 16)  # query i stands above key i - 230
    out, dq, dk, dv = run(lambda *x: attention(*x, window_size=(3, 2)), q, k, v, dout=dout)
    for x in (out, dq):
        assert torch.equal(x[:, :228], torch.zeros(1, 228, 2, 16))
        assert (x[:, 229:] != 0).any(-1).all()
    assert (dk != 0).any(-1).all()
    assert (dv != 0).any(-1).all()
    lse = lse_of(q, k, v, 3, 2, 0.25, None, None, None, 0, 0)
    assert (lse[..., :228] == -math.inf).all()
    assert lse[..., 228:].isfinite().all()


def test_keys_that_nobody_sees(isa):
    q, k, v, dout = make(1, 20, 250, 2, 1, 16)  # the first query stands above key 230
    dk, dv = run(lambda *x: attention(*x, window_size=(3, 2)), q, k, v, dout=dout)[2:]
    for x in (dk, dv):
        assert torch.equal(x[:, :227], torch.zeros(1, 227, 1, 16))
        assert (x[:, 227:] != 0).any(-1).all()


def test_blocks_outside_the_window_are_not_read(isa):
    q, k, v, dout = make(1, 500, 500, 1, 1, 16)
    want = run(lambda *x: attention(*x, window_size=(10, 10)), q, k, v, dout=dout)
    for x in (k, v):
        x[:, :128] = math.nan
        x[:, 384:] = math.nan
    got = run(lambda *x: attention(*x, window_size=(10, 10)), q, k, v, dout=dout)
    # A block of 96 queries that starts at 192 sees keys from 182 on, one that ends at 384 keys up to 393.
    assert torch.equal(got[0][:, 192:288], want[0][:, 192:288])
    assert torch.equal(got[1][:, 192:288], want[1][:, 192:288])


@pytest.mark.parametrize("window", [(50, 0), (-1, 10), (70, 90)])
def test_bits_do_not_depend_on_threads(isa, window):
    q, k, v, dout = make(1, 300, 400, 4, 2, 16, torch.bfloat16)
    packed = pack([(300, 400), (3, 70), (200, 5)], 2, 1, 16, torch.bfloat16)
    slopes = torch.rand(2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(run(lambda *x: attention(*x, window_size=window), q, k, v, dout=dout))
            results[-1] += run(
                lambda *x: attention_varlen(*x, *packed[4], False, None, window, slopes), *packed[:3], dout=packed[3]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_repeats_are_bit_equal(isa):
    q, k, v, dout, seqlens = pack([(19, 70), (3, 0)], 2, 1, 16, torch.bfloat16)
    results = [
        run(lambda *x: attention_varlen(*x, *seqlens, True, None, (30, 0)), q, k, v, dout=dout) for _ in range(100)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_non_finite_slopes_come_out(isa):
    q, k, v, _ = make(1, 70, 70, 2, 2, 16)
    out = attention(q, k, v, alibi_slopes=torch.tensor([0.5, math.nan]))
    assert out[:, :, 0].isfinite().all()
    assert out[:, :, 1].isnan().all()


def test_empty(isa):
    for lengths in ([], [(0, 0)], [(0, 5), (0, 0)], [(5, 0)]):
        seqlens = [torch.tensor([0, *(x[i] for x in lengths)]).cumsum(0).int() for i in (0, 1)]
        q, k, v, dout = (x[0] for x in make(1, int(seqlens[0][-1]), int(seqlens[1][-1]), 2, 1, 8))
        out, dq, dk, dv = run(attention_varlen, q, k, v, *seqlens, 5, 5, True, dout=dout)
        for x, like in ((out, q), (dq, q), (dk, k), (dv, v)):
            assert torch.equal(x, torch.zeros_like(like))
        assert torch.equal(attention_varlen_ref(q, k, v, *seqlens, 5, 5, True), torch.zeros_like(q))


def test_slopes_get_no_gradient():
    q, k, v, dout = make(1, 5, 5, 2, 2, 8)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for function in (attention, compiled, attention_ref):
        slopes, leaf = torch.rand(2, requires_grad=True), q.clone().requires_grad_()
        function(leaf, k, v, alibi_slopes=slopes).backward(dout)
        assert leaf.grad is not None
        assert slopes.grad is None
        assert not function(q, k, v, alibi_slopes=slopes).requires_grad


def test_reference_is_softmax_attention():
    q, k, v, _ = (x.double() for x in make(2, 9, 14, 4, 2, 8))
    for causal, window in ((False, (2, 1)), (True, (3, -1)), (False, (-1, 2)), (False, (0, -1))):
        for slopes in (None, torch.rand(4), torch.rand(2, 4)):
            got = attention_ref(q, k, v, causal, None, window, slopes)
            torch.testing.assert_close(got, sdpa(q, k, v, causal, window, slopes))
    lengths = [(3, 5), (0, 2), (4, 4)]
    q, k, v, _, seqlens = pack(lengths, 4, 2, 8)
    slopes = torch.rand(3, 4)
    got = attention_varlen_ref(q, k, v, *seqlens, True, None, (2, 0), slopes)
    want = each(lambda q, k, v, b: sdpa(q, k, v, True, (2, 0), slopes[b]), lengths)(q, k, v)
    torch.testing.assert_close(got, want)


def test_reference_gradients():
    q, k, v, _ = (x.double().requires_grad_() for x in make(1, 3, 3, 1, 1, 8))
    slopes = torch.rand(1)
    assert torch.autograd.gradcheck(lambda *x: attention_ref(*x, False, 0.3, (1, 0), slopes), (q, k, v))
    q, k, v, _, seqlens = pack([(2, 2), (1, 0)], 1, 1, 8)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attention_varlen_ref(*x, *seqlens, True), inputs)


@pytest.mark.parametrize("save", [True, False])
def test_opcheck(save):
    ops = torch.ops.cgpt_ext
    q, k, v, dout, seqlens = pack([(3, 5), (0, 2), (4, 4)], 4, 2, 8)
    for slopes in (torch.rand(4), torch.rand(3, 4)):
        options = (2, 0, 0.5, slopes, *seqlens)
        torch.library.opcheck(ops.attention_fwd.default, (q, k, v, *options, save))
        out, lse = ops.attention_fwd(q, k, v, *options, True)
        torch.library.opcheck(ops.attention_bwd.default, (dout, q, k, v, out, lse, *options))
    qkv, options = torch.randn(2, 6, 48), (2, 3, 0, 0.5, torch.rand(2))
    torch.library.opcheck(ops.attention_qkv_fwd.default, (qkv, *options, save))
    out, lse = ops.attention_qkv_fwd(qkv, *options, True)
    torch.library.opcheck(ops.attention_qkv_bwd.default, (torch.randn_like(out), qkv, out, lse, *options))


def test_compiled_equals_eager():
    q, k, v, dout = make(2, 70, 70, 2, 2, 24, torch.bfloat16)
    slopes = torch.rand(2)

    def masked(q, k, v):
        return attention(q, k, v, True, window_size=(20, -1), alibi_slopes=slopes)

    def varlen(q, k, v, *seqlens):
        return attention_varlen(q, k, v, *seqlens, True, None, (20, -1), slopes)

    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    got, want = run(compiled, q, k, v, dout=dout), run(masked, q, k, v, dout=dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    compiled = torch.compile(varlen, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([(5, 5), (0, 7), (100, 131)], [(30, 30), (2, 90)]):
        q, k, v, dout, seqlens = pack(lengths, 2, 2, 16, torch.bfloat16)
        got, want = run(compiled, q, k, v, *seqlens, dout=dout), run(varlen, q, k, v, *seqlens, dout=dout)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_triton_is_called_with_checked_arguments(monkeypatch):
    called = []

    def stand_in(name):
        def launcher(*arguments):
            called.append(name)
            getattr(_native, name)(*arguments)  # the same arguments in the same order

        return launcher

    module = ModuleType("cgpt_ext.triton.attention")
    module.attention_fwd_triton, module.attention_bwd_triton = stand_in("attention_fwd"), stand_in("attention_bwd")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    q, k, v, dout, seqlens = pack([(3, 5), (4, 4)], 4, 2, 8)
    want = run(attention_varlen, q, k, v, *seqlens, True, dout=dout)
    with dispatch.use(attention="triton"):
        got = run(attention_varlen, q, k, v, *seqlens, True, dout=dout)
        assert called == ["attention_fwd", "attention_bwd"]
        run(attention_qkv, torch.randn(2, 6, 48), 2, True, dout=torch.randn(2, 6, 16))
        assert called == ["attention_fwd", "attention_bwd"] * 2
        with pytest.raises(ValueError, match="attention: v must be"):
            attention_varlen(q, k, v[:-1], *seqlens)
        assert len(called) == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"window_size": 3}, TypeError, "attention: window_size must be two ints, got 3"),
        ({"window_size": (3,)}, TypeError, "attention: window_size must be two ints, got (3,)"),
        ({"window_size": (3, 1.5)}, TypeError, "attention: window_size must be two ints, got (3, 1.5)"),
        ({"alibi_slopes": 0.5}, TypeError, "attention: alibi_slopes must be a torch.Tensor, got float"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "attention: alibi_slopes must be (4,), got (3,)"),
        ({"alibi_slopes": torch.ones(3, 4)}, ValueError, "attention: alibi_slopes must be (2, 4), got (3, 4)"),
        ({"alibi_slopes": torch.ones(4).half()}, TypeError, "attention: alibi_slopes must be float32, got float16"),
        (
            {"alibi_slopes": torch.ones(8)[::2]},
            ValueError,
            "attention: alibi_slopes must be contiguous, got shape (4,) with strides (2,)",
        ),
    ],
)
def test_bad_options(keywords, error, message):
    q, k, v, _ = make(2, 3, 3, 4, 2, 8)
    with pytest.raises(error) as caught:
        attention(q, k, v, **keywords)
    assert str(caught.value) == message


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens_q": cu(1, 2, 5)}, ValueError, "attention: cu_seqlens_q must be 0 at first, got 1"),
        ({"cu_seqlens_q": cu(0, 6, 5)}, ValueError, "attention: max_seqlen_q must be at least the longest"),
        ({"cu_seqlens_q": cu(0, -1, 5)}, ValueError, "attention: cu_seqlens_q must be never falling, got 0 before -1"),
        ({"cu_seqlens_q": cu(0, 2, 4)}, ValueError, "attention: cu_seqlens_q must be 5 at last, as many rows as there"),
        ({"cu_seqlens_k": cu(0, 4, 8)}, ValueError, "attention: cu_seqlens_k must be 7 at last, as many rows as there"),
        ({"cu_seqlens_k": cu(0, 7)}, ValueError, "attention: cu_seqlens_k must be (3,), got (2,)"),
        ({"cu_seqlens_q": cu()}, ValueError, "attention: cu_seqlens_q must be (B + 1,), got (0,)"),
        ({"cu_seqlens_q": cu(0, 2, 5).long()}, TypeError, "attention: cu_seqlens_q must be int32, got int64"),
        ({"cu_seqlens_q": None}, TypeError, "attention_varlen: cu_seqlens_q must be a torch.Tensor, got NoneType"),
        ({"max_seqlen_q": 2}, ValueError, "attention: max_seqlen_q must be at least the longest sequence's 3, got 2"),
        ({"max_seqlen_k": -1}, ValueError, "attention: max_seqlen_k must be at least 0, got -1"),
        ({"max_seqlen_q": 3.0}, TypeError, "attention_varlen: max_seqlen_q must be an int, got float"),
        ({"window_size": None}, TypeError, "attention_varlen: window_size must be two ints, got None"),
        ({"alibi_slopes": torch.ones(3, 4)}, ValueError, "attention: alibi_slopes must be (2, 4), got (3, 4)"),
        ({"q": torch.ones(1, 5, 4, 8)}, ValueError, "attention: q must be 3-dimensional, got shape (1, 5, 4, 8)"),
        ({"k": torch.ones(7, 3, 8)}, ValueError, "attention: k must be given with a number of heads that divides"),
        ({"v": torch.ones(6, 2, 8)}, ValueError, "attention: v must be (7, 2, 8), got (6, 2, 8)"),
    ],
)
def test_bad_varlen(change, error, message):
    arguments = {
        "q": torch.ones(5, 4, 8),
        "k": torch.ones(7, 2, 8),
        "v": torch.ones(7, 2, 8),
        "cu_seqlens_q": cu(0, 2, 5),
        "cu_seqlens_k": cu(0, 4, 7),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    }
    attention_varlen(**arguments)
    with pytest.raises(error) as caught:
        attention_varlen(**{**arguments, **change})
    assert str(caught.value).startswith(message)
