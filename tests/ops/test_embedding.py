import pytest
import torch
import torch.nn.functional as F

from cgpt_ext import _native, embedding, embedding_ref
from cgpt_ext.nn import Embedding
from numerics import DTYPES, assert_as_good_as_torch, compare, error, run

# B, T, V, D: 1, primes, no multiple of a vector or block of rows, one token, T % 128 == 64, many tokens of few ids
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (3, 1, 11, 64), (2, 64, 300, 24), (1, 192, 3, 127), (5, 61, 5000, 33)]


def torch_embedding(ids, wte, wpe=None, padding_idx=None):
    out = F.embedding(ids, wte, padding_idx)
    return out if wpe is None else out + wpe[: ids.shape[-1]]


def make(b, t, v, d, dtype, spare=3):
    ids = torch.randint(v, (b, t))
    return ids, *(x.to(dtype) for x in (torch.randn(v, d), torch.randn(t + spare, d), torch.randn(b, t, d)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(isa, shape, dtype):
    ids, wte, wpe, dout = make(*shape, dtype)
    compare(embedding, embedding_ref, torch_embedding, (ids, wte, wpe), dout)
    compare(embedding, embedding_ref, torch_embedding, (ids, wte), dout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_fp32(isa, dtype):
    """A thousand tokens of one id: summed in bf16 or fp16 the total would stop growing."""
    ids, wte, wpe, _ = make(1, 1000, 4, 19, dtype)
    dout = torch.rand(1, 1000, 19).to(dtype)
    ids.fill_(2)
    _, dwte, dwpe = run(embedding, ids, wte, wpe, dout=dout)
    want = dout.double().sum((0, 1))
    assert_as_good_as_torch(dwte[2], want, want.to(dtype), "the id's row")
    assert not dwte[[0, 1, 3]].any()
    assert torch.equal(dwpe[:1000], dout[0])
    assert not dwpe[1000:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lookup_alone_copies_bits(isa, dtype):
    ids, wte, _, _ = make(3, 7, 40, 21, dtype)
    wte[3] = float("nan")
    wte[4] = float("inf")
    wte[5] = -0.0
    ids[0, :3] = torch.tensor([3, 4, 5])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(embedding(ids, wte).view(bits), wte[ids].view(bits))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_comes_out(isa, bad):
    ids, wte, wpe, dout = make(2, 9, 4, 20, torch.float32)
    ids[:] = torch.tensor([0, 1, 2] * 3)
    dout[1, 4, 7] = bad
    wpe[2, 3] = bad
    out, dwte, dwpe = run(embedding, ids, wte, wpe, dout=dout)
    for got, row, column in ((out[0], 2, 3), (out[1], 2, 3), (dwte, 1, 7), (dwpe, 4, 7)):
        assert not got[row, column].isfinite()
        assert int((~got.isfinite()).sum()) == 1


def test_large_magnitudes(isa):
    ids, wte, wpe, dout = make(2, 9, 4, 20, torch.float32)
    compare(embedding, embedding_ref, torch_embedding, (ids, wte * 1e30, wpe * -1e30), dout * 1e30)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,), (2, 0)])
def test_ids_of_any_shape(isa, shape):
    ids, wte = torch.randint(9, shape), torch.randn(9, 12)
    compare(embedding, embedding_ref, torch_embedding, (ids, wte), torch.randn(*shape, 12))


def test_empty_batch_with_positions(isa):
    for shape in ((0, 4), (3, 0)):
        ids, wte, wpe = torch.zeros(shape, dtype=torch.int64), torch.randn(9, 12), torch.randn(4, 12)
        out, dwte, dwpe = run(embedding, ids, wte, wpe, dout=torch.zeros(*shape, 12))
        assert out.shape == (*shape, 12)
        assert torch.equal(dwte, torch.zeros_like(wte))
        assert torch.equal(dwpe, torch.zeros_like(wpe))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(isa, dtype):
    ids, wte, _, dout = make(4, 6, 10, 16, dtype)
    wide_wte, wide_wpe = torch.randn(20, 40).to(dtype)[::2, :16], torch.randn(6, 17).to(dtype)[:, 1:]
    compare(embedding, embedding_ref, torch_embedding, (ids.t().contiguous().t(), wide_wte, wide_wpe), dout)
    expanded = dout[:1, :1].expand_as(dout)
    leaf = wte.clone().requires_grad_()
    embedding(ids, leaf).backward(expanded)
    again = wte.clone().requires_grad_()
    embedding(ids, again).backward(expanded.contiguous())
    assert torch.equal(leaf.grad, again.grad)


def test_rows_past_2_31_elements(isa):
    stride = 2**31 + 7  # memory that is never touched costs nothing: two pages of each 4 GiB are
    table = torch.empty(stride + 8, dtype=torch.bfloat16).as_strided((2, 8), (stride, 1))
    table.copy_(torch.randn(2, 8))
    ids = torch.tensor([[1, 0, 1]])
    want = table.contiguous()[ids]
    assert torch.equal(embedding(ids, table), want)
    assert torch.equal(embedding(ids, table, torch.zeros(3, 8, dtype=torch.bfloat16)), want)
    rows = 2**28 + 2  # 8 columns each: the last rows' gradients lie past 2^31 elements too
    dwte = torch.empty(rows, 8, dtype=torch.bfloat16)
    far = torch.tensor([rows - 1, 3, rows - 1, rows - 2])
    dout = torch.randn(4, 8).to(torch.bfloat16)
    _native.embedding_bwd(dout, far, dwte, None, -1, None, None, None)
    assert torch.equal(dwte[far[1:]], torch.stack([dout[1], (dout[0].float() + dout[2].float()).bfloat16(), dout[3]]))


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_idx(isa, padding_idx):
    ids, wte, wpe, dout = make(3, 20, 5, 12, torch.float32)
    compare(embedding, embedding_ref, torch_embedding, (ids, wte, wpe, padding_idx), dout)
    _, dwte, dwpe = run(embedding, ids, wte, wpe, padding_idx, dout=dout)
    assert not dwte[padding_idx].any()
    assert dwte.any()
    assert error(dwpe[:20], dout.double().sum(0)) < 1e-5


def test_sort_with_many_digits(isa):
    """Ids that need one, two and three passes of the radix sort, in descending order and with repeats."""
    for v in (2048, 2049, 2**22 + 9):
        ids = torch.tensor([v - 1, v // 2, 0, v - 1, v // 2, 1, v - 1, 2047 % v, 2048 % v])
        dout = torch.randn(9, 3)
        wte = torch.zeros(v, 3, requires_grad=True)
        embedding(ids, wte).backward(dout)
        want = torch.zeros(v, 3, dtype=torch.float64).index_add_(0, ids, dout.double())
        assert error(wte.grad, want) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(isa, dtype):
    ids, wte, wpe, dout = make(4, 150, 37, 96, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run(embedding, ids, wte, wpe, dout=dout))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_hundred_runs_are_bit_equal():
    ids, wte, wpe, dout = make(2, 30, 5, 24, torch.bfloat16)
    first = run(embedding, ids, wte, wpe, dout=dout)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(embedding, ids, wte, wpe, dout=dout), strict=True))


def test_only_the_gradient_asked_for():
    ids, wte, wpe, dout = make(2, 6, 5, 12, torch.float32)
    _, dwte, dwpe = run(embedding, ids, wte, wpe, dout=dout)
    for tables, want in (((wte.clone().requires_grad_(), wpe), dwte), ((wte, wpe.clone().requires_grad_()), dwpe)):
        embedding(ids, *tables).backward(dout)
        (got,) = (t.grad for t in tables if t.requires_grad)
        assert torch.equal(got, want)


def test_reference_gradients():
    ids, wte, wpe, _ = make(2, 4, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: embedding_ref(ids, a, b), (wte.requires_grad_(), wpe.requires_grad_()))
    padded = embedding_ref(torch.tensor([[1, 2]]), wte, None, 2)
    (grad,) = torch.autograd.grad(padded.sum(), wte)
    assert grad.sum(1).tolist() == [0, 3, 0, 0, 0]


def test_opcheck():
    ids, wte, wpe, dout = make(2, 4, 5, 8, torch.float32)
    ops = torch.ops.cgpt_ext
    torch.library.opcheck(ops.embedding_fwd.default, (ids, wte, wpe))
    torch.library.opcheck(ops.embedding_fwd.default, (ids.t(), torch.randn(5, 16)[:, :8], None))
    for mask in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(ops.embedding_bwd.default, (dout, ids, 5, 7, 2, mask))


def test_compiled_equals_eager():
    ids, wte, wpe, dout = make(2, 4, 5, 8, torch.bfloat16)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    eager, again = run(embedding, ids, wte, wpe, dout=dout), run(compiled, ids, wte, wpe, dout=dout)
    assert all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))


