"""Drop-in modules: torch's own constructors and state_dicts, this package's kernels inside."""

import torch
from torch import Tensor

from cgpt_ext.ops.cross_entropy import cross_entropy
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
