"""LayerNorm over the last dimension with an optional residual add in front (Ba et al. 2016, arXiv 1607.06450).

    h = x + residual
    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

Statistics and sums are fp32 whatever is read. Saved for the backward pass: h, and mean and rstd, one fp32 a row.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation, reference_chosen
from cgpt_ext.ops._torch import check_tensors, register, require_tensors


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalises `x`, or `x + residual`, over its last dimension.

    Args:
        x: (..., D) in fp32, bf16 or fp16.
        weight: (D,) in x's dtype or fp32.
        bias: (D,) in weight's dtype, or None.
        eps: added to the variance.
        residual: like x; the sum, rounded to x's dtype, is what gets normalised.

    Returns:
        y like x; with `residual`, (y, x + residual).

    Raises:
        ValueError: for a wrong shape or device. TypeError: for a wrong dtype.
    """
    require_tensors("layer_norm", x=x, weight=weight)
    check_tensors("layer_norm", bias=bias, residual=residual)
    if reference_chosen("layer_norm"):
        return layer_norm_ref(x, weight, bias, eps, residual)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        y, h = _LayerNorm.apply(x, weight, bias, residual, eps)
    else:
        y, h, _, _ = _fwd(x, weight, bias, residual, eps, False)
    return y if residual is None else (y, h)


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    h = x if residual is None else x + residual
    centred = h - h.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    if bias is not None:
        y = y + bias
    return y if residual is None else (y, h)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps):
        y, h, mean, rstd = _fwd(x, weight, bias, residual, eps, True)
        ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
        ctx.save_for_backward(h if ctx.has_residual else x, weight, mean, rstd)
        if not ctx.has_residual:
            ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dh):
        h, weight, mean, rstd = ctx.saved_tensors
        if not ctx.has_residual:  # torch.compile hands over the empty h's gradient where eager has None
            dh = None
        if dout is None:  # only the sum was used further on
            return dh, None, None, dh, None
        dx, dweight, dbias = _bwd(dout, dh, h, weight, mean, rstd, ctx.has_bias)
        return dx, dweight, dbias if ctx.has_bias else None, dx if ctx.has_residual else None, None


def _launch_fwd(x, weight, bias, residual, eps, save_statistics):
    run = _native.layer_norm_fwd
    if implementation("layer_norm", x.device.type) == "triton":
        from cgpt_ext.triton.layer_norm import layer_norm_fwd_triton as run
    x = x.contiguous()
    y = torch.empty_like(x)
    if residual is None:
        h = x.new_empty(0)
        stored_h = None
    else:
        residual = residual.contiguous()
        h = stored_h = torch.empty_like(x)
    if not save_statistics:
        run(x, residual, weight, bias, eps, y, stored_h, None, None)
        return y, h, x.new_empty(0), x.new_empty(0)
    rows = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    run(x, residual, weight, bias, eps, y, stored_h, mean, rstd)
    return y, h, mean, rstd


def _launch_bwd(dout, dh, h, weight, mean, rstd, has_bias):
    chosen = implementation("layer_norm", h.device.type)
    h = h.contiguous()
    dx = torch.empty_like(h)
    dweight = torch.empty_like(weight)
    dbias = torch.empty_like(weight) if has_bias else weight.new_empty(0)
    dh = None if dh is None else dh.contiguous()
    arguments = (dout.contiguous(), dh, h, weight, mean, rstd, dx, dweight, dbias if has_bias else None)
    if chosen == "triton":
        from cgpt_ext.triton.layer_norm import layer_norm_bwd_triton

        layer_norm_bwd_triton(*arguments)
        return dx, dweight, dbias
    partials = _native.layer_norm_workspace(h)
    workspace = h.new_empty(partials, 2, h.shape[-1], dtype=torch.float32) if partials else None
    _native.layer_norm_bwd(*arguments, workspace)
    return dx, dweight, dbias


def _fake_fwd(x, weight, bias, residual, eps, save_statistics):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if residual is None else torch.empty_like(y)
    if not save_statistics:
        return y, h, x.new_empty(0), x.new_empty(0)
    rows = x.numel() // x.shape[-1]
    return y, h, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _fake_bwd(dout, dh, h, weight, mean, rstd, has_bias):
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), torch.empty_like(weight) if has_bias else weight.new_empty(0)


_fwd = register(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, bool save_statistics)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    _launch_fwd,
    _fake_fwd,
)
_bwd = register(
    "layer_norm_bwd(Tensor dout, Tensor? dh, Tensor h, Tensor weight, Tensor mean, Tensor rstd, bool has_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _launch_bwd,
    _fake_bwd,
)
