"""The error bar every op is held to, values and gradients alike.

Against an fp64 reference, the largest error may be at most twice the largest error torch itself makes in the same
dtype on the same input, plus a term far below that dtype's own rounding; fp32 results must also be within 1e-5 of
the reference's scale.
"""

import torch

TINY = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 2e-5}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest absolute difference, in fp64; infinite where exactly one of the two is not finite."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"shape must be {tuple(want.shape)}, got {tuple(got.shape)}"
    if got.numel() == 0:
        return 0.0
    same = (got == want) | (got.isnan() & want.isnan())
    difference = torch.where(same, torch.zeros_like(want), (got - want).abs())
    return float(torch.nan_to_num(difference, nan=float("inf")).max())


def assert_as_good_as_torch(got, want, torch_result, what="result", dtype=None):
    """`got` in a dtype, `want` in fp64, `torch_result` what torch computes in got's dtype on the same input.

    dtype: what was rounded to on the way where that is not got's own: an fp32 loss of bf16 logits.
    """
    dtype = dtype or got.dtype
    assert got.dtype == torch_result.dtype, f"{what}: dtype must be {torch_result.dtype}, got {got.dtype}"
    scale = float(want.detach().double().abs().nan_to_num(0, 0, 0).max()) if want.numel() else 0.0
    ours, theirs = error(got, want), error(torch_result, want)
    assert ours <= 2 * theirs + TINY[dtype] * scale, (
        f"{what}: error {ours:.3e} past the bar: torch's own is {theirs:.3e}, the reference's scale {scale:.3e}"
    )
    if dtype == torch.float32:
        assert ours <= 1e-5 * scale, f"{what}: fp32 error {ours:.3e} past 1e-5 of {scale:.3e}"


def run(function, *inputs, dout=None):
    """Calls function(*inputs), and backward with `dout`; returns [outputs..., gradients of the inputs...].

    Inputs are detached copies with their strides kept; floating-point ones get gradients.
    """
    leaves = [_leaf(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = dout if isinstance(dout, (list, tuple)) else [dout]
    torch.autograd.backward(outs, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
    return outs + [x.grad for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]


def _leaf(x):
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    return copy.requires_grad_(x.is_floating_point())


def compare(op, reference, torch_op, inputs, dout, dtype=None):
    """Values and gradients of `op` against `reference` in fp64, at the bar `torch_op` sets in the inputs' dtype.

    dtype: as for `assert_as_good_as_torch`.
    """
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    wide_dout = [g.double() for g in dout] if isinstance(dout, (list, tuple)) else dout.double()
    got = run(op, *inputs, dout=dout)
    want = run(reference, *wide, dout=wide_dout)
    theirs = run(torch_op, *inputs, dout=dout)
    assert len(got) == len(want) == len(theirs)
    for i, (g, w, t) in enumerate(zip(got, want, theirs, strict=True)):
        assert_as_good_as_torch(g, w, t, what=f"output or gradient {i}", dtype=dtype)
