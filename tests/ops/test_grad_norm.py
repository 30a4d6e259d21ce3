import math

import pytest
import torch

from cgpt_ext import _native, dispatch, grad_norm, grad_norm_ref, grad_square_sums
from cgpt_ext.nn import clip_grad_norm_
from cgpt_ext.ops.grad_norm import grad_square_sums_ref
from numerics import DTYPES, assert_as_good_as_torch

SHAPES = [(1,), (7,), (3, 5), (64,), (127, 129), (32769,), ()]


def make(dtype=torch.float32, scale=1.0):
    return [(torch.randn(shape) * scale).to(dtype) for shape in SHAPES]


def truth(grads):
    return torch.cat([g.double().reshape(-1) for g in grads]).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_values(isa, dtype, scale):
    grads = make(dtype, scale)
    norm = grad_norm(grads)
    assert norm.shape == ()
    assert_as_good_as_torch(norm, truth(grads), torch.nn.utils.get_total_norm([g.float() for g in grads]))
    assert norm.item() == pytest.approx(truth(grads).item(), rel=1e-7)  # half a bit of fp32
    assert grad_norm_ref(grads).item() == pytest.approx(truth(grads).item(), rel=1e-7)


def test_mixed_dtypes_and_strides(isa):
    grads = [torch.randn(7, 9), torch.randn(33).bfloat16(), torch.randn(40, 6)[::3, 1:4], torch.randn(8, 5).half().t()]
    assert grad_norm(grads).item() == pytest.approx(truth(grads).item(), rel=1e-7)


def test_a_dense_transpose_is_read_where_it_lies(isa):
    x = torch.randn(50, 30)
    assert torch.equal(grad_norm([x.t()]), grad_norm([x]))


def test_squares_past_fp32(isa):
    assert grad_norm([torch.full((100,), 1e30), torch.full((100,), -1e30)]).item() == pytest.approx(
        math.sqrt(200) * 1e30
    )
    assert grad_norm([torch.full((100,), 1e-30)]).item() == pytest.approx(1e-29)
    assert grad_norm([torch.full((100,), 3e38)]).isinf()  # the norm itself does not fit


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_comes_out(isa, bad):
    grads = make()
    grads[4][3, 3] = bad
    assert torch.equal(grad_norm(grads), torch.tensor(bad)) or (math.isnan(bad) and grad_norm(grads).isnan())


def test_empty():
    assert grad_norm([]).item() == 0
    assert grad_norm([torch.empty(0, 3), torch.ones(4)]).item() == 2


def test_bits_depend_on_the_list_alone():
    grads = [torch.randn(200001), torch.randn(77).bfloat16(), torch.randn(1025, 33).half()]
    norms = []
    before = torch.get_num_threads()
    for name in dispatch.report()["cpu"]["available"]:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            with dispatch.cpu_isa(name):
                norms.append(grad_norm(grads).item())
    torch.set_num_threads(before)
    assert len(set(norms)) == 1
    small = [torch.randn(1000)]
    assert len({grad_norm(small).item() for _ in range(100)}) == 1


def test_opcheck_and_compiled():
    grads = make()
    torch.library.opcheck(torch.ops.cgpt_ext.grad_norm.default, (grads,))
    compiled = torch.compile(grad_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(grads), grad_norm(grads))
    with dispatch.use(grad_norm="reference"):
        assert torch.equal(grad_norm(grads), grad_norm_ref(grads))


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.ones(2), torch.ones(2).double()], "grads[1] must be float32 or bfloat16 or float16, got float64"),
        ([torch.ones(2), 3], "grads[1] must be a torch.Tensor, got int"),
        (torch.ones(2), "grads must be a list of tensors, got Tensor"),
    ],
)
def test_bad_input(grads, message):
    with pytest.raises(TypeError) as caught:
        grad_norm(grads)
    assert str(caught.value) == f"grad_norm: {message}"


def mixed():
    grads = [torch.randn(5000), torch.randn(33).bfloat16(), torch.randn(40, 6)[::3, 1:4], torch.empty(0, 3)]
    return [*grads, torch.randn(70, 50).half().t(), torch.randn(2048), torch.randn(())]


@pytest.mark.parametrize("chunk", [1, 31, 32, 100, 1024, 1 << 30])
def test_square_sums_are_the_references_and_the_truth(isa, chunk):
    grads = mixed()
    sums = grad_square_sums(grads, chunk)
    assert (sums.dtype, sums.device.type) == (torch.float64, "cpu")
    assert torch.equal(sums, grad_square_sums_ref(grads, chunk))
    lying = [*grads[:4], grads[4].t(), *grads[5:]]  # as they lie in memory
    want = [piece.double().square().sum() for x in lying if x.numel() for piece in x.reshape(-1).split(chunk)]
    torch.testing.assert_close(sums, torch.stack(want), rtol=1e-14, atol=0)


