"""Softmax attention without its T x T matrix (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691).

    S = softmax_scale * q k^T - slope * |i + Tk - Tq - j|,  out = softmax(S) v

The last query stands above the last key, and so query i above key i + Tk - Tq: causal masks, windows and ALiBi's
distances count from there. Scores and sums are fp32 whatever is read. Saved for the backward pass: q, k, v, out and
lse fp32, (B, H, Tq) or (H, total_q), the natural logarithm of each query's sum of exponentials; the probabilities are
computed again from it.

`attention_qkv` is the same kernels on one packed projection: its gradient is one tensor, written once.
`attention_varlen` is the same kernels on sequences of different lengths, packed one behind the other.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cgpt_ext import _native
from cgpt_ext.dispatch import implementation, reference_chosen
from cgpt_ext.ops._torch import check_tensors, on_gpu, register, require_tensors


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of every query to the keys it sees; flash-attn's `flash_attn_func` in shapes and meaning.

    Args:
        q: (B, Tq, H, D) in fp32, bf16 or fp16; D a multiple of 8 up to 256; any strides, copied only where the last
            dimension is not contiguous, or on a GPU where 16 bytes at a time cannot be read.
        k, v: (B, Tk, Hkv, D) in q's dtype; Hkv divides H, and query head h reads key head h // (H / Hkv).
        causal: query i sees keys j <= i + Tk - Tq, the last query all of them. A query that sees none gives zeros.
        softmax_scale: factor on the scores, 1 / sqrt(D) where None.
        window_size: (left, right): query i sees keys from i + Tk - Tq - left to i + Tk - Tq + right; -1 is no limit.
            causal makes right 0.
        alibi_slopes: (H,) or (B, H) fp32: head h adds -alibi_slopes[h] * |i + Tk - Tq - j| to the scaled score of
            query i and key j (Press et al. 2022, arXiv 2108.12409). They get no gradient.

    Returns:
        out: (B, Tq, H, D), contiguous, in q's dtype.

    Raises:
        ValueError: for a wrong shape, head dim or device. TypeError: for a wrong dtype.
    """
    require_tensors("attention", q=q, k=k, v=v)
    check_tensors("attention", alibi_slopes=alibi_slopes)
    windows = _windows("attention", window_size, causal)
    if reference_chosen("attention"):
        return attention_ref(q, k, v, causal, softmax_scale, window_size, alibi_slopes)
    options = (*windows, _scale(q, softmax_scale), _constant(alibi_slopes), None, None, 0, 0)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, *options)
    return _fwd(q, k, v, *options, False)[0]


