"""Drop-in modules: torch's own constructors and state_dicts, this package's kernels inside."""

import torch
from torch import Tensor

from cgpt_ext.ops.attention import attention_qkv
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
