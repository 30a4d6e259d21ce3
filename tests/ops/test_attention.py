import math

import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import _native, attention, attention_qkv, attention_ref, dispatch
from cgpt_ext.nn import CausalSelfAttention
from numerics import DTYPES, assert_as_good_as_torch, compare, run

# B, Tq, Tk, H, Hkv, D. Blocks are 96 queries by 64 keys, tiles 6 or 4 rows, vectors 16, 8 or 4 lanes; up to 4 queries
# read keys where they lie.
SHAPES = [
    (1, 1, 1, 1, 1, 8),
    (2, 7, 13, 3, 3, 24),
    (1, 131, 131, 2, 2, 64),
    (1, 192, 192, 1, 1, 80),
    (1, 67, 131, 1, 1, 40),
    (1, 131, 67, 1, 1, 72),
    (1, 1, 130, 2, 2, 16),
    (2, 3, 200, 2, 1, 40),
    (1, 4, 131, 1, 1, 72),
    (2, 37, 37, 4, 2, 128),
    (1, 97, 97, 1, 1, 256),
]


def sdpa(q, k, v, causal=False, softmax_scale=None):
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    Tq, Tk = q.shape[1], k.shape[1]
    square = causal and Tq == Tk  # torch aligns the first query with the first key
    mask = torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq) if causal and not square else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=softmax_scale)
    return out.transpose(1, 2)


def make(B, Tq, Tk, H, Hkv, D, dtype=torch.float32):
    shapes = [(B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D), (B, Tq, H, D)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def fwd(q, k, v, causal, scale=None):
    """(out, lse) of the registered op."""
    options = (-1, 0 if causal else -1, scale or q.shape[-1] ** -0.5, None, None, None, 0, 0)
    return torch.ops.cgpt_ext.attention_fwd(q, k, v, *options, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(isa, shape, causal, dtype):
    q, k, v, dout = make(*shape, dtype)
    compare(attention, attention_ref, sdpa, (q, k, v, causal), dout)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.5])
def test_softmax_scale(isa, scale):
    q, k, v, dout = make(1, 70, 70, 2, 2, 16)
    compare(attention, attention_ref, sdpa, (q, k, v, True, scale), dout)


