import math

import pytest
import torch

from cgpt_ext import dispatch, grad_norm, grad_norm_ref
from cgpt_ext.nn import clip_grad_norm_
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
