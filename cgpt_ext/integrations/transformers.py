"""Attention for Hugging Face transformers' models, by its AttentionInterface: `register()`, then the name "cgpt".

    from cgpt_ext.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="cgpt")    # or, of a live model,
    model.set_attn_implementation("cgpt")

It is registered as a mask too: without one, transformers hands padded batches over with no mask at all, and they are
silently wrong. Our mask is SDPA's own, (B, 1, Tq, Tk) bool, exact for whoever reads it. Beside it, as an attribute,
stands what it was seen to be: `Spans`, runs of tokens in which every query sees the keys before it, which padding on
either side, packed sequences, chunks and sliding windows all are. The spans are taken from the mask and then compared
with it, element by element, once a forward pass; the kernel runs on spans that agree.

What goes to torch's scaled_dot_product_attention instead: any other mask, of the caller's or with holes in its padding;
dropout in training; a position bias; and under torch.compile every mask, whose content a graph cannot look at. The name
"cgpt_causal" is for that: it takes no mask, so nothing stands between a compiled model and the kernel, and refuses
what needs one. Softcaps and sinks are refused under both names. Reentrant gradient checkpointing of GPT-2, not the
default, hands the mask on as another tensor, so that SDPA serves what it computes again.

Padding's own rows are SDPA's too: in front of a sequence they see nothing and are zero (the first token's label is
predicted from there), behind it they see the sequence (generate() goes on from there).

`apply_cgpt_kernels_to_gpt2` and `apply_cgpt_kernels_to_llama` are in transformers_patch.py and can be had from here.
"""

from dataclasses import dataclass
from inspect import signature
from itertools import pairwise

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from cgpt_ext.ops._torch import autocast
from cgpt_ext.ops.attention import attention, attention_varlen

NAMES = ("cgpt", "cgpt_causal")


@dataclass(frozen=True)
class Spans:
    """A (B, 1, Tq, Tk) mask in short: in every run of tokens, query i sees the keys up to its own, `window` at most.

    shape: the mask's (B, Tq, Tk).
    window: how many keys a query sees at most, its own among them; 0 is no limit.
    cu_seqlens: (n + 1,) int32: where Tq = Tk, the runs in the batch's B * Tq tokens, padding in runs of its own.
    longest: the most tokens in a run.
    early: (B * Tq, 1, 1) bool: padding in front of its sequence, which sees nothing.
    late: padding behind its sequence, which sees all of it: (its places in the batch's tokens, those of the keys it
        sees, cu_seqlens of both, the longest of both).
    runs: where a cache holds keys from before, (b0, b1, k0, k1): the last of sequences b0 to b1's queries stands at key
        k1 - 1, and none sees a key before k0.
    """

    shape: tuple[int, int, int]
    window: int = 0
    cu_seqlens: Tensor | None = None
    longest: int = 0
    early: Tensor | None = None
    late: tuple[Tensor, Tensor, Tensor, Tensor, int, int] | None = None
    runs: tuple[tuple[int, int, int, int], ...] = ()