@pytest.mark.parametrize("causal", [False, True])
def test_lse(isa, causal):
    q, k, v, _ = make(2, 70, 133, 2, 2, 24)
    _, lse = fwd(q, k, v, causal)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 24**-0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(70, 133, dtype=torch.bool).tril(133 - 70), -math.inf)
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-6 * scores.abs().max().clamp(max=20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_far_below_what_exp_holds(isa, dtype):
    q, k, v, dout = make(1, 100, 100, 1, 1, 64, dtype)
    # Scores near -200: exp of any of them is 0 in fp32. Multiples of 1/8 keep them exact, so 1e-5 can be asked for.
    q, k = q.round() / 8 + 5, k.round() / 8 - 5
    _, lse = fwd(q, k, v, True)
    assert lse.max() < -88.7
    compare(attention, attention_ref, sdpa, (q, k, v, True), dout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_ten_thousand(isa, dtype):
    q, k, v, dout = make(1, 100, 100, 2, 2, 64, dtype)
    # One such head beside a gentle one. Its keys' scores lie at least 160 apart: could a query's two best tie, lse
    # would be 1e4 + ln 2, and fp32 has steps of 0.001 there, for torch as for us.
    q[0, :, 1, :8] = (torch.randint(160, 257, (100, 1)) * torch.randn(100, 1).sign()).to(dtype)
    k[0, :, 1, :8] = (torch.randperm(100)[:, None] - 50).to(dtype)
    assert (q[0, :, 1].double() @ k[0, :, 1].double().T / 8).abs().max() > 1e4
    compare(attention, attention_ref, sdpa, (q, k, v, True), dout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_that_see_nothing(isa, dtype):
    q, k, v, dout = make(1, 150, 20, 2, 1, 16, dtype)
    out, dq, dk, dv = run(attention, q, k, v, True, dout=dout)
    _, lse = fwd(q, k, v, True)
    assert torch.equal(out[:, :130], torch.zeros_like(out[:, :130]))
    assert torch.equal(dq[:, :130], torch.zeros_like(dq[:, :130]))
    assert (lse[:, :, :130] == -math.inf).all()
    assert lse[:, :, 130:].isfinite().all()
    rest = run(attention, q[:, 130:], k, v, True, dout=dout[:, 130:])
    for got, alone in zip((out[:, 130:], dq[:, 130:], dk, dv), rest, strict=True):
        torch.testing.assert_close(got, alone)


def test_empty(isa):
    for shape in [(0, 5, 5, 2, 2, 8), (2, 0, 5, 2, 2, 8), (2, 5, 0, 2, 2, 8), (2, 5, 5, 0, 0, 8)]:
        q, k, v, dout = make(*shape)
        out, dq, dk, dv = run(attention, q, k, v, False, dout=dout)
        for x, like in ((out, q), (dq, q), (dk, k), (dv, v)):
            assert torch.equal(x, torch.zeros_like(like))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(isa, dtype):
    B, T, H, D = 2, 70, 3, 40
    wide = torch.randn(B, T, 3, H, D).to(dtype)
    dout = torch.randn(B, H, T, D).to(dtype).transpose(1, 2)
    q, k, v = wide.unbind(2)
    compare(attention, attention_ref, sdpa, (q, k, v, True), dout)
    apart = run(attention, *(x.contiguous() for x in (q, k, v)), True, dout=dout.contiguous())
    together = run(attention, q, k, v, True, dout=dout)
    by_head = run(attention, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), True, dout=dout)
    turned = run(attention, *(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)), True, dout=dout)
    for other in (together, by_head, turned):
        assert all(torch.equal(a, b) for a, b in zip(apart, other, strict=True))


def test_expanded_gradient_and_keys(isa):
    q, k, v, _ = make(2, 9, 9, 4, 1, 16)
    one = torch.ones(()).expand(2, 9, 4, 16)
    apart = run(attention, q, k.expand(2, 9, 4, 16).contiguous(), v.expand(2, 9, 4, 16).contiguous(), True, dout=one)
    shared = [x.requires_grad_() for x in (q, k, v)]
    out = attention(q, k.expand(2, 9, 4, 16), v.expand(2, 9, 4, 16), True)
    out.sum().backward()
    assert torch.equal(out, apart[0])
    assert torch.equal(shared[0].grad, apart[1])
    torch.testing.assert_close(shared[1].grad, apart[2].sum(2, keepdim=True))


def test_strides_past_two_to_the_31():
    B, T, H, D = 2, 5, 2, 16
    far = 2**31 + 64
    huge = torch.empty(2 * far, dtype=torch.bfloat16)  # 8 GiB of address space, of which a few pages are touched
    where = [huge.as_strided((B, T, H, D), (far, 48 * H, 48, 1), 16 * i) for i in range(3)]
    q, k, v, dout = make(B, T, T, H, H, D, torch.bfloat16)
    for place, x in zip(where, (q, k, v), strict=True):
        place.copy_(x)
    want = run(attention, q, k, v, True, dout=dout)
    out, lse = fwd(*where, True)
    assert torch.equal(out, want[0])
    options = (-1, 0, D**-0.5, None, None, None, 0, 0, torch.empty_like(lse))
    _native.attention_bwd(dout, *(x.clone() for x in (q, k, v)), out, lse, *options, *where)
    assert all(torch.equal(got, x) for got, x in zip(where, want[1:], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_comes_out(isa, bad):
    q, k, v, dout = make(2, 100, 100, 2, 2, 16)
    q[0, 50, 1, 3] = bad
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
    out = attention(q, k, v, True)
    assert not out[0, 50:, 1, 3].isfinite().any()
    assert out[0, :, 0].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 300, 300, 1, 1, 24), (2, 200, 300, 4, 2, 16), (1, 300, 130, 6, 1, 16)], ids=str)
