"""flash-attn 2's functions, in signature and meaning (Dao 2023, arXiv 2307.08691), on these kernels, on a CPU too.

    from cgpt_ext.integrations.flash_attn import flash_attn_func

Code that calls flash-attn by these names runs on: shapes, the mask aligned at the last query and the last key, windows,
ALiBi, grouped heads and zeros for queries that see nothing are the same. fp32 is served too.

Refused, in one line of a ValueError: dropout, softcap, return_attn_probs and a block_table. `deterministic` changes
nothing: the backward pass always is.
"""

from torch import Tensor

from cgpt_ext.ops._torch import require_tensors
from cgpt_ext.ops.attention import attention, attention_qkv, attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of q (B, Tq, H, D) to k, v (B, Tk, Hkv, D); returns (B, Tq, H, D). See `cgpt_ext.attention`.

    Raises:
        ValueError: for dropout_p, softcap or return_attn_probs, a wrong shape or device. TypeError: for a wrong dtype.
    """
    _refuse("flash_attn_func", dropout_p=dropout_p, softcap=softcap, return_attn_probs=return_attn_probs)
    return attention(q, k, v, causal, softmax_scale, _pair(window_size), alibi_slopes)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn_func` of qkv (B, T, 3, H, D), whose gradient is written as one; returns (B, T, H, D)."""
    name = "flash_attn_qkvpacked_func"
    _refuse(name, dropout_p=dropout_p, softcap=softcap, return_attn_probs=return_attn_probs)
    _check_packed(name, "qkv", qkv, 3, 5)
    B, T, _, H, D = qkv.shape
    out = attention_qkv(qkv.flatten(2), H, causal, softmax_scale, _pair(window_size), alibi_slopes)
    return out.view(B, T, H, D)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn_func` of q (B, Tq, H, D) and kv (B, Tk, 2, Hkv, D); returns (B, Tq, H, D)."""
    name = "flash_attn_kvpacked_func"
    _refuse(name, dropout_p=dropout_p, softcap=softcap, return_attn_probs=return_attn_probs)
    _check_packed(name, "kv", kv, 2, 5)
    return attention(q, *kv.unbind(2), causal, softmax_scale, _pair(window_size), alibi_slopes)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """`flash_attn_func` within each of packed sequences: q (total_q, H, D), k and v (total_k, Hkv, D).

    cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each sequence begins, and the total. Returns (total_q, H, D). See
    `cgpt_ext.attention_varlen`.

    Raises:
        ValueError: for dropout_p, softcap, return_attn_probs or block_table, a wrong shape, device or cu_seqlens.
        TypeError: for a wrong dtype.
    """
    name = "flash_attn_varlen_func"
    _refuse(name, dropout_p=dropout_p, softcap=softcap, return_attn_probs=return_attn_probs, block_table=block_table)
    seqlens = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attention_varlen(q, k, v, *seqlens, causal, softmax_scale, _pair(window_size), alibi_slopes)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D); returns (total, H, D)."""
    name = "flash_attn_varlen_qkvpacked_func"
    _refuse(name, dropout_p=dropout_p, softcap=softcap, return_attn_probs=return_attn_probs)
    _check_packed(name, "qkv", qkv, 3, 4)
    seqlens = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return attention_varlen(*qkv.unbind(1), *seqlens, causal, softmax_scale, _pair(window_size), alibi_slopes)


def _refuse(name, **options):
    for option, value in options.items():
        if isinstance(value, Tensor):
            raise ValueError(f"{name}: {option} must be None, got shape {tuple(value.shape)}")
        if value:
            off = {"return_attn_probs": False, "block_table": None}.get(option, 0.0)
            raise ValueError(f"{name}: {option} must be {off}, got {value}")


def _check_packed(name, what, packed, parts, dims):
    require_tensors(name, **{what: packed})
    if packed.dim() != dims or packed.shape[-3] != parts:
        lead = "B, T" if dims == 5 else "total"
        raise ValueError(f"{name}: {what} must be ({lead}, {parts}, H, D), got {tuple(packed.shape)}")


def _pair(window_size):
    """The window as two ints. flash-attn takes any negative number, and None in its newer versions, for no limit."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        return window_size  # which attention names in its error
    return tuple(-1 if w is None or (isinstance(w, int) and w < 0) else w for w in window_size)
