"""The transformer's two-layer perceptron with GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415) or SwiGLU (Shazeer 2020,
arXiv 2002.05202).

    z = x w1^T + b1,  act = gelu(z)                 "gelu", "gelu_tanh"
    z = [g, u],       act = silu(g) u               "swiglu": w1's first half of rows gives g, the second u
    y = act w2^T + b2

    dact = dout w2,  dz = dact * act'(z)
    dx = dz w1,  dw1 = dz^T x,  db1 = sum of dz,  dw2 = dout^T act,  db2 = sum of dout

z is saved; act is recomputed in the backward pass, along with dz and db1. Each weight's
gradient has that weight's strides, so a transposed view of a (in, out) parameter gets its gradient without a copy.

On a CPU the products are linear's, with z, act and their backward while a tile is in cache; SwiGLU, whose tiles hold no
gate and its up projection at once, has a pass between two products. On a GPU the product with z and act behind it, and
its backward, come from one of: `native` (our GEMM with both in its epilogue; bf16, fp16),
`cublas` (torch's products, native kernels between), `cublaslt` (its own epilogues) and `triton`.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import TABLE, implementation, reference_chosen
from cgpt_ext.ops._torch import autocast, check_tensors, on_gpu, register, require_tensors
from cgpt_ext.ops.linear import FEW_ROWS, bias_grad, empty_like, lines, partials, product, rows_of, weight_grad

ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu"
) -> Tensor:
    """Linear, GELU or SwiGLU, Linear.

    Args:
        x: (..., D) in fp32, bf16 or fp16.
        w1: (F, D) in x's dtype, of any strides: `w.t()` of an (D, F) parameter is as good. For "swiglu" (2 F, D), the
            gate's rows first.
        b1: (F,) or (2 F,) in x's dtype, or None.
        w2: (D, F) likewise.
        b2: (D,) in x's dtype, or None.
        activation: "gelu" (by erf, exact), "gelu_tanh" (its tanh approximation) or "swiglu".

    Under torch.autocast the tensors are cast first, as torch.nn.functional.linear casts its own.

    Returns:
        y like x.

    Raises:
        ValueError: for a wrong shape, device or activation, and for what a GPU implementation chosen by name does not
            take: `native` wants D and F in multiples of 8, `cublaslt` "gelu_tanh" alone. TypeError: for a wrong dtype.
    """
    require_tensors("gelu_mlp", x=x, w1=w1, w2=w2)
    check_tensors("gelu_mlp", b1=b1, b2=b2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"gelu_mlp: activation must be {' or '.join(ACTIVATIONS)}, got {activation}")
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    if reference_chosen("gelu_mlp"):
        return gelu_mlp_ref(x, w1, b1, w2, b2, activation)
    chosen = _chosen(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2)):
        return _GeluMLP.apply(x, w1, b1, w2, b2, activation, chosen)
    return _fwd(x, w1, b1, w2, b2, activation, False, chosen)[0]


def gelu_mlp_ref(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str = "gelu"
) -> Tensor:
    """`gelu_mlp` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    linear = torch.nn.functional.linear
    z = linear(x, w1, b1)
    if activation == "swiglu":
        gate, up = z.chunk(2, -1)
        act = torch.nn.functional.silu(gate) * up
    else:
        act = torch.nn.functional.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return linear(act, w2, b2)


def _chosen(x: Tensor) -> str:
    """The implementation's name, for both passes: what they save between them is not the same for all. Empty where a
    graph is traced or the tensors are on no device; the op then looks when it runs."""
    if torch.compiler.is_compiling() or x.device.type not in TABLE["gelu_mlp"]:
        return ""
    return implementation("gelu_mlp", x.device.type)


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, activation, chosen):
        y, pre = _fwd(x, w1, b1, w2, b2, activation, True, chosen)
        ctx.activation, ctx.chosen = activation, chosen
        ctx.save_for_backward(x, w1, b1, w2, pre)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, w1, b1, w2, pre = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:5])
        grads = _bwd(dout, x, w1, b1, w2, pre, ctx.activation, mask, ctx.chosen)
        return *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None, None


def _launch_fwd(x, w1, b1, w2, b2, activation, save_pre, chosen):
    way = _way(x, activation, chosen)
    _native.gelu_mlp_check(x, w1, b1, w2, b2, activation)
    with torch.autocast(x.device.type, enabled=False):
        pre, act = way.linear_fwd(rows_of(x), w1, b1, activation, save_pre)
        y = way.product(act, w2, b2)
    return y.view(x.shape), pre if save_pre else x.new_empty(0)