BAD_INPUT = [
    (lambda i, e, p: (i.int(), e, p), TypeError, "ids must be int64, got int32"),
    (lambda i, e, p: (i.float(), e, p), TypeError, "ids must be int64, got float32"),
    (lambda i, e, p: ([0], e, p), TypeError, "ids must be a torch.Tensor, got list"),
    (lambda i, e, p: (i, None, p), TypeError, "wte must be a torch.Tensor, got NoneType"),
    (lambda i, e, p: (i, e.int(), p), TypeError, "wte must be float32 or bfloat16 or float16, got int32"),
    (lambda i, e, p: (i, e[0], p), ValueError, "wte must be 2-dimensional, got shape (8,)"),
    (lambda i, e, p: (i, e[0, 0], p), ValueError, "wte must be 2-dimensional, got shape ()"),
    (lambda i, e, p: (i, e[:, :0], p), ValueError, "wte must be non-empty in its last dimension, got (5, 0)"),
    (
        lambda i, e, p: (i, e.t().contiguous().t(), p),
        ValueError,
        "wte must be contiguous in its last dimension, got strides (1, 5)",
    ),
    (lambda i, e, p: (i, e, p.bfloat16()), TypeError, "wpe must be float32, got bfloat16"),
    (lambda i, e, p: (i, e, p[:, :7].contiguous()), ValueError, "wpe must be (*, 8), got (4, 7)"),
    (lambda i, e, p: (i, e, p[:2]), ValueError, "wpe must be at least 3 rows for ids (2, 3), got 2"),
    (lambda i, e, p: (i[0], e, p), ValueError, "ids must be 2-dimensional, got shape (3,)"),
    (lambda i, e, p: (i + 4, e, p), ValueError, "ids must be in [0, 5), got 5"),
    (lambda i, e, p: (i - 2, e, p), ValueError, "ids must be in [0, 5), got -1"),
    (lambda i, e, p: (i * 2**62, e, p), ValueError, f"ids must be in [0, 5), got {2**62}"),
    (lambda i, e, p: (i * 0 - 2**63, e, p), ValueError, f"ids must be in [0, 5), got {-(2**63)}"),
    (lambda i, e, p: (i, e[:0], p), ValueError, "ids must be in [0, 0), got 1"),
    (lambda i, e, p: (i, e, p, 5), ValueError, "padding_idx must be in [-5, 5), got 5"),
    (lambda i, e, p: (i, e, p, -6), ValueError, "padding_idx must be in [-5, 5), got -6"),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("arguments", "exception", "message"), BAD_INPUT)
