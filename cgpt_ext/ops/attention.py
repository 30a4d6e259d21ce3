"""Softmax attention without its T x T matrix (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691).

    S = softmax_scale * q k^T,  out = softmax(S) v

Scores and sums are fp32 whatever is read. Saved for the backward pass: q, k, v, out and lse (B, H, Tq) fp32, the
natural logarithm of each query's sum of exponentials; the probabilities are computed again from it.

`attention_qkv` is the same kernels on one packed projection: its gradient is one tensor, written once.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation, reference_chosen
from cgpt_ext.ops._torch import register, require_tensors


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
    """Attention of every query to the keys it sees; flash-attn's `flash_attn_func` in shapes and meaning.

    Args:
        q: (B, Tq, H, D) in fp32, bf16 or fp16; D a multiple of 8 up to 256; any strides, copied only where the last
            dimension is not contiguous.
        k, v: (B, Tk, Hkv, D) in q's dtype; Hkv divides H, and query head h reads key head h // (H / Hkv).
        causal: query i sees keys j <= i + Tk - Tq, the last query all of them. A query that sees none gives zeros.
        softmax_scale: factor on the scores, 1 / sqrt(D) where None.

    Returns:
        out: (B, Tq, H, D), contiguous, in q's dtype.

    Raises:
        ValueError: for a wrong shape, head dim or device. TypeError: for a wrong dtype.
    """
    require_tensors("attention", q=q, k=k, v=v)
    if reference_chosen("attention"):
        return attention_ref(q, k, v, causal, softmax_scale)
    scale = _scale(q, softmax_scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, causal, scale)
    return _fwd(q, k, v, causal, scale, False)[0]


def attention_qkv(qkv: Tensor, n_head: int, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
    """`attention` on a packed projection, as GPT-2's `c_attn` gives it.

    Args:
        qkv: (B, T, 3 * D_model): q, k and v side by side, each n_head heads of D_model / n_head.
        n_head: number of heads.
        causal, softmax_scale: as for `attention`.

    Returns:
        out: (B, T, D_model), contiguous, in qkv's dtype.

    Raises:
        ValueError: for a wrong shape, head dim or device. TypeError: for a wrong dtype.
    """
    require_tensors("attention_qkv", qkv=qkv)
    if qkv.dim() != 3:
        raise ValueError(f"attention_qkv: qkv must be 3-dimensional, got shape {tuple(qkv.shape)}")
    if n_head < 1 or qkv.shape[-1] % (3 * n_head):
        raise ValueError(
            f"attention_qkv: qkv must be (B, T, 3 * D_model) with n_head={n_head} dividing D_model, "
            f"got {tuple(qkv.shape)}"
        )
    if reference_chosen("attention"):
        return attention_ref(*_heads(qkv, n_head), causal, softmax_scale).flatten(2)
    scale = (3 * n_head / max(qkv.shape[-1], 1)) ** 0.5 if softmax_scale is None else float(softmax_scale)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _AttentionQKV.apply(qkv, n_head, causal, scale)
    return _qkv_fwd(qkv, n_head, causal, scale, False)[0]


def attention_ref(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
    """`attention` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = q @ k.transpose(-2, -1) * _scale(q, softmax_scale)
    if not causal:
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
    Tq, Tk = scores.shape[-2:]
    i, j = torch.arange(Tq, device=q.device)[:, None], torch.arange(Tk, device=q.device)
    sees = j <= i + Tk - Tq
    sees_none = ~sees.any(-1, keepdim=True)  # softmax over nothing is 0/0: take it over all, then drop it
    p = scores.masked_fill(~sees & ~sees_none, -math.inf).softmax(-1).masked_fill(sees_none, 0)
    return (p @ v).transpose(1, 2).contiguous()


def _scale(q, softmax_scale):
    if softmax_scale is not None:
        return float(softmax_scale)
    return max(q.shape[-1], 1) ** -0.5 if q.dim() else 1.0  # the native border refuses both


def _heads(qkv, n_head):
    """q, k, v (B, T, H, D) as views of the packed projection."""
    B, T, packed = qkv.shape
    return qkv.view(B, T, 3, n_head, packed // (3 * n_head)).unbind(2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        out, lse = _fwd(q, k, v, causal, scale, True)
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dq, dk, dv = _bwd(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return dq, dk, dv, None, None


class _AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head, causal, scale):
        out, lse = _qkv_fwd(qkv, n_head, causal, scale, True)
        ctx.n_head, ctx.causal, ctx.scale = n_head, causal, scale
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return _qkv_bwd(dout, *ctx.saved_tensors, ctx.n_head, ctx.causal, ctx.scale), None, None, None


def _rows(x):
    """x itself unless its last dimension is strided: other strides are the kernel's business."""
    return x if x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _lse(q, save_lse):
    if not save_lse:
        return q.new_empty(0, dtype=torch.float32)
    B, T, H = q.shape[:3] if q.dim() == 4 else (0, 0, 0)
    return q.new_empty((B, H, T), dtype=torch.float32)


def _unmasked(causal, scale):
    return -1, 0 if causal else -1, scale, None, None, None, 0, 0


def _launch_fwd(q, k, v, causal, scale, save_lse):
    implementation("attention", q.device.type)
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = _lse(q, save_lse)
    _native.attention_fwd(q, k, v, *_unmasked(causal, scale), out, lse if save_lse else None)
    return out, lse


def _launch_bwd(dout, q, k, v, out, lse, causal, scale):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _native.attention_bwd(
        _rows(dout), _rows(q), _rows(k), _rows(v), out, lse, *_unmasked(causal, scale), None, dq, dk, dv
    )
    return dq, dk, dv


def _launch_qkv_fwd(qkv, n_head, causal, scale, save_lse):
    out, lse = _launch_fwd(*_heads(qkv, n_head), causal, scale, save_lse)
    return out.flatten(2), lse


def _launch_qkv_bwd(dout, qkv, out, lse, n_head, causal, scale):
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q, k, v = _heads(_rows(qkv), n_head)
    dout, out = (x.view(q.shape) for x in (_rows(dout), out))
    _native.attention_bwd(dout, q, k, v, out, lse, *_unmasked(causal, scale), None, *_heads(dqkv, n_head))
    return dqkv


def _fake_fwd(q, k, v, causal, scale, save_lse):
    return torch.empty_like(q, memory_format=torch.contiguous_format), _lse(q, save_lse)


def _fake_bwd(dout, q, k, v, out, lse, causal, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _fake_qkv_fwd(qkv, n_head, causal, scale, save_lse):
    q = _heads(qkv, n_head)[0]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)), _lse(q, save_lse)


def _fake_qkv_bwd(dout, qkv, out, lse, n_head, causal, scale):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_fwd = register(
    "attention_fwd(Tensor q, Tensor k, Tensor v, bool causal, float scale, bool save_lse) -> (Tensor out, Tensor lse)",
    _launch_fwd,
    _fake_fwd,
)
_bwd = register(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    _launch_bwd,
    _fake_bwd,
)
_qkv_fwd = register(
    "attention_qkv_fwd(Tensor qkv, int n_head, bool causal, float scale, bool save_lse) -> (Tensor out, Tensor lse)",
    _launch_qkv_fwd,
    _fake_qkv_fwd,
)
_qkv_bwd = register(
    "attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int n_head, bool causal, float scale)"
    " -> Tensor dqkv",
    _launch_qkv_bwd,
    _fake_qkv_bwd,
)
