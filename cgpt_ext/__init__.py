"""Fused GPT kernels as drop-in torch functions, modules and optimizers.

    from cgpt_ext import attention, cross_entropy, embedding, gelu_mlp, layer_norm     # functions
    from cgpt_ext import adamw_, grad_norm, rotary
    from cgpt_ext.nn import CausalSelfAttention, Embedding, GeluMLP, LayerNorm         # modules
    from cgpt_ext.optim import AdamW                                                   # optimizer

`python -m cgpt_ext` says which implementation serves each op on this machine, and why.
"""

from cgpt_ext.ops.adamw import adamw_, adamw_ref, join_master, split_master
from cgpt_ext.ops.attention import attention, attention_qkv, attention_ref, attention_varlen
from cgpt_ext.ops.cross_entropy import cross_entropy, cross_entropy_ref
from cgpt_ext.ops.embedding import embedding, embedding_ref
from cgpt_ext.ops.gelu_mlp import gelu_mlp, gelu_mlp_ref
from cgpt_ext.ops.grad_norm import grad_norm, grad_norm_ref
from cgpt_ext.ops.layer_norm import layer_norm, layer_norm_ref
from cgpt_ext.ops.rotary import rotary, rotary_ref

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
    "join_master",
    "layer_norm",
    "layer_norm_ref",
    "rotary",
    "rotary_ref",
    "split_master",
]
