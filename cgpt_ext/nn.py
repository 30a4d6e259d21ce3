"""Drop-in modules: torch's own constructors and state_dicts, this package's kernels inside."""

import torch
from torch import Tensor

from cgpt_ext.ops.attention import attention_qkv
from cgpt_ext.ops.cross_entropy import cross_entropy
from cgpt_ext.ops.embedding import embedding
from cgpt_ext.ops.gelu_mlp import check_activation, gelu_mlp
from cgpt_ext.ops.layer_norm import layer_norm


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


class GeluMLP(torch.nn.Module):
    """Linear, GELU, Linear: (..., d_model) -> (..., d_ff) -> (..., d_model).

    `c_fc` and `c_proj` are plain torch.nn.Linear, under nanoGPT's names, so state_dicts interchange. Under
    torch.autocast inputs and weights are cast as torch.nn.Linear would cast them.

    Raises ValueError where activation is neither "gelu" nor "gelu_tanh".
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "gelu", bias: bool = True, device=None, dtype=None):
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.c_fc = torch.nn.Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self.c_proj = torch.nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, self.activation)


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


class CausalSelfAttention(torch.nn.Module):
    """GPT-2's self-attention: project to q, k, v, attend to the past, project back.

    Parameters are nanoGPT's: `c_attn`, a `torch.nn.Linear` (d_model, 3 * d_model), and `c_proj` (d_model, d_model).
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
        self.c_attn = torch.nn.Linear(d_model, 3 * d_model, bias=bias, device=device, dtype=dtype)
        self.c_proj = torch.nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)

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