def attention_qkv(
    qkv: Tensor,
    n_head: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`attention` on a packed projection, as GPT-2's `c_attn` gives it.

    Args:
        qkv: (B, T, 3 * D_model): q, k and v side by side, each n_head heads of D_model / n_head.
        n_head: number of heads.
        causal, softmax_scale, window_size, alibi_slopes: as for `attention`.

    Returns:
        out: (B, T, D_model), contiguous, in qkv's dtype.

    Raises:
        ValueError: for a wrong shape, head dim or device. TypeError: for a wrong dtype.
    """
    require_tensors("attention_qkv", qkv=qkv)
    check_tensors("attention_qkv", alibi_slopes=alibi_slopes)
    if qkv.dim() != 3:
        raise ValueError(f"attention_qkv: qkv must be 3-dimensional, got shape {tuple(qkv.shape)}")
    if n_head < 1 or qkv.shape[-1] % (3 * n_head):
        raise ValueError(
            f"attention_qkv: qkv must be (B, T, 3 * D_model) with n_head={n_head} dividing D_model, "
            f"got {tuple(qkv.shape)}"
        )
    windows = _windows("attention_qkv", window_size, causal)
    if reference_chosen("attention"):
        return attention_ref(*_heads(qkv, n_head), causal, softmax_scale, window_size, alibi_slopes).flatten(2)
    scale = (3 * n_head / max(qkv.shape[-1], 1)) ** 0.5 if softmax_scale is None else float(softmax_scale)
    options = (n_head, *windows, scale, _constant(alibi_slopes))
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _AttentionQKV.apply(qkv, *options)
    return _qkv_fwd(qkv, *options, False)[0]


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`attention` within each of B packed sequences; flash-attn's `flash_attn_varlen_func` in shapes and meaning.

    Args:
        q: (total_q, H, D): the sequences' queries, one behind the other; dtypes and strides as for `attention`.
        k, v: (total_k, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, contiguous, on q's device: sequence b is rows cu_seqlens[b] to
            cu_seqlens[b + 1]. They start at 0, never fall and end at the total; a sequence may be empty. On a CPU that
            is checked. On a GPU looking would stop the queue: kernels clamp what they read to the tensors and to
            max_seqlen, so that nothing outside is touched, and rows that no sequence holds are left uninitialised.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length.
        causal, softmax_scale, window_size, alibi_slopes: as for `attention`, with each sequence's own Tq and Tk.

    Returns:
        out: (total_q, H, D), contiguous, in q's dtype.

    Raises:
        ValueError: for a wrong shape, head dim, device or, on a CPU, cu_seqlens. TypeError: for a wrong dtype.
    """
    op = "attention_varlen"
    require_tensors(op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_tensors(op, alibi_slopes=alibi_slopes)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(length, int):
            raise TypeError(f"{op}: {name} must be an int, got {type(length).__name__}")
    windows = _windows(op, window_size, causal)
    if reference_chosen("attention"):
        return attention_varlen_ref(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal,
            softmax_scale,
            window_size,
            alibi_slopes,
        )
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = cu_seqlens_q.detach()  # torch.compile takes no tensor twice into an autograd.Function
    seqlens = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (*windows, _scale(q, softmax_scale), _constant(alibi_slopes), *seqlens)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, *options)
    return _fwd(q, k, v, *options, False)[0]


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`attention` in plain torch, in the dtype of its inputs: the truth when they are fp64."""
    left, right = _windows("attention", window_size, causal)
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = q @ k.transpose(-2, -1) * _scale(q, softmax_scale)
    Tq, Tk = scores.shape[-2:]
    ahead = torch.arange(Tk, device=q.device) - torch.arange(Tq, device=q.device)[:, None] - (Tk - Tq)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.detach().to(scores)[..., None, None] * ahead.abs()
    if left < 0 and right < 0:
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
    sees = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        sees &= ahead >= -left
    if right >= 0:
        sees &= ahead <= right
    sees_none = ~sees.any(-1, keepdim=True)  # softmax over nothing is 0/0: take it over all, then drop it
    p = scores.masked_fill(~sees & ~sees_none, -math.inf).softmax(-1).masked_fill(sees_none, 0)
    return (p @ v).transpose(1, 2).contiguous()


def attention_varlen_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """`attention_varlen` in plain torch: `attention_ref` of one sequence after the other."""
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    outs = []
    for b, sequence in enumerate(sequences):
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        outs.append(attention_ref(*(x[None] for x in sequence), causal, softmax_scale, window_size, slopes)[0])
    return torch.cat([q[:0], *outs])


def _scale(q, softmax_scale):
    if softmax_scale is not None:
        return float(softmax_scale)
    return max(q.shape[-1], 1) ** -0.5 if q.dim() else 1.0  # the native border refuses both


def _windows(op, window_size, causal):
    """(left, right) of `window_size`, with what causal makes of them."""
    if not isinstance(window_size, (tuple, list)) or [isinstance(w, int) for w in window_size] != [True, True]:
        raise TypeError(f"{op}: window_size must be two ints, got {window_size!r}")
    return window_size[0], 0 if causal else window_size[1]


def _constant(alibi_slopes):
    return alibi_slopes.detach() if alibi_slopes is not None and alibi_slopes.requires_grad else alibi_slopes


def _heads(qkv, n_head):
    """q, k, v (B, T, H, D) as views of the packed projection."""
    B, T, packed = qkv.shape
    return qkv.view(B, T, 3, n_head, packed // (3 * n_head)).unbind(2)


class _Attention(torch.autograd.Function):
    """The options are the launchers': windows, scale, slopes, cu_seqlens and their longest, of q and of k."""

    @staticmethod
    def forward(ctx, q, k, v, left, right, scale, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_q, max_k):
        options = (left, right, scale, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
        out, lse = _fwd(q, k, v, *options, True)
        ctx.numbers = left, right, scale, max_q, max_k
        ctx.save_for_backward(q, k, v, out, lse, alibi_slopes, cu_seqlens_q, cu_seqlens_k)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *saved, alibi_slopes, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        left, right, scale, max_q, max_k = ctx.numbers
        options = (left, right, scale, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
        return *_bwd(dout, *saved, *options), *[None] * len(options)


class _AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head, left, right, scale, alibi_slopes):
        out, lse = _qkv_fwd(qkv, n_head, left, right, scale, alibi_slopes, True)
        ctx.numbers = n_head, left, right, scale
        ctx.save_for_backward(qkv, out, lse, alibi_slopes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *saved, alibi_slopes = ctx.saved_tensors
        return _qkv_bwd(dout, *saved, *ctx.numbers, alibi_slopes), *[None] * 5


def _rows(x):
    """x itself where a kernel can read it: by contiguous rows, and on a GPU by 16 aligned bytes of them."""
    readable = x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1
    if readable and on_gpu(x) and x.dtype != torch.float32:
        strides = (s for s, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1)
        readable = x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides)
    return x if readable else x.clone(memory_format=torch.contiguous_format)


def _statistic(q, wanted=True):
    """Memory for a number a query and head: (B, H, Tq), or of packed sequences (H, total_q)."""
    if not wanted or q.dim() < 3:
        return q.new_empty(0, dtype=torch.float32)
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)


def _triton(q):
    return implementation("attention", q.device.type, q.dtype) == "triton"


def _launch_fwd(q, k, v, *options):
    *options, save_lse = options
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = _statistic(q, save_lse)
    arguments = (q, k, v, *options, out, lse if save_lse else None)
    if _triton(q):
        from cgpt_ext.triton.attention import attention_fwd_triton

        _native.attention_check(*arguments)
        attention_fwd_triton(*arguments)
    else:
        _native.attention_fwd(*arguments)
    return out, lse


def _run_bwd(dout, q, k, v, out, lse, options, gradients):
    arguments = (dout, q, k, v, out, lse, *options, _statistic(q), *gradients)
    if _triton(q):
        from cgpt_ext.triton.attention import attention_bwd_triton

        attention_bwd_triton(*arguments)
    else:
        _native.attention_bwd(*arguments)


def _launch_bwd(dout, q, k, v, out, lse, *options):
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _run_bwd(_rows(dout), _rows(q), _rows(k), _rows(v), out, lse, options, gradients)
    return gradients


def _launch_qkv_fwd(qkv, n_head, left, right, scale, alibi_slopes, save_lse):
    out, lse = _launch_fwd(*_heads(qkv, n_head), left, right, scale, alibi_slopes, None, None, 0, 0, save_lse)
    return out.flatten(2), lse


def _launch_qkv_bwd(dout, qkv, out, lse, n_head, left, right, scale, alibi_slopes):
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q, k, v = _heads(_rows(qkv), n_head)
    dout, out = (x.view(q.shape) for x in (_rows(dout), out))
    options = (left, right, scale, alibi_slopes, None, None, 0, 0)
    _run_bwd(dout, q, k, v, out, lse, options, _heads(dqkv, n_head))
    return dqkv


def _fake_fwd(q, k, v, *options):
    return torch.empty_like(q, memory_format=torch.contiguous_format), _statistic(q, options[-1])


def _fake_bwd(dout, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _fake_qkv_fwd(qkv, n_head, left, right, scale, alibi_slopes, save_lse):
    q = _heads(qkv, n_head)[0]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)), _statistic(q, save_lse)


def _fake_qkv_bwd(dout, qkv, *rest):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_OPTIONS = (
    "int window_left, int window_right, float scale, Tensor? alibi_slopes,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_QKV_OPTIONS = "int n_head, int window_left, int window_right, float scale, Tensor? alibi_slopes"

_fwd = register(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool save_lse) -> (Tensor out, Tensor lse)",
    _launch_fwd,
    _fake_fwd,
)
_bwd = register(
    f"attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    _launch_bwd,
    _fake_bwd,
)
_qkv_fwd = register(
    f"attention_qkv_fwd(Tensor qkv, {_QKV_OPTIONS}, bool save_lse) -> (Tensor out, Tensor lse)",
    _launch_qkv_fwd,
    _fake_qkv_fwd,
)
_qkv_bwd = register(
    f"attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_QKV_OPTIONS}) -> Tensor dqkv",
    _launch_qkv_bwd,
    _fake_qkv_bwd,
)