def test_square_sums_of_a_chunk_of_grad_norms_add_up_to_it(isa):
    grads = mixed()
    sums = grad_square_sums(grads, 1 << 15)
    running = torch.zeros(256, dtype=torch.float64)
    for i, x in enumerate(sums):
        running[i % 256] += x
    while len(running) > 1:
        running = running[: len(running) // 2] + running[len(running) // 2 :]
    assert torch.equal(running[0].sqrt().float(), grad_norm(grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_square_sums_of_pieces_are_the_whole_tensors(isa, dtype):
    """What ranks own: a tensor cut at multiples of the chunk, each piece in a list of its own or all in one."""
    whole = torch.randn(70001).to(dtype)
    pieces = whole.split([1024, 40 * 1024, 1024, 70001 - 42 * 1024])
    sums = grad_square_sums([whole])
    assert len(sums) == 69
    assert torch.equal(grad_square_sums(pieces), sums)
    assert torch.equal(torch.cat([grad_square_sums([piece]) for piece in pieces]), sums)
    assert torch.equal(grad_square_sums([torch.cat([piece[:1], piece])[1:] for piece in pieces]), sums)  # unaligned


def test_square_sums_do_not_depend_on_threads_or_instructions():
    grads = [torch.randn(200001), torch.randn(77).bfloat16(), torch.randn(1025, 33).half()]
    want = grad_square_sums_ref(grads)
    before = torch.get_num_threads()
    try:
        for name in dispatch.report()["cpu"]["available"]:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with dispatch.cpu_isa(name):
                    assert torch.equal(grad_square_sums(grads), want)
    finally:
        torch.set_num_threads(before)


def test_square_sums_past_fp32_and_of_what_is_no_number(isa):
    """A chunk keeps to itself what came into it."""
    x = torch.ones(5 * 64)
    x[70], x[130], x[200] = 3e38, math.nan, -math.inf
    sums = grad_square_sums([x], 64).tolist()
    assert (sums[0], sums[3], sums[4]) == (64, math.inf, 64)
    assert sums[1] == pytest.approx(torch.tensor(3e38).item() ** 2)
    assert math.isnan(sums[2])


def test_square_sums_of_nothing():
    for grads in ([], [torch.empty(0)], [torch.empty(0, 3).half(), torch.empty(2, 0)]):
        for found in (grad_square_sums(grads), grad_square_sums_ref(grads)):
            assert (found.shape, found.dtype) == ((0,), torch.float64)
    assert grad_square_sums([torch.empty(0), torch.ones(4)]).tolist() == [4]
    assert grad_square_sums([torch.empty(5, 7, device="meta")], 8).shape == (5,)


def test_square_sums_opcheck_and_compiled():
    grads = make()
    torch.library.opcheck(torch.ops.cgpt_ext.grad_square_sums.default, (grads, 64))
    compiled = torch.compile(grad_square_sums, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(grads, 64), grad_square_sums(grads, 64))
    with dispatch.use(grad_norm="reference"):
        assert torch.equal(grad_square_sums([x.double() for x in grads]), grad_square_sums_ref(grads))


@pytest.mark.parametrize(
    ("grads", "chunk", "error", "message"),
    [
        ([torch.ones(2).int()], 1024, TypeError, "grads[0] must be float32 or bfloat16 or float16, got int32"),
        ([torch.ones(2), None], 1024, TypeError, "grads[1] must be a torch.Tensor, got NoneType"),
        (torch.ones(2), 1024, TypeError, "grads must be a list of tensors, got Tensor"),
        ([torch.ones(2)], 0, ValueError, "chunk must be from 1 to 1073741824, got 0"),
        ([], (1 << 30) + 1, ValueError, "chunk must be from 1 to 1073741824, got 1073741825"),
        ([torch.ones(2)], 32.0, TypeError, "chunk must be an int, got float"),
        ([torch.ones(2)], True, TypeError, "chunk must be an int, got bool"),
    ],
)
def test_bad_input_of_square_sums(grads, chunk, error, message):
    with pytest.raises(error) as caught:
        grad_square_sums(grads, chunk)
    assert str(caught.value) == f"grad_square_sums: {message}"


def test_the_border_of_square_sums_counts_for_itself():
    x = torch.ones(100)
    for sums, chunk, error, message in (
        (torch.zeros(3, dtype=torch.float64), 32, ValueError, r"sums must be \(4,\), got \(3,\)"),
        (torch.zeros(4), 32, TypeError, "sums must be float64, got float32"),
        (torch.zeros(100, dtype=torch.float64), 0, ValueError, "chunk must be from 1 to 1073741824, got 0"),
    ):
        with pytest.raises(error, match=f"^grad_square_sums: {message}$"):
            _native.grad_square_sums([x], sums, chunk)


def with_grads(grads):
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    return [*params, torch.nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize("max_norm", [1.0, 1e9])
@pytest.mark.parametrize("norm_type", [2.0, 1, math.inf])
def test_clip_is_torchs(max_norm, norm_type):
    grads = make()
    ours, theirs = with_grads(grads), with_grads(grads)
    got = clip_grad_norm_(ours, max_norm, norm_type)
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=0)


def test_clip_of_one_tensor_of_a_generator_and_of_nothing():
    single = with_grads([torch.full((4,), 2.0)])[0]
    assert clip_grad_norm_(single, 1.0).item() == 4.0
    torch.testing.assert_close(single.grad, torch.full((4,), 0.5), rtol=1e-6, atol=0)
    assert clip_grad_norm_((p for p in with_grads([torch.ones(4)])), 1.0).item() == 2.0
    assert clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0).item() == 0.0


def test_clip_of_non_finite_gradients():
    params = with_grads([torch.tensor([1.0, math.nan])])
    with pytest.raises(RuntimeError, match=r"The total norm of order 2\.0 for gradients .* is non-finite"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert params[0].grad[0].item() == 1.0
    assert clip_grad_norm_(params, 1.0).isnan()
    assert params[0].grad.isnan().all()