def test_bits_do_not_depend_on_threads(isa, shape):
    """One thread takes whole heads; more of them cut heads into pieces, by queries and by keys."""
    q, k, v, dout = make(*shape, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append([*run(attention, q, k, v, True, dout=dout), fwd(q, k, v, True)[1]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_repeats_are_bit_equal(isa):
    q, k, v, dout = make(1, 19, 70, 2, 1, 16, torch.bfloat16)
    first = run(attention, q, k, v, True, dout=dout)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(attention, q, k, v, True, dout=dout), strict=True))


@pytest.mark.parametrize("D", [8, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_queries_read_their_own_keys_alone(isa, dtype, D):
    """Keys in memory as generation keeps them, a head's behind another's, amid rows that nobody has written."""
    q, k, v, _ = make(1, 6, 130, 3, 3, D, dtype)
    kept = []
    for x in (k, v):
        memory = torch.full((3, 200, D), math.nan, dtype=dtype)
        memory[:, :130] = x[0].transpose(0, 1)
        kept.append(memory[:, :130].transpose(0, 1)[None])
    exact = attention_ref(*(x.double() for x in (q, k, v)), True)
    for count in range(1, 7):
        got, theirs = (function(q[:, -count:], *kept, True) for function in (attention, sdpa))
        assert_as_good_as_torch(got, exact[:, -count:], theirs, f"{count} queries")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed(isa, causal, dtype):
    B, T, H, D = 2, 70, 3, 24
    qkv, dout = torch.randn(B, T, 3 * H * D).to(dtype), torch.randn(B, T, H * D).to(dtype)

    def apart(function):
        return lambda x: function(*(y.unflatten(2, (H, D)) for y in x.chunk(3, 2)), causal).flatten(2)

    compare(lambda x: attention_qkv(x, H, causal), apart(attention_ref), apart(sdpa), (qkv,), dout)
    packed = run(attention_qkv, qkv, H, causal, dout=dout)
    assert all(torch.equal(a, b) for a, b in zip(packed, run(apart(attention), qkv, dout=dout), strict=True))
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(torch.equal(a, b) for a, b in zip(packed, run(attention_qkv, turned, H, causal, dout=dout), strict=True))
    assert torch.equal(attention_qkv(qkv, H, causal), packed[0])
    with dispatch.use(attention="reference"):
        assert_as_good_as_torch(packed[0], attention_qkv(qkv.double(), H, causal), apart(sdpa)(qkv))


def test_reference_gradients():
    q, k, v, _ = (x.double().requires_grad_() for x in make(1, 3, 2, 2, 1, 8))
    assert torch.autograd.gradcheck(lambda q, k, v: attention_ref(q, k, v, True), (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: attention_ref(q, k, v, False, 0.3), (q, k, v))


def test_reference_is_softmax_attention():
    q, k, v, _ = (x.double() for x in make(2, 6, 9, 4, 2, 8))
    for causal in (False, True):
        torch.testing.assert_close(attention_ref(q, k, v, causal), sdpa(q, k, v, causal))


@pytest.mark.parametrize("save", [True, False])
def test_opcheck(save):
    q, k, v, dout = make(2, 6, 9, 4, 2, 8)
    ops, options = torch.ops.cgpt_ext, (-1, 0, 0.5, None, None, None, 0, 0)
    torch.library.opcheck(ops.attention_fwd.default, (q, k, v, *options, save))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.library.opcheck(ops.attention_fwd.default, (*strided, *options, save))
    out, lse = ops.attention_fwd(q, k, v, *options, True)
    torch.library.opcheck(ops.attention_bwd.default, (dout, *strided, out, lse, *options))
    qkv, options = torch.randn(2, 6, 48), (2, -1, 0, 0.5, None)
    torch.library.opcheck(ops.attention_qkv_fwd.default, (qkv, *options, save))
    out, lse = ops.attention_qkv_fwd(qkv, *options, True)
    torch.library.opcheck(ops.attention_qkv_bwd.default, (torch.randn_like(out), qkv, out, lse, *options))


def test_compiled_equals_eager():
    q, k, v, dout = make(2, 70, 70, 2, 2, 24, torch.bfloat16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = run(attention, q, k, v, True, dout=dout)
    assert all(torch.equal(a, b) for a, b in zip(eager, run(compiled, q, k, v, True, dout=dout), strict=True))
    qkv, dout = torch.cat((q, k, v), 2).flatten(2), dout.flatten(2)
    compiled = torch.compile(attention_qkv, fullgraph=True, backend="aot_eager")
    eager = run(attention_qkv, qkv, 2, True, dout=dout)
    assert all(torch.equal(a, b) for a, b in zip(eager, run(compiled, qkv, 2, True, dout=dout), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x: (x[..., :12], x, x), ValueError, "head dim must be a multiple of 8 from 8 to 256, got 12"),
        (lambda x: (x[..., :0],) * 3, ValueError, "head dim must be a multiple of 8 from 8 to 256, got 0"),
        (lambda x: (x.repeat(1, 1, 1, 17),) * 3, ValueError, "head dim must be a multiple of 8 from 8 to 256, got 272"),
        (lambda x: (x[0], x, x), ValueError, "q must be 4-dimensional, got shape (3, 4, 16)"),
        (lambda x: (x, x[:1], x), ValueError, "k must be (2, *, *, 16), got (1, 3, 4, 16)"),
        (lambda x: (x, x[..., :8], x), ValueError, "k must be (2, *, *, 16), got (2, 3, 4, 8)"),
        (lambda x: (x, x[:, :, :3], x), ValueError, "k must be given with a number of heads that divides q's 4, got 3"),
        (lambda x: (x, x[:, :, :0], x), ValueError, "k must be given with a number of heads that divides q's 4, got 0"),
        (lambda x: (x, x, x[:, :2]), ValueError, "v must be (2, 3, 4, 16), got (2, 2, 4, 16)"),
        (lambda x: (x.int(), x, x), TypeError, "q must be float32 or bfloat16 or float16, got int32"),
        (lambda x: (x.double(),) * 3, TypeError, "q must be float32 or bfloat16 or float16, got float64"),
        (lambda x: (x, x.half(), x), TypeError, "k must be float32, got float16"),
        (lambda x: (x, x, None), TypeError, "v must be a torch.Tensor, got NoneType"),
        (lambda x: (x, 3, x), TypeError, "k must be a torch.Tensor, got int"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as caught:
        attention(*arguments(torch.randn(2, 3, 4, 16)))
    assert str(caught.value) == f"attention: {message}"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 48), 2), ValueError, "attention_qkv: qkv must be 3-dimensional, got shape (2, 48)"),
        (
            (torch.zeros(2, 3, 50), 2),
            ValueError,
            "attention_qkv: qkv must be (B, T, 3 * D_model) with n_head=2 dividing D_model, got (2, 3, 50)",
        ),
        (
            (torch.zeros(2, 3, 48), 0),
            ValueError,
            "attention_qkv: qkv must be (B, T, 3 * D_model) with n_head=0 dividing D_model, got (2, 3, 48)",
        ),
        (
            (torch.zeros(2, 3, 36), 1),
            ValueError,
            "attention: head dim must be a multiple of 8 from 8 to 256, got 12",
        ),
        ((None, 2), TypeError, "attention_qkv: qkv must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_packed_input(arguments, error, message):
    with pytest.raises(error) as caught:
        attention_qkv(*arguments)
    assert str(caught.value) == message


def torch_module(module, x):
    """nanoGPT's attention in torch's own parts, on `module`'s parameters."""
    c_attn, c_proj = ((linear.weight, linear.bias) for linear in (module.c_attn, module.c_proj))
    q, k, v = (y.unflatten(2, (module.n_head, -1)) for y in F.linear(x, *c_attn).chunk(3, 2))
    return F.linear(sdpa(q, k, v, True).flatten(2), *c_proj)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_module_is_torchs(bias, autocast):
    module = CausalSelfAttention(48, 3, bias=bias)
    names = [
        f"{layer}.{name}" for layer in ("c_attn", "c_proj") for name in (("weight", "bias") if bias else ("weight",))
    ]
    assert list(module.state_dict()) == names
    x, dy = torch.randn(2, 20, 48), torch.randn(2, 20, 48)
    results = []
    for function in (module, lambda x: torch_module(module, x)):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        y.backward(dy.to(y.dtype))
        results.append([y, *(p.grad.clone() for p in module.parameters())])
    wide = CausalSelfAttention(48, 3, bias=bias, dtype=torch.float64)
    wide.load_state_dict(module.state_dict())
    y = torch_module(wide, x.double())
    y.backward(dy.double())
    for ours, theirs, want in zip(*results, [y, *(p.grad for p in wide.parameters())], strict=True):
        assert ours.dtype == theirs.dtype
        if autocast:  # both round to bf16 between the parts: torch's own error is the bar
            assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max()
        else:
            assert_as_good_as_torch(ours, want, theirs)


def test_module_refuses_odd_heads():
    with pytest.raises(ValueError, match="must be a multiple of 8 from 8 to 256, got 48 / 4"):
        CausalSelfAttention(48, 4)