def _launch_bwd(dout, x, w1, b1, w2, pre, activation, output_mask, chosen):
    way = _way(x, activation, chosen)
    _native.gelu_mlp_check(x, w1, b1, w2, None, activation)
    wants_dx, wants_dw1, wants_db1, wants_dw2, wants_db2 = output_mask
    dx = dw1 = db1 = dw2 = db2 = None
    x2 = rows_of(x)
    dout = dout.reshape(x2.shape).contiguous()
    if wants_db2:
        db2 = bias_grad(dout)
    with torch.autocast(x.device.type, enabled=False):
        if any(output_mask[:4]):
            db1 = dout.new_empty(w1.shape[0]) if wants_db1 else None
            dpre, act = way.linear_bwd(dout, w2, b1, pre, db1, activation)
        if wants_dw2:
            dw2 = weight_grad(way.product, dout, act, w2)
        if wants_dw1:
            dw1 = weight_grad(way.product, dpre, x2, w1)
        if wants_dx:
            dx = way.product(dpre, w1.t()).view(x.shape)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, dw1, db1, dw2, db2))


class _Torch:
    """torch's matrix products, native kernels between them: a GPU's."""

    @staticmethod
    def product(a, b, bias=None):
        """a (m, k) b (n, k)^T + bias"""
        return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())

    @staticmethod
    def linear_fwd(x, w1, b1, activation, save_pre):
        """(pre, act)"""
        pre = _Torch.product(x, w1, b1)
        act = _hidden(pre, activation) if save_pre or activation == "swiglu" else pre
        _native.gelu_mlp_fwd(pre, act, activation)
        return pre, act

    @staticmethod
    def linear_bwd(dout, w2, b1, pre, db1, activation):
        """(dpre, act), and db1 where it is a tensor"""
        dact = torch.mm(dout, w2)
        act, dpre = torch.empty_like(dact), torch.empty_like(pre) if activation == "swiglu" else dact
        sums = None if db1 is None else partials(pre, pre.shape[1])
        _native.gelu_mlp_bwd(pre, dact, act, dpre, db1, sums, activation)
        return dpre, act


class _Cpu(_Torch):
    """linear's products, GELU in the epilogue of those that it follows."""

    product = staticmethod(product)

    @staticmethod
    def linear_fwd(x, w1, b1, activation, save_pre):
        if activation == "swiglu" or x.shape[0] <= FEW_ROWS:
            pre = product(x, w1, b1)
            act = _hidden(pre, activation) if save_pre or activation == "swiglu" else pre
            _native.gelu_mlp_fwd(pre, act, activation)
            return pre, act
        pre = x.new_empty(x.shape[0], w1.shape[0]) if save_pre else None
        act = x.new_empty(x.shape[0], w1.shape[0])
        _native.gelu_mlp_linear_fwd(x, lines(w1), b1, pre, act, activation, "auto")
        return pre, act

    @staticmethod
    def linear_bwd(dout, w2, b1, pre, db1, activation):
        act = _hidden(pre, activation)
        if activation == "swiglu" or dout.shape[0] <= FEW_ROWS:
            dact, dpre = product(dout, w2.t()), torch.empty_like(pre)
            _native.gelu_mlp_bwd(pre, dact, act, dpre, db1, None, activation)
            return dpre, act
        dpre = torch.empty_like(pre)
        _native.gelu_mlp_linear_bwd(dout, lines(w2), pre, dpre, act, db1, None, activation, "auto")
        return dpre, act


class _Gemm:
    """csrc/cuda/gemm.cuh with everything in its epilogues."""

    @staticmethod
    def product(a, b, bias=None):
        out = a.new_empty(a.shape[0], b.shape[0])
        _native.gelu_mlp_product(lines(a), lines(b), bias, out, "auto")
        return out

    @staticmethod
    def linear_fwd(x, w1, b1, activation, save_pre):
        pre = x.new_empty(x.shape[0], w1.shape[0]) if save_pre else None
        act = x.new_empty(x.shape[0], _hidden_width(w1.shape[0], activation))
        _native.gelu_mlp_linear_fwd(x, lines(w1), b1, pre, act, activation, "auto")
        return pre, act

    @staticmethod
    def linear_bwd(dout, w2, b1, pre, db1, activation):
        dpre, act = torch.empty_like(pre), _hidden(pre, activation)
        sums = None if db1 is None else partials(pre, pre.shape[1])
        _native.gelu_mlp_linear_bwd(dout, lines(w2), pre, dpre, act, db1, sums, activation, "auto")
        return dpre, act


