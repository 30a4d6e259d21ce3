"""The global L2 norm of a list of gradients: sqrt of the sum of all squares (Pascanu et al. 2013, arXiv 1211.5063).

Squares and sums are in double, in an order that the list alone decides: the bits depend neither on the thread count
nor on the instruction set nor on the device, and nothing that the inputs can hold overflows on the way.

`grad_square_sums` gives the sums of squares that such a norm is made of, a chunk of elements at a time: whoever holds a
piece of a tensor, cut at a multiple of the chunk, has its share of the whole tensor's sums to the bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation
from cgpt_ext.ops._torch import register

LONGEST_CHUNK = 1 << 30
_RUNNING = 32  # sums a chunk


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all elements of all `grads`.

    Args:
        grads: any shapes and strides, fp32, bf16 or fp16 (mixed too), on one device. An empty list has norm 0.

    Returns:
        A 0-d fp32 tensor on their device; NaN and infinity come out where they went in.

    Raises:
        ValueError: where devices differ. TypeError: for another dtype or something that is no tensor.
    """
    grads = _listed("grad_norm", grads)
    if not grads:
        return torch.zeros(())
    return _norm(grads)


def grad_square_sums(grads: Sequence[Tensor], chunk: int = 1024) -> Tensor:
    """The sums of squares of every `chunk` consecutive elements of each of `grads`, tensor after tensor.

    Every tensor begins a chunk of its own, and its last chunk may be shorter. Squares are exact, and a sum's order is
    that of the chunk's elements alone (csrc/grad_norm.h states it).

    Args:
        grads: any shapes and strides, fp32, bf16 or fp16 (mixed too), on one device; their elements count as they lie
            in memory. An empty tensor has no chunk, an empty list none at all.
        chunk: elements, from 1 to 2^30.

    Returns:
        (chunks,) fp64 on their device; NaN and infinity come out where they went in.

    Raises:
        ValueError: where devices differ, or for another chunk. TypeError: for another dtype or something that is no
        tensor.
    """
    grads = _listed("grad_square_sums", grads)
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(f"grad_square_sums: chunk must be an int, got {type(chunk).__name__}")
    if not 1 <= chunk <= LONGEST_CHUNK:
        raise ValueError(f"grad_square_sums: chunk must be from 1 to {LONGEST_CHUNK}, got {chunk}")
    if not grads:
        return torch.zeros(0, dtype=torch.float64)
    return _square_sums(grads, chunk)


def grad_norm_ref(grads: Sequence[Tensor]) -> Tensor:
    """`grad_norm` in plain torch, on any device, in double."""
    if not grads:
        return torch.zeros(())
    return torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().float()


def grad_square_sums_ref(grads: Sequence[Tensor], chunk: int = 1024) -> Tensor:
    """`grad_square_sums` in plain torch, on any device, to the bit: zeros fill the last chunk of a tensor."""
    sums = [_one_tensors_sums(grad.detach(), chunk) for grad in grads if grad.numel()]
    return torch.cat(sums) if sums else torch.zeros(0, dtype=torch.float64, device=grads[0].device if grads else None)


def _one_tensors_sums(grad, chunk):
    squares = _in_memory_order(grad).reshape(-1).double().square()
    chunk = min(chunk, len(squares))
    rows = torch.nn.functional.pad(squares, (0, -len(squares) % chunk)).view(-1, chunk)
    rows = torch.nn.functional.pad(rows, (0, -chunk % _RUNNING))
    sums = torch.zeros(len(rows), _RUNNING, dtype=torch.float64, device=grad.device)
    for part in rows.split(_RUNNING, dim=1):
        sums = sums + part
    while sums.shape[1] > 1:
        low, high = sums.chunk(2, dim=1)
        sums = low + high
    return sums[:, 0]


def _launch(grads):
    if implementation("grad_norm", grads[0].device.type) == "reference":
        return grad_norm_ref(grads)
    grads = [_in_memory_order(grad.detach()) for grad in grads]
    norm = torch.empty((), device=grads[0].device)
    workspace = torch.empty(_native.grad_norm_workspace(grads), dtype=torch.float64, device=norm.device)
    _native.grad_norm(grads, norm, workspace)
    return norm


def _launch_square_sums(grads, chunk):
    if implementation("grad_norm", grads[0].device.type) == "reference":  # one kernel, without the norm at its end
        return grad_square_sums_ref(grads, chunk)
    sums = _empty_sums(grads, chunk)
    _native.grad_square_sums([_in_memory_order(grad.detach()) for grad in grads], sums, chunk)
    return sums


def _empty_sums(grads, chunk):
    return grads[0].new_empty(sum((grad.numel() + chunk - 1) // chunk for grad in grads), dtype=torch.float64)


def _listed(op, grads):
    """`grads` as a list of tensors. Raises TypeError naming the first that is none."""
    if isinstance(grads, Tensor) or not isinstance(grads, Sequence):
        raise TypeError(f"{op}: grads must be a list of tensors, got {type(grads).__name__}")
    for i, grad in enumerate(grads):
        if not isinstance(grad, Tensor):
            raise TypeError(f"{op}: grads[{i}] must be a torch.Tensor, got {type(grad).__name__}")
    return list(grads)


def _in_memory_order(grad):
    """A dense transposed gradient as the contiguous tensor it is a view of: no copy. A sum does not ask for order."""
    if grad.is_contiguous():
        return grad
    return grad.permute(sorted(range(grad.dim()), key=grad.stride, reverse=True)).contiguous()


_norm = register(
    "grad_norm(Tensor[] grads) -> Tensor", _launch, lambda grads: grads[0].new_empty((), dtype=torch.float32)
)
_square_sums = register("grad_square_sums(Tensor[] grads, int chunk) -> Tensor", _launch_square_sums, _empty_sums)
