"""Drop-in modules: torch's own constructors and state_dicts, this package's kernels inside."""

from collections.abc import Iterable

import torch
from torch import Tensor

from cgpt_ext.ops.attention import attention_qkv
from cgpt_ext.ops.cross_entropy import cross_entropy
from cgpt_ext.ops.embedding import embedding
from cgpt_ext.ops.gelu_mlp import gelu_mlp
from cgpt_ext.ops.grad_norm import grad_norm
from cgpt_ext.ops.layer_norm import layer_norm
from cgpt_ext.ops.linear import linear


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding` whose gradient is summed in fp32, in token order, without atomics.

    Raises ValueError where max_norm, scale_grad_by_freq or sparse is asked for.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            value = getattr(self, option)
            if value:
                raise ValueError(f"Embedding: {option} must be left at its default, got {value}")

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.dtype == torch.int32:
            input = input.long()
        return embedding(input, self.weight, padding_idx=self.padding_idx)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` whose products on a CPU are this package's; on a GPU they are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class GeluMLP(torch.nn.Module):
    """Linear, GELU, Linear: (..., d_model) -> (..., d_ff) -> (..., d_model).

    `c_fc` and `c_proj` are plain torch.nn.Linear, under nanoGPT's names, so state_dicts interchange. Under
    torch.autocast inputs and weights are cast as torch.nn.Linear would cast them.

    Raises ValueError where activation is neither "gelu" nor "gelu_tanh".
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "gelu", bias: bool = True, device=None, dtype=None):
        super().__init__()
        if activation not in ("gelu", "gelu_tanh"):
            raise ValueError(f"GeluMLP: activation must be gelu or gelu_tanh, got {activation}")
        self.activation = activation
        self.c_fc = torch.nn.Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self.c_proj = torch.nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, self.activation)


class SwiGLU(torch.nn.Module):
    """(silu(x Wg + bg) * (x Wu + bu)) Wd + bd: (..., d_model) -> 2 x (..., d_ff) -> (..., d_model).

    `c_fc` is one torch.nn.Linear for both projections, the gate's d_ff rows first; `c_proj` is the one down. Under
    torch.autocast inputs and weights are cast as torch.nn.Linear would cast them.
    """

    def __init__(self, d_model: int, d_ff: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.c_fc = torch.nn.Linear(d_model, 2 * d_ff, bias=bias, device=device, dtype=dtype)
        self.c_proj = torch.nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, "swiglu")


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, with an optional residual add in front.

    `forward(x)` returns y; `forward(x, residual)` returns (y, x + residual).

    Raises ValueError where normalized_shape has several dimensions or there is no affine weight.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if len(self.normalized_shape) != 1 or self.weight is None:
            raise ValueError(
                "LayerNorm: normalized_shape must be one dimension with elementwise_affine, "
                f"got {tuple(self.normalized_shape)} with elementwise_affine={self.elementwise_affine}"
            )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return layer_norm(x, self.weight, self.bias, self.eps, residual)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` with the L2 norm summed in double by `grad_norm`.

    Other norms, gradients on several devices and gradients in other dtypes are torch's own work.

    Returns:
        The norm before clipping, 0-d on the gradients' device.

    Raises:
        RuntimeError: with `error_if_nonfinite`, where the norm is NaN or infinite; no gradient is touched then.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    ours = (
        float(norm_type) == 2.0
        and all(type(g) is Tensor and g.dtype in (torch.float32, torch.bfloat16, torch.float16) for g in grads)
        and len({g.device for g in grads}) == 1
    )
    if not ours:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = grad_norm(grads)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it cannot be"
            " clipped. To disable this error and scale the gradients by the non-finite norm anyway, set"
            " `error_if_nonfinite=False`"
        )
    # On a CPU the coefficient can be read without waiting for it: where it is 1, the gradients stay as they are.
    if norm.device.type != "cpu" or not float(max_norm) / (norm + 1e-6) >= 1.0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


class CausalSelfAttention(torch.nn.Module):
    """GPT-2's self-attention: project to q, k, v, attend to the past, project back.

    Parameters are nanoGPT's: `c_attn`, a `Linear` (d_model, 3 * d_model), and `c_proj` (d_model, d_model).
    `forward(x)` takes and returns (B, T, d_model). Under `torch.autocast` attention runs in the dtype that the
    projection gives.

    Raises ValueError where n_head does not divide d_model into heads of a multiple of 8 up to 256.
    """

    def __init__(self, d_model: int, n_head: int, bias: bool = True, device=None, dtype=None):
        super().__init__()
        if n_head < 1 or d_model % n_head or d_model // n_head % 8 or not 8 <= d_model // n_head <= 256:
            raise ValueError(
                f"CausalSelfAttention: d_model / n_head must be a multiple of 8 from 8 to 256, got {d_model} / {n_head}"
            )
        self.n_head = n_head
        self.c_attn = Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.c_proj = Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attention_qkv(self.c_attn(x), self.n_head, causal=True))

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}"


class LinearCrossEntropyLoss(torch.nn.Module):
    """The output layer and its loss in one: `forward(weight, x, target)`, the order Liger-Kernel's users know.

    weight (V, D) is the head's or, tied, the token embedding's; x (..., D); target (...) int64. `vocab_size`: how many
    rows of a padded weight are real. Under torch.autocast x and weight are cast as torch.nn.Linear's; the loss is fp32.

    Raises ValueError where reduction is not "mean", "sum" or "none"; else what `cgpt_ext.cross_entropy` raises.
    """

    def __init__(self, ignore_index=-100, reduction="mean", z_loss=0.0, vocab_size=None):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"LinearCrossEntropyLoss: reduction must be mean, sum or none, got {reduction}")
        self.ignore_index, self.reduction, self.z_loss, self.vocab_size = ignore_index, reduction, z_loss, vocab_size

    def forward(self, weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(x, weight, target, self.ignore_index, self.z_loss, self.reduction, self.vocab_size)

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction}, z_loss={self.z_loss}, "
            f"vocab_size={self.vocab_size}"
        )
