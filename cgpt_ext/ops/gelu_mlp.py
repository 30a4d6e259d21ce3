"""The transformer's two-layer perceptron with GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    z = x w1^T + b1,  act = gelu(z),  y = act w2^T + b2

    dact = dout w2,  dz = dact * gelu'(z)
    dx = dz w1,  dw1 = dz^T x,  db1 = sum of dz,  dw2 = dout^T act,  db2 = sum of dout

x w1^T is saved, without its bias; GELU is recomputed in the backward pass, where one native pass gives act, dz and
db1. On a CPU the matrix products are torch's (oneDNN), and what stands between them is native. Each weight's
gradient has that weight's strides, so a transposed view of a (in, out) parameter gets its gradient without a copy.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation, reference_chosen
from cgpt_ext.ops._torch import autocast, check_tensors, register, require_tensors

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # our names, torch's names


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu"
) -> Tensor:
    """Linear, GELU, Linear.

    Args:
        x: (..., D) in fp32, bf16 or fp16.
        w1: (F, D) in x's dtype, of any strides: `w.t()` of an (D, F) parameter is as good.
        b1: (F,) in x's dtype, or None.
        w2: (D, F) likewise.
        b2: (D,) in x's dtype, or None.
        activation: "gelu" (by erf, exact) or "gelu_tanh" (its tanh approximation).

    Under torch.autocast the tensors are cast first, as torch.nn.functional.linear casts its own.

    Returns:
        y like x.

    Raises:
        ValueError: for a wrong shape, device or activation. TypeError: for a wrong dtype.
    """
    require_tensors("gelu_mlp", x=x, w1=w1, w2=w2)
    check_tensors("gelu_mlp", b1=b1, b2=b2)
    check_activation(activation)
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    if reference_chosen("gelu_mlp"):
        return gelu_mlp_ref(x, w1, b1, w2, b2, activation)
    tanh = activation == "gelu_tanh"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2)):
        return _GeluMLP.apply(x, w1, b1, w2, b2, tanh)
    return _fwd(x, w1, b1, w2, b2, tanh, False)[0]


def check_activation(activation: str) -> None:
    """Raises ValueError where `activation` is not one that is served."""
    if activation not in _APPROXIMATE:
        raise ValueError(f"gelu_mlp: activation must be {' or '.join(_APPROXIMATE)}, got {activation}")


def gelu_mlp_ref(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu"
) -> Tensor:
    """`gelu_mlp` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    linear, gelu = torch.nn.functional.linear, torch.nn.functional.gelu
    return linear(gelu(linear(x, w1, b1), approximate=_APPROXIMATE[activation]), w2, b2)


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, tanh):
        y, pre = _fwd(x, w1, b1, w2, b2, tanh, True)
        ctx.tanh = tanh
        ctx.save_for_backward(x, w1, b1, w2, pre)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, w1, b1, w2, pre = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:5])
        grads = _bwd(dout, x, w1, b1, w2, pre, ctx.tanh, mask)
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None


def _transposed(w: Tensor) -> bool:
    return not w.is_contiguous() and w.t().is_contiguous()


def _weight_grad(dout: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dout^T x, (out, in), in the memory layout of w."""
    return torch.mm(x.t(), dout).t() if _transposed(w) else torch.mm(dout.t(), x)


def _launch_fwd(x, w1, b1, w2, b2, tanh, save_pre):
    _native.gelu_mlp_check(x, w1, b1, w2, b2)
    implementation("gelu_mlp", x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        pre = torch.mm(x.reshape(-1, x.shape[-1]), w1.t())
        act = torch.empty_like(pre) if save_pre else pre
        _native.gelu_mlp_fwd(pre, b1, act, tanh)
        y = torch.mm(act, w2.t()) if b2 is None else torch.addmm(b2, act, w2.t())
    return y.view(x.shape), pre if save_pre else x.new_empty(0)


def _launch_bwd(dout, x, w1, b1, w2, pre, tanh, output_mask):
    _native.gelu_mlp_check(x, w1, b1, w2, None)
    wants_dx, wants_dw1, wants_db1, wants_dw2, wants_db2 = output_mask
    dx = dw1 = db1 = dw2 = db2 = None
    x2 = x.reshape(-1, x.shape[-1])
    dout = dout.reshape(x2.shape).contiguous()
    if wants_db2:
        db2 = dout.new_empty(dout.shape[-1])
        _native.gelu_mlp_bias_grad(dout, db2)
    with torch.autocast(x.device.type, enabled=False):
        if any(output_mask[:4]):
            dact = torch.mm(dout, w2)
            act = torch.empty_like(dact)
            db1 = dact.new_empty(dact.shape[-1]) if wants_db1 else None
            _native.gelu_mlp_bwd(pre, b1, dact, act, dact, db1, tanh)
        if wants_dw2:
            dw2 = _weight_grad(dout, act, w2)
        if wants_dw1:
            dw1 = _weight_grad(dact, x2, w1)
        if wants_dx:
            dx = torch.mm(dact, w1).view(x.shape)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, dw1, db1, dw2, db2))


def _fake_fwd(x, w1, b1, w2, b2, tanh, save_pre):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.numel() // x.shape[-1], w1.shape[0]) if save_pre else x.new_empty(0)


def _fake_bwd(dout, x, w1, b1, w2, pre, tanh, output_mask):
    def like(w):
        return w.new_empty(w.shape[1], w.shape[0]).t() if _transposed(w) else w.new_empty(w.shape)

    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grads = (dx, like(w1), w1.new_empty(w1.shape[0]), like(w2), w2.new_empty(w2.shape[0]))
    return tuple(grad if wanted else x.new_empty(0) for grad, wanted in zip(grads, output_mask, strict=True))


_fwd = register(
    "gelu_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool tanh, bool save_pre)"
    " -> (Tensor y, Tensor pre)",
    _launch_fwd,
    _fake_fwd,
)
_bwd = register(
    "gelu_mlp_bwd(Tensor dout, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor pre, bool tanh,"
    " bool[5] output_mask) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    _launch_bwd,
    _fake_bwd,
)
