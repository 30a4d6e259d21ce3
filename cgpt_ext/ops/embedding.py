"""Token embedding with learned positions in the same pass (Vaswani et al. 2017, arXiv 1706.03762, section 3.4).

    out[b, t] = wte[ids[b, t]] + wpe[t]

    dwte[v] = sum of dout over the tokens whose id is v,  dwpe[t] = sum of dout over the batch

Sums are fp32, in token order, each row written once: the same bits on every run and for every thread count.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation, reference_chosen
from cgpt_ext.ops._torch import check_tensors, register, require_tensors


def embedding(ids: Tensor, wte: Tensor, wpe: Tensor | None = None, padding_idx: int | None = None) -> Tensor:
    """Looks rows of `wte` up by id, and adds row t of `wpe` at position t.

    Args:
        ids: int64 in [0, V), (B, T), or of any shape without wpe. A GPU's ids are not read back: one out of range
            gives a row of NaN, and no gradient, instead of raising.
        wte: (V, D) in fp32, bf16 or fp16, rows contiguous.
        wpe: (T_max, D) in wte's dtype with T_max >= T, rows contiguous, or None.
        padding_idx: the id whose row gets no gradient, in [-V, V), or None.

    Returns:
        (B, T, D), or ids' shape with D appended, contiguous, in wte's dtype.

    Raises:
        ValueError: for a wrong shape, stride or device, an id out of range or more positions than wpe has rows.
        TypeError: for a wrong dtype.
    """
    require_tensors("embedding", ids=ids, wte=wte)
    check_tensors("embedding", wpe=wpe)
    padding_idx = _row_of(padding_idx, wte)
    if reference_chosen("embedding"):
        return embedding_ref(ids, wte, wpe, padding_idx if padding_idx >= 0 else None)
    if torch.is_grad_enabled() and (wte.requires_grad or (wpe is not None and wpe.requires_grad)):
        return _Embedding.apply(ids, wte, wpe, padding_idx)
    return _fwd(ids, wte, wpe)


def embedding_ref(ids: Tensor, wte: Tensor, wpe: Tensor | None = None, padding_idx: int | None = None) -> Tensor:
    """`embedding` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    out = wte[ids]
    if padding_idx is not None:
        out = torch.where((ids == padding_idx % wte.shape[0]).unsqueeze(-1), out.detach(), out)
    return out if wpe is None else out + wpe[: ids.shape[-1]]


def _row_of(padding_idx: int | None, wte: Tensor) -> int:
    """The row that padding_idx names, -1 for none."""
    if padding_idx is None or wte.dim() == 0:  # a wte without rows is the border's to refuse
        return -1
    rows = wte.shape[0]
    if not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx must be in [{-rows}, {rows}), got {padding_idx}")
    return padding_idx % rows


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, wte, wpe, padding_idx):
        out = _fwd(ids, wte, wpe)
        ctx.vocabulary, ctx.positions, ctx.padding_idx = wte.shape[0], 0 if wpe is None else wpe.shape[0], padding_idx
        ctx.save_for_backward(ids)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (ids,) = ctx.saved_tensors
        _, *mask, _ = ctx.needs_input_grad
        grads = _bwd(dout, ids, ctx.vocabulary, ctx.positions, ctx.padding_idx, mask)
        return None, *(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True)), None


def _launch_fwd(ids, wte, wpe):
    implementation("embedding", ids.device.type)
    ids = ids.contiguous()
    out = wte.new_empty(*ids.shape, wte.shape[-1] if wte.dim() else 0)
    _native.embedding_fwd(ids, wte, wpe, out)
    return out


def _launch_bwd(dout, ids, vocabulary, positions, padding_idx, output_mask):
    dwte = dout.new_zeros(vocabulary, dout.shape[-1]) if output_mask[0] else None
    dwpe = dout.new_zeros(positions, dout.shape[-1]) if output_mask[1] else None
    ids = ids.contiguous()
    ordered, order, workspace = None, None, None
    segments = _native.embedding_workspace(ids) if output_mask[0] else 0
    if segments:  # the kernel wants the ids sorted: runs of equal ids, in token order
        ordered, order = torch.sort(ids.view(-1), stable=True)
        workspace = torch.empty(segments, 2, dout.shape[-1], dtype=torch.float32, device=dout.device)
    _native.embedding_bwd(dout.contiguous(), ids, dwte, dwpe, padding_idx, ordered, order, workspace)
    return tuple(dout.new_empty(0) if grad is None else grad for grad in (dwte, dwpe))


def _fake_fwd(ids, wte, wpe):
    return wte.new_empty(*ids.shape, wte.shape[1])


def _fake_bwd(dout, ids, vocabulary, positions, padding_idx, output_mask):
    shapes = ((vocabulary, dout.shape[-1]), (positions, dout.shape[-1]))
    return tuple(dout.new_empty(s if wanted else 0) for s, wanted in zip(shapes, output_mask, strict=True))


_fwd = register("embedding_fwd(Tensor ids, Tensor wte, Tensor? wpe) -> Tensor", _launch_fwd, _fake_fwd)
_bwd = register(
    "embedding_bwd(Tensor dout, Tensor ids, SymInt vocabulary, SymInt positions, int padding_idx,"
    " bool[2] output_mask) -> (Tensor dwte, Tensor dwpe)",
    _launch_bwd,
    _fake_bwd,
)
