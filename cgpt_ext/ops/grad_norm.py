"""The global L2 norm of a list of gradients: sqrt of the sum of all squares (Pascanu et al. 2013, arXiv 1211.5063).

Squares and sums are in double, in an order that the list alone decides: the bits depend neither on the thread count
nor on the instruction set nor on the device, and nothing that the inputs can hold overflows on the way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation
from cgpt_ext.ops._torch import register


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all elements of all `grads`.

    Args:
        grads: any shapes and strides, fp32, bf16 or fp16 (mixed too), on one device. An empty list has norm 0.

    Returns:
        A 0-d fp32 tensor on their device; NaN and infinity come out where they went in.

    Raises:
        ValueError: where devices differ. TypeError: for another dtype or something that is no tensor.
    """
    if isinstance(grads, Tensor) or not isinstance(grads, Sequence):
        raise TypeError(f"grad_norm: grads must be a list of tensors, got {type(grads).__name__}")
    for i, grad in enumerate(grads):
        if not isinstance(grad, Tensor):
            raise TypeError(f"grad_norm: grads[{i}] must be a torch.Tensor, got {type(grad).__name__}")
    grads = list(grads)
    if not grads:
        return torch.zeros(())
    return _norm(grads)


def grad_norm_ref(grads: Sequence[Tensor]) -> Tensor:
    """`grad_norm` in plain torch, on any device, in double."""
    if not grads:
        return torch.zeros(())
    return torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().float()


def _launch(grads):
    if implementation("grad_norm", grads[0].device.type) == "reference":
        return grad_norm_ref(grads)
    norm = torch.empty((), device=grads[0].device)
    grads = [_in_memory_order(grad.detach()) for grad in grads]
    chunks = _native.grad_norm_workspace(grads)
    workspace = torch.empty(chunks, dtype=torch.float64, device=norm.device) if chunks else None
    _native.grad_norm(grads, norm, workspace)
    return norm


def _in_memory_order(grad):
    """A dense transposed gradient as the contiguous tensor it is a view of: no copy. A sum does not ask for order."""
    if grad.is_contiguous():
        return grad
    return grad.permute(sorted(range(grad.dim()), key=grad.stride, reverse=True)).contiguous()


_norm = register(
    "grad_norm(Tensor[] grads) -> Tensor", _launch, lambda grads: grads[0].new_empty((), dtype=torch.float32)
)