def register() -> None:
    """Makes "cgpt" and "cgpt_causal" known to transformers as attention and as masks. Calling it again is harmless.

    Raises ImportError where transformers is older than 5.4, whose masks are made from other arguments.
    """
    if "q_length" not in signature(sdpa_mask).parameters:
        raise ImportError(f"register: transformers must be 5.4 or newer, got {transformers.__version__}")
    for name, mask in zip(NAMES, (attention_mask, no_mask), strict=True):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls by the name "cgpt".

    Args:
        module: the attention layer; `is_causal` is read from it where it is not given.
        query: (B, H, Tq, D) in fp32, bf16 or fp16, D a multiple of 8 up to 256.
        key, value: (B, Hkv, Tk, D); Hkv divides H.
        attention_mask: (B, 1, Tq, Tk) from `attention_mask`, or any that SDPA takes, or None: causal where is_causal.
        dropout: probability; above 0 SDPA serves.
        scaling: factor on the scores; 1 / sqrt(D) where None.

    Returns:
        (out (B, Tq, H, D), None): attention's weights are never formed.

    Raises:
        ValueError: for a softcap, sinks or a paged cache; else as `cgpt_ext.attention`. TypeError: for a wrong dtype.
    """
    for option in ("softcap", "s_aux", "cache"):
        if kwargs.get(option) is not None:
            raise ValueError(f"attention_forward: {option} must be None, got {_short(kwargs[option])}")
    spans = None if torch.compiler.is_compiling() else getattr(attention_mask, "cgpt_spans", None)
    if spans is not None and spans.shape != (query.shape[0], query.shape[2], key.shape[2]):
        spans = None
    if (attention_mask is not None and spans is None) or dropout > 0 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    q, k, v = autocast(*(x.transpose(1, 2) for x in (query, key, value)))
    if spans is not None:
        return _attend(q, k, v, scaling, spans), None
    length = q.shape[1]
    if length == 1:
        return _decode(q, k, v, scaling), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and k.shape[1] > length:  # a static cache before its first token: what lies behind is empty
        k, v = k[:, :length], v[:, :length]
    return attention(q, k, v, causal, scaling), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> Tensor | None:
    """transformers' `sdpa_mask`, arguments and result, with `Spans` as its attribute `cgpt_spans` where they say all.

    Returns:
        (batch_size, 1, q_length, kv_length) bool, True where a query sees a key; None for plain causal attention.
    """
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if mask is None or traced or type(mask) is not Tensor or mask.is_meta:
        return mask
    if q_length == 1:
        mask = mask.contiguous()  # generate() would, and so lose the attribute
    end = int(q_offset) + q_length - kv_offset  # keys up to the last query's own
    real = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + end].bool()
    if q_length <= end <= kv_length and (real is None or real.shape[1] == end):
        find = _cached_spans if q_length < kv_length else _spans
        spans = find(mask[:, 0], real, end, local_size if local_size and local_size < end else 0)
        if spans is not None:
            mask.cgpt_spans = spans
    return mask


def no_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs,
) -> None:
    """The mask of "cgpt_causal": none. Every row of the batch is one sequence, whole.

    Under torch.compile restarting position_ids, by which transformers marks packed sequences, cannot be seen: they are
    refused in eager mode alone.

    Raises:
        ValueError: for an attention_mask, a window that the sequence is longer than, packed sequences, a static cache.
    """
    if attention_mask is not None:
        raise ValueError(
            f'attention "cgpt_causal": attention_mask must be None, got {_short(attention_mask)}; "cgpt" serves it'
        )
    if local_size is not None and kv_length >= local_size:
        raise ValueError(f'attention "cgpt_causal": the sequence must be shorter than {local_size}, got {kv_length}')
    if q_length != kv_length and (q_length != 1 or isinstance(q_offset, Tensor)):
        raise ValueError(
            f'attention "cgpt_causal": queries must be as many as keys, or one, got {q_length} for {kv_length}'
        )
    if not torch.compiler.is_compiling() and mask_function is not causal_mask_function:
        raise ValueError('attention "cgpt_causal": the mask must be plain causal, got another; "cgpt" serves it')


def _attend(q, k, v, scaling, spans):
    window = (spans.window - 1, 0) if spans.window else (-1, -1)
    if spans.cu_seqlens is None:
        outs = []
        for b0, b1, k0, k1 in spans.runs:
            run = q[b0:b1], k[b0:b1, k0:k1], v[b0:b1, k0:k1]
            outs.append(_decode(*run, scaling) if q.shape[1] == 1 else attention(*run, True, scaling, window))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
    shape, (q, k, v) = q.shape, (x.flatten(0, 1) for x in (q, k, v))
    seqlens = (spans.cu_seqlens, spans.cu_seqlens, spans.longest, spans.longest)
    out = attention_varlen(q, k, v, *seqlens, True, scaling, window)
    if spans.early is not None:
        out = out.masked_fill(spans.early, 0)
    if spans.late is not None:
        queries, keys, *seqlens = spans.late
        late = attention_varlen(q[queries], k[keys], v[keys], *seqlens, False, scaling)
        out = out.index_copy(0, queries, late)
    return out.view(shape)


def _decode(q, k, v, scaling):
    """One query that sees all keys: the heads that share keys take the places of queries, and the cache is read once.

    On a Zen 4, with 4 heads a key head and 1024 keys, that is 1.9 to 2.7 times as fast as a query a head.
    """
    heads, groups = q.shape[2], k.shape[2]
    if heads == groups or heads % max(groups, 1):
        return attention(q, k, v, False, scaling)
    out = attention(q.squeeze(1).unflatten(1, (groups, -1)).transpose(1, 2), k, v, False, scaling)
    return out.transpose(1, 2).flatten(1, 2).unsqueeze(1)


def _spans(mask, real, end, window):
    """Spans of a (B, T, T) mask, or None where it is no set of them; real (B, T), or None for no padding.

    A run begins where a token does not see the one before it, and where padding begins or ends.
    """
    B, T, _ = mask.shape
    begins = torch.ones(B, T, dtype=torch.bool, device=mask.device)
    torch.logical_not(mask.diagonal(-1, 1, 2), out=begins[:, 1:])
    early = late = None
    if real is not None:
        begins[:, 1:] = torch.where(real[:, 1:] & real[:, :-1], begins[:, 1:], real[:, 1:] != real[:, :-1])
        begun = real.cummax(1).values
        early, late = ~begun, begun & ~real
    run = begins.cumsum(1)
    expected = run[:, :, None] == run[:, None]
    if real is not None:
        expected = torch.where(late[:, :, None], real[:, None], expected) & begun[:, :, None]
    expected &= _causal(T, T, 0, window, mask.device)
    if not torch.equal(expected, mask):
        return None
    starts = begins.flatten().nonzero().flatten().tolist()
    early = early.view(-1, 1, 1) if early is not None and early.any() else None
    if len(starts) == B and early is None:
        return Spans((B, T, T), window, runs=((0, B, 0, T),))
    late = _late(late, real) if late is not None and late.any() else None
    if late and window:  # such a query's window reaches back over padding, which no window of the kernel's does
        return None
    bounds = [*starts, B * T]
    longest = max(b - a for a, b in pairwise(bounds))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=mask.device)
    return Spans((B, T, T), window, cu_seqlens, longest, early, late)


def _late(late, real):
    real = real & late.any(1, keepdim=True)
    places = [x.flatten().nonzero().flatten() for x in (late, real)]
    counts = [x.sum(1) for x in (late, real)]
    cu_seqlens = [torch.nn.functional.pad(n.cumsum(0), (1, 0)).int() for n in counts]
    return *places, *cu_seqlens, *(int(n.max()) for n in counts)


def _cached_spans(mask, real, end, window):
    """Spans of a (B, Tq, Tk) mask with keys from before the queries: each sequence from its first real key on."""
    B, Tq, Tk = mask.shape
    first = torch.zeros(B, dtype=torch.int64, device=mask.device)
    if real is not None:
        first = torch.where(real.any(1), real.int().argmax(1), end)
    expected = _causal(Tq, Tk, end - Tq, window, mask.device) & (
        torch.arange(Tk, device=mask.device) >= first[:, None, None]
    )
    if not torch.equal(expected, mask):
        return None
    if Tq == 1 and window:  # one query's window is but a later first key
        first, window = first.clamp(min=end - window), 0
    runs = []
    for b, k0 in enumerate(first.tolist()):
        if runs and runs[-1][2] == k0:
            runs[-1] = (runs[-1][0], b + 1, k0, end)
        else:
            runs.append((b, b + 1, k0, end))
    return Spans((B, Tq, Tk), window, runs=tuple(runs))


def _causal(Tq, Tk, offset, window, device):
    """(Tq, Tk) bool: query i, at key i + offset, sees the keys up to it, `window` of them at most."""
    ahead = torch.arange(Tk, device=device) - torch.arange(Tq, device=device)[:, None] - offset
    return (ahead <= 0) & (ahead > -window) if window else ahead <= 0


def _short(value):
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"


def __getattr__(name):
    if name.startswith("apply_cgpt_kernels_to_") or name in ("Patch", "register_with_liger"):
        from cgpt_ext.integrations import transformers_patch

        return getattr(transformers_patch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
