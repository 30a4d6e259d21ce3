"""Drop-in modules: torch's own constructors and state_dicts, this package's kernels inside."""

import torch
from torch import Tensor

from cgpt_ext.ops.layer_norm import layer_norm


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
