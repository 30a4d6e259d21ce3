"""A projection, y = scale (x W^T + b), and the matrix product behind it that gelu_mlp and cross_entropy share.

    dx = scale dout W,  dW = scale dout^T x,  db = scale sum of dout

On a CPU the product is native (csrc/cpu/matmul.h): pairs of bf16 where the instruction set multiplies those, fp32
elsewhere, sums in fp32, and scale and bias while a tile is in cache. A weight's gradient has that weight's strides, so
a transposed view of an (in, out) parameter gets its gradient without a copy. A product of few rows, as where text is
generated, reads each weight once and waits for memory: torch's serves as well, and does not pack first. On a GPU all
of it is torch's.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import reference_chosen
from cgpt_ext.ops._torch import autocast, check_tensors, on_gpu, register, require_tensors

FEW_ROWS = 16  # up to so many torch's product is level or ahead (Zen 4, bf16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`torch.nn.functional.linear`, times `scale`.

    Args:
        x: (..., in) in fp32, bf16 or fp16.
        weight: (out, in) in x's dtype, of any strides: `w.t()` of an (in, out) parameter is as good.
        bias: (out,) in x's dtype, or None.
        scale: of the product and the bias.

    Under torch.autocast the tensors are cast first, as torch.nn.functional.linear casts its own.

    Returns:
        (..., out) in x's dtype.

    Raises:
        ValueError: for a wrong shape or device. TypeError: for a wrong dtype.
    """
    require_tensors("linear", x=x, weight=weight)
    check_tensors("linear", bias=bias)
    if on_gpu(x):
        return _on_gpu(x, weight, bias, scale)
    x, weight, bias = autocast(x, weight, bias)
    if reference_chosen("linear"):
        return linear_ref(x, weight, bias, scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias, float(scale))
    return _fwd(x, weight, bias, float(scale))


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`linear` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    return scale * torch.nn.functional.linear(x, weight, bias)


def _on_gpu(x, weight, bias, scale):
    if scale == 1 or bias is None:
        y = torch.nn.functional.linear(x, weight, bias)
        return y if scale == 1 else y * scale
    y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t(), beta=scale, alpha=scale)
    return y.view(*x.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale (a b^T + bias), contiguous, on a CPU;  a (m, k) and b (n, k) of any strides, bias (n,)."""
    if a.shape[0] > FEW_ROWS:
        out = a.new_empty(a.shape[0], b.shape[0])
        _native.linear(lines(a), lines(b), bias, scale, None, out)
        return out
    if bias is not None:
        return torch.addmm(bias, a, b.t(), beta=scale, alpha=scale)
    return torch.mm(a, b.t()) if scale == 1 else torch.mm(a, b.t()).mul_(scale)


def weight_grad(product, dout: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dout^T x, (out, in), in the memory layout of weight; by `product` of two matrices."""
    return product(x.t(), dout.t()).t() if transposed(weight) else product(dout.t(), x.t())


def transposed(weight: Tensor) -> bool:
    """Whether weight (out, in) is a view of a contiguous (in, out)."""
    return not weight.is_contiguous() and weight.t().is_contiguous()


def empty_like(weight: Tensor) -> Tensor:
    """What `weight_grad` returns, for a fake."""
    return (
        weight.new_empty(weight.shape[1], weight.shape[0]).t() if transposed(weight) else weight.new_empty(weight.shape)
    )


def lines(x: Tensor) -> Tensor:
    """x itself where its rows or its columns are contiguous, a copy where neither are: torch's products do the same."""
    rows, cols = x.stride()
    return x if (cols == 1 and rows >= x.shape[1]) or (rows == 1 and cols >= x.shape[0]) else x.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """x (..., D) as (rows, D) with contiguous rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return _fwd(x, weight, bias, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        mask = list(ctx.needs_input_grad[:3])
        grads = _bwd(dout, *ctx.saved_tensors, ctx.scale, mask)
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None


def _launch_fwd(x, weight, bias, scale):
    _native.linear_check(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return product(rows_of(x), weight, bias, scale).view(*x.shape[:-1], weight.shape[0])


def _launch_bwd(dout, x, weight, scale, output_mask):
    _native.linear_check(x, weight, None)
    wants_dx, wants_dweight, wants_dbias = output_mask
    dx = dweight = dbias = None
    rows = rows_of(x)
    dout = dout.reshape(rows.shape[0], weight.shape[0]).contiguous()

    def scaled(a, b):
        return product(a, b, None, scale)

    with torch.autocast(x.device.type, enabled=False):
        if wants_dbias:
            dbias = bias_grad(dout)
            dbias = dbias if scale == 1 else dbias.mul_(scale)
        if wants_dweight:
            dweight = weight_grad(scaled, dout, rows, weight)
        if wants_dx:
            dx = scaled(dout, weight.t()).view(x.shape)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, dweight, dbias))


def bias_grad(dout: Tensor) -> Tensor:
    """The sum over rows of dout (rows, n), contiguous: (n,), summed in fp32."""
    out = dout.new_empty(dout.shape[1])
    _native.gelu_mlp_bias_grad(dout, out, partials(dout, dout.shape[1]))
    return out


def partials(x: Tensor, columns: int) -> Tensor | None:
    """Room for the sums over every 32 rows of x (csrc/gelu_mlp.h's kPartialRows), where they are taken in two steps."""
    rows = (x.shape[0] + 31) // 32
    return x.new_empty(rows, columns, dtype=torch.float32) if on_gpu(x) else None


def _fake_fwd(x, weight, bias, scale):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_bwd(dout, x, weight, scale, output_mask):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grads = (dx, empty_like(weight), weight.new_empty(weight.shape[0]))
    return tuple(grad if wanted else x.new_empty(0) for grad, wanted in zip(grads, output_mask, strict=True))


_fwd = register("linear_fwd(Tensor x, Tensor weight, Tensor? bias, float scale) -> Tensor", _launch_fwd, _fake_fwd)
_bwd = register(
    "linear_bwd(Tensor dout, Tensor x, Tensor weight, float scale, bool[3] output_mask)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _launch_bwd,
    _fake_bwd,
)
