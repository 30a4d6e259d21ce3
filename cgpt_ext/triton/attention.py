"""Softmax attention in Triton: the launchers of attention_fwd.py and attention_bwd.py.

Shapes and meaning are cgpt_ext.attention's: any strides with the head dim contiguous, Hkv dividing H, a window and
ALiBi slopes, and packed sequences by cu_seqlens. fp32, bf16 and fp16; sums in fp32. Two runs give the same bits.
"""

import torch

import triton
from cgpt_ext.triton import attention_bwd, attention_fwd
from cgpt_ext.triton._jit import bucket, on_device_of
from cgpt_ext.triton.attention_tiles import row_of, split_head_dim


def attention_fwd_triton(
    q, k, v, window_left, window_right, scale, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    out, lse,
):  # fmt: skip
    """Fills out, like q, and lse (B, H, Tq) or (H, total_q) fp32, the natural logarithm; lse may be None.

    Args:
        q: (B, Tq, H, D), or (total_q, H, D) with cu_seqlens. k, v: (B, Tk, Hkv, D) likewise.
        window_left, window_right: query i sees keys i + Tk - Tq - window_left to i + Tk - Tq + window_right; negative
            is no limit. A query that sees none gets out 0 and lse -inf.
        alibi_slopes: (H,) or (B, H) fp32, contiguous, or None.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, or None.
        max_seqlen_q, max_seqlen_k: the longest sequence's length; what is longer is cut. Unused without cu_seqlens.

    The caller vouches for shapes, dtypes and devices.
    """
    B, Tq, Tk = _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    if out.numel() == 0:
        return
    H, D = q.shape[-2:]
    window, masks = _window(window_left, window_right, Tq, Tk)
    row = row_of(q, masks["LEFT"] or alibi_slopes is not None)
    with on_device_of(q):
        attention_fwd.TUNED[row][lambda meta: (triton.cdiv(Tq, meta["BLOCK_M"]) * B * H,)](
            q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k, out, lse,
            *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_row_strides(lse), _slope_stride(alibi_slopes),
            H, H // k.shape[-2], Tq, Tk, *window, scale, bucket(Tk),
            D, *split_head_dim(D), **masks, NEGATIVE=scale < 0,
        )  # fmt: skip


def attention_bwd_triton(
    dout, q, k, v, out, lse, window_left, window_right, scale, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
    max_seqlen_q, max_seqlen_k, delta, dq, dk, dv,
):  # fmt: skip
    """Fills dq, dk, dv, of any strides with the head dim contiguous; delta is scratch like lse."""
    B, Tq, Tk = _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    H, D = q.shape[-2:]
    Hkv = k.shape[-2]
    if q.numel() == 0 and k.numel() == 0:
        return
    window, masks = _window(window_left, window_right, Tq, Tk)
    shared = (alibi_slopes, cu_seqlens_q, cu_seqlens_k)
    inputs = (*_strides(dout), *_strides(q), *_strides(k), *_strides(v))
    row_strides, split = _row_strides(lse), split_head_dim(D)
    group, sizes = H // max(Hkv, 1), (Tq, Tk, *window, scale)
    row = row_of(q, group > 1 or masks["LEFT"] or alibi_slopes is not None)
    with on_device_of(q):
        if q.numel():
            tile = attention_bwd.DELTA_ROWS
            attention_bwd.attention_delta_kernel[triton.cdiv(Tq, tile) * B * H,](
                dout, out, delta, cu_seqlens_q, *_strides(dout), *_strides(out), *row_strides,
                H, Tq, D, *split, BLOCK_M=tile,
            )  # fmt: skip
            attention_bwd.DQ[row][lambda meta: (triton.cdiv(Tq, meta["BLOCK_M"]) * B * H,)](
                dout, q, k, v, lse, delta, *shared, dq,
                *inputs, *_strides(dq), *row_strides, _slope_stride(alibi_slopes),
                H, group, *sizes, bucket(Tk), D, *split, **masks,
            )  # fmt: skip
        if k.numel():
            attention_bwd.DKDV[row][lambda meta: (triton.cdiv(Tk, meta["BLOCK_N"]) * B * Hkv,)](
                dout, q, k, v, lse, delta, *shared, dk, dv,
                *inputs, *_strides(dk), *_strides(dv), *row_strides, _slope_stride(alibi_slopes),
                H, *sizes, bucket(Tq), D, *split, group, **masks,
            )  # fmt: skip


def _sizes(q, k, cu_seqlens_q, max_seqlen_q, max_seqlen_k):
    """B, Tq, Tk."""
    if cu_seqlens_q is None:
        return q.shape[0], q.shape[1], k.shape[1]
    return cu_seqlens_q.numel() - 1, max_seqlen_q, max_seqlen_k


def _window(left, right, Tq, Tk):
    """The window held within what int32 sums stand, and which of its sides there are."""
    return (min(left, Tq + Tk), min(right, Tq + Tk)), {"LEFT": left >= 0, "RIGHT": right >= 0}


def _strides(x: torch.Tensor):
    """Batch, time and head strides; packed sequences have no batch."""
    return x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])


def _row_strides(lse):
    """Batch and head strides of (B, H, T) or (H, total)."""
    if lse is None:
        return 0, 0
    return lse.stride()[:2] if lse.dim() == 3 else (0, lse.stride(0))


def _slope_stride(alibi_slopes):
    return alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0