def test_bad_input(arguments, exception, message, grad):
    wte, wpe = torch.randn(5, 8, requires_grad=grad), torch.randn(4, 8)
    with pytest.raises(exception) as caught:
        embedding(*arguments(torch.ones(2, 3, dtype=torch.int64), wte, wpe))
    assert str(caught.value) == f"embedding: {message}"


def test_one_bad_id_among_many_is_found(isa):
    wte = torch.randn(7, 4)
    for position in (0, 1, 500, 1001, 1002):
        for bad in (7, -1, 2**40):
            ids = torch.randint(7, (1003,))
            ids[position] = bad
            with pytest.raises(ValueError, match=rf"^embedding: ids must be in \[0, 7\), got {bad}$"):
                embedding(ids, wte)
            with pytest.raises(ValueError, match=rf"^embedding: ids must be in \[0, 7\), got {bad}$"):
                _native.embedding_bwd(torch.zeros(1003, 4), ids, wte, None, -1, None, None, None)


def test_the_kernels_themselves_refuse_what_does_not_fit():
    ids, wte, wpe, out = make(2, 3, 5, 8, torch.float32)
    for call in (
        lambda: _native.embedding_fwd(ids.t(), wte, None, out.transpose(0, 1)),
        lambda: _native.embedding_fwd(ids, wte, wpe, out[:1]),
        lambda: _native.embedding_fwd(ids, wte, wpe, out[..., :7].contiguous()),
        lambda: _native.embedding_fwd(ids, wte, wpe, out.view(6, 8)),
        lambda: _native.embedding_bwd(out[:1], ids, wte, wpe, -1, None, None, None),
        lambda: _native.embedding_bwd(out, ids, wte[:, :7].contiguous(), wpe, -1, None, None, None),
        lambda: _native.embedding_bwd(out, ids, wte, wpe[:2], -1, None, None, None),
        lambda: _native.embedding_bwd(out, ids, torch.randn(8, 5).t(), wpe, -1, None, None, None),
        lambda: _native.embedding_bwd(out, ids, wte, torch.randn(8, 4).t(), -1, None, None, None),
        lambda: _native.embedding_bwd(out.flatten(0, 1), ids.flatten(), wte, wpe, -1, None, None, None),
    ):
        with pytest.raises(ValueError, match=r"^embedding: \w+ must be "):
            call()
    with pytest.raises(TypeError, match="embedding: out must be float32, got bfloat16"):
        _native.embedding_fwd(ids, wte, wpe, out.bfloat16())


def test_module_is_torchs(isa):
    theirs, ours = torch.nn.Embedding(9, 12, padding_idx=2), Embedding(9, 12, padding_idx=2)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(9, (4, 5))
    for module in (theirs, ours):
        module(ids).square().sum().backward()
    assert torch.equal(ours(ids), theirs(ids))
    assert torch.equal(ours(ids.int()), theirs(ids))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    assert torch.equal(Embedding.from_pretrained(theirs.weight.detach())(ids), theirs(ids))
    for option, value in (("max_norm", 1.0), ("scale_grad_by_freq", True), ("sparse", True)):
        with pytest.raises(ValueError, match=f"^Embedding: {option} must be left at its default, got {value}$"):
            Embedding(9, 12, **{option: value})