class _CublasLt(_Torch):
    """cuBLASLt's product and epilogue, its tanh GELU alone; torch's products for the rest."""

    @staticmethod
    def linear_fwd(x, w1, b1, activation, save_pre):
        pre = x.new_empty(x.shape[0], w1.shape[0]) if save_pre else None
        act = x.new_empty(x.shape[0], w1.shape[0])
        _native.gelu_mlp_cublaslt_fwd(x, lines(w1), b1, pre, act, _workspace(x), _cublaslt_library())
        return pre, act

    @staticmethod
    def linear_bwd(dout, w2, b1, pre, db1, activation):
        if pre.shape[0] == 0:
            return _Torch.linear_bwd(dout, w2, b1, pre, db1, activation)
        dpre, act = torch.empty_like(pre), torch.empty_like(pre)
        _native.gelu_mlp_cublaslt_bwd(dout, lines(w2), pre, dpre, db1, _workspace(pre), _cublaslt_library())
        _native.gelu_mlp_fwd(pre, act, activation)
        return dpre, act


class _Triton(_Torch):
    """Triton's product with what follows it, torch's products for the rest."""

    @staticmethod
    def linear_fwd(x, w1, b1, activation, save_pre):
        from cgpt_ext.triton.gelu_mlp import gelu_mlp_linear_fwd_triton

        pre = x.new_empty(x.shape[0], w1.shape[0]) if save_pre else None
        act = x.new_empty(x.shape[0], _hidden_width(w1.shape[0], activation))
        gelu_mlp_linear_fwd_triton(x, w1, b1, activation, pre, act)
        return pre, act

    @staticmethod
    def linear_bwd(dout, w2, b1, pre, db1, activation):
        from cgpt_ext.triton.gelu_mlp import gelu_mlp_linear_bwd_triton

        dpre, act = torch.empty_like(pre), _hidden(pre, activation)
        gelu_mlp_linear_bwd_triton(dout, w2, pre, activation, dpre, act, db1)
        return dpre, act


_WAYS = {"native": _Gemm, "cublas": _Torch, "cublaslt": _CublasLt, "triton": _Triton}
_SERVES = {"cublaslt": ("gelu_tanh",)}  # the activations of those that do not serve all


def _way(x: Tensor, activation: str, chosen: str):
    """Who serves x. Raises ValueError, naming what is served, where the chosen one cannot."""
    device = x.device.type
    name = chosen or implementation("gelu_mlp", device)
    if name == "reference":  # chosen around a compiled graph, which keeps what it was compiled with
        name = TABLE["gelu_mlp"][device][0]
    if activation not in _SERVES.get(name, ACTIVATIONS):
        raise ValueError(f"gelu_mlp: activation must be {' or '.join(_SERVES[name])} for {name}, got {activation}")
    if not on_gpu(x) and name == "native":
        return _Cpu
    if not on_gpu(x) and name != "triton":
        raise ValueError(f"gelu_mlp: tensors must be on cuda for {name}, got {device}")
    return _WAYS[name]


def _hidden_width(width: int, activation: str) -> int:
    return width // 2 if activation == "swiglu" else width


def _hidden(pre: Tensor, activation: str) -> Tensor:
    """An act for pre."""
    return pre.new_empty(pre.shape[0], _hidden_width(pre.shape[1], activation))


def _workspace(x: Tensor) -> Tensor:
    """What NVIDIA advises to give cuBLASLt on Hopper; more than other devices use."""
    return x.new_empty(32 * 2**20, dtype=torch.uint8)


@cache
def _cublaslt_library() -> str:
    """The newest libcublasLt installed beside torch, for a torch that has not loaded one; "" where there is none."""
    found = Path(torch.__file__).parent.parent.glob("nvidia/*/lib/libcublasLt.so.1[123]")
    return max(map(str, found), key=lambda path: path[-2:], default="")


def _fake_fwd(x, w1, b1, w2, b2, activation, save_pre, chosen):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.numel() // x.shape[-1], w1.shape[0]) if save_pre else x.new_empty(0)


def _fake_bwd(dout, x, w1, b1, w2, pre, activation, output_mask, chosen):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grads = (dx, empty_like(w1), w1.new_empty(w1.shape[0]), empty_like(w2), w2.new_empty(w2.shape[0]))
    return tuple(grad if wanted else x.new_empty(0) for grad, wanted in zip(grads, output_mask, strict=True))


_fwd = register(
    "gelu_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save_pre,"
    " str chosen) -> (Tensor y, Tensor pre)",
    _launch_fwd,
    _fake_fwd,
)
_bwd = register(
    "gelu_mlp_bwd(Tensor dout, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor pre, str activation,"
    " bool[5] output_mask, str chosen) -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    _launch_bwd,
    _fake_bwd,
)
