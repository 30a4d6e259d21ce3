"""Fused GPT kernels as drop-in torch functions, modules and optimizers.

    from cgpt_ext import attention, cross_entropy, embedding, gelu_mlp, layer_norm     # functions
    from cgpt_ext import adamw_, grad_norm, linear, rotary
    from cgpt_ext.nn import CausalSelfAttention, Embedding, GeluMLP, LayerNorm, Linear # modules
    from cgpt_ext.optim import AdamW                                                   # optimizer

`python -m cgpt_ext` says what is installed here, which implementation serves each op, and why; --check tries them.
"""

from importlib import import_module

# `python -m cgpt_ext` must run where the native module or torch does not, so that __getattr__ raises what they raised.
_failure: Exception | None = None
try:
    import_module("cgpt_ext._native")  # first: `from cgpt_ext import` a missing file is called a circular import
    from cgpt_ext.ops.adamw import adamw_, adamw_ref, join_master, split_master
    from cgpt_ext.ops.attention import attention, attention_qkv, attention_ref, attention_varlen
    from cgpt_ext.ops.cross_entropy import cross_entropy, cross_entropy_ref
    from cgpt_ext.ops.embedding import embedding, embedding_ref
    from cgpt_ext.ops.gelu_mlp import gelu_mlp, gelu_mlp_ref
    from cgpt_ext.ops.grad_norm import grad_norm, grad_norm_ref, grad_square_sums
    from cgpt_ext.ops.layer_norm import layer_norm, layer_norm_ref
    from cgpt_ext.ops.linear import linear, linear_ref
    from cgpt_ext.ops.rotary import rotary, rotary_ref
except Exception as error:
    _failure = error

__all__ = [
    "adamw_",
    "adamw_ref",
    "attention",
    "attention_qkv",
    "attention_ref",
    "attention_varlen",
    "cross_entropy",
    "cross_entropy_ref",
    "embedding",
    "embedding_ref",
    "gelu_mlp",
    "gelu_mlp_ref",
    "grad_norm",
    "grad_norm_ref",
    "grad_square_sums",
    "join_master",
    "layer_norm",
    "layer_norm_ref",
    "linear",
    "linear_ref",
    "rotary",
    "rotary_ref",
    "split_master",
]


def __getattr__(name: str):
    if _failure is not None and (name in __all__ or name == "_native"):
        words = " ".join(f"{type(_failure).__name__}: {_failure}".split())
        raise ImportError(f"cgpt_ext does not load: {words}; `python -m cgpt_ext` says what to do") from _failure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
