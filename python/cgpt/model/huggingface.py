"""GPT-2's layout as Hugging Face has it: its config.json and its names of parameters, in and out; imports no torch.

    config.json   model_type "gpt2" (GPT-2, Cerebras-GPT) or "btlm" (Cerebras-GPT's muP models, BTLM): a GPTConfig
    names         [transformer.]wte.weight, [transformer.]h.0.attn.c_attn.weight, ...: ours, with or without the prefix

btlm adds factors: on the embeddings' sum mup_embeddings_scale, on the logits mup_output_alpha x mup_width_scale, and
scores over d_head instead of its root where mup_scale_qk_dot_by_d. Its SwiGLU keeps the gate apart, as mlp.c_fc2.
Whatever a GPTConfig cannot say exactly is refused by the field's name. Sources: the released configurations of
Cerebras-GPT and BTLM-3B-8K (Dey et al. 2023, arXiv 2304.03208 and 2309.11568); transformers' GPT2Config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt.model.parametrization import CEREBRAS

PREFIX = "transformer."
HEAD = "lm_head.weight"
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
SIZES = {  # GPT2Config's names, other names that it takes, and what it has where none is given
    "n_embd": ("hidden_size", 768),
    "n_layer": ("num_hidden_layers", 12),
    "n_head": ("num_attention_heads", 12),
    "n_positions": ("max_position_embeddings", 1024),
    "vocab_size": ("vocab_size", 50257),
}
MOST_LAYERS = 10_000  # whose shapes are listed before a file is opened; a number made up must not take for ever
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|relative_pe\.slopes")  # constants, not parameters
EXPRESSIBLE = {"positions": ("learned",), "activation": ("gelu", "gelu_tanh"), "embedding_norm": (False,)}
MUP = ("mup_width_scale", "mup_embeddings_scale", "mup_output_alpha", "mup_scale_qk_dot_by_d")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def shape_of(values: Mapping[str, Any]) -> tuple[GPTConfig, str]:
    """(config, parametrization) of the model that a config.json's `values` describe.

    Factors on what is learnt follow muP where the forward does. Raises InputError naming the field that is missing, is
    not what it should be, or asks for what no GPTConfig has.
    """
    kind = values.get("model_type")
    if kind not in ("gpt2", "btlm"):
        raise InputError(f"model_type: wanted gpt2 or btlm, got {kind!r}")
    _refuse_the_inexpressible(values)
    width, layers, heads, positions, vocabulary = (_size(values, name) for name in SIZES)
    plain = GPTConfig(
        n_layer=layers,
        n_head=heads,
        d_model=width,
        d_head=_divided(width, heads),
        d_ff=4 * width if values.get("n_inner") is None else _size(values, "n_inner"),
        vocab_size=vocabulary,
        seq_len=positions,
        activation=_activation(values, kind),
        layer_norm_eps=_number(values, "layer_norm_epsilon", 1e-5),
        positions="learned",
        softmax_scale=None if _flag(values, "scale_attn_weights", True) else 1.0,
    )
    return _btlm(values, plain) if kind == "btlm" else (plain, "sp")


def values_of(config: GPTConfig, dtype: str, eot: int) -> dict[str, Any]:
    """The config.json of a plain model, `dtype` of "fp32", "bf16", "fp16", with a vocabulary that ends in `eot`.

    Raises InputError naming what GPT-2's layout has no place for.
    """
    for name, known in EXPRESSIBLE.items():
        if (got := getattr(config, name)) not in known:
            wanted = " or ".join(str(value).lower() for value in known)
            raise InputError(f"{name}: wanted {wanted}, as GPT-2's layout has no other, got {str(got).lower()}")
    return {
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        "add_cross_attention": False,
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": eot,
        "dtype": DTYPES[dtype],
        "embd_pdrop": 0.0,
        "eos_token_id": eot,
        "initializer_range": config.hidden_init_std,
        "layer_norm_epsilon": config.layer_norm_eps,
        "model_type": "gpt2",
        "n_embd": config.d_model,
        "n_head": config.n_head,
        "n_inner": config.d_ff,
        "n_layer": config.n_layer,
        "n_positions": config.seq_len,
        "pad_token_id": None,
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def own_name(name: str) -> str | None:
    """A checkpoint's name of a tensor without the prefix; None for constants that older checkpoints hold beside the
    parameters."""
    name = name.removeprefix(PREFIX)
    return None if BUFFERS.fullmatch(name) else name


def sources_of(name: str, config: GPTConfig) -> tuple[str, ...]:
    """The checkpoint's tensors, side by side in the last dimension, that our parameter `name` is made of."""
    if config.activation == "swiglu" and ".mlp.c_fc." in name:
        return name.replace("c_fc", "c_fc2"), name
    return (name,)


def _refuse_the_inexpressible(values: Mapping[str, Any]) -> None:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "is_encoder_decoder"):
        if _flag(values, name, False):
            raise InputError(f"{name}: wanted false, got true, which no model here computes")
    for name in ("quantization_config", "pruned_heads", "alibi_scaling"):
        if values.get(name):
            raise InputError(f"{name}: wanted none, got {values[name]!r}")


def _size(values: Mapping[str, Any], name: str) -> int:
    other, default = SIZES.get(name, (name, None))
    value = values.get(name, values.get(other, default))
    if type(value) is not int or value < 1:
        raise InputError(f"{name}: wanted a positive whole number, got {value!r}")
    if name == "n_layer" and value > MOST_LAYERS:
        raise InputError(f"{name}: wanted at most {MOST_LAYERS}, got {value}")
    return value


def _divided(width: int, heads: int) -> int:
    if width % heads:
        raise InputError(f"n_head: wanted a divisor of n_embd, {width}, got {heads}")
    return width // heads


def _flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name}: wanted true or false, got {value!r}")
    return value


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{name}: wanted a positive number, got {value!r}")
    return float(value)


def _activation(values: Mapping[str, Any], kind: str) -> str:
    known = ACTIVATIONS | ({"swiglu": "swiglu"} if kind == "btlm" else {})
    name = values.get("activation_function", "gelu_new")
    if not isinstance(name, str) or name not in known:
        raise InputError(f"activation_function: wanted one of {', '.join(known)}, got {name!r}")
    return known[name]


def _btlm(values: Mapping[str, Any], plain: GPTConfig) -> tuple[GPTConfig, str]:
    """btlm's positions and factors. A config that has some of muP's but no width scale is the first release of the 111M
    one, which lacks it: it is the base's width over the model's, as in all others."""
    positions = values.get("position_embedding_type", "learned")
    if positions not in ("learned", "alibi"):
        raise InputError(f"position_embedding_type: wanted learned or alibi, got {positions!r}")
    mup = any(name in values for name in MUP)
    width_scale = _number(values, "mup_width_scale", CEREBRAS.config.d_model / plain.d_model if mup else 1.0)
    softmax_scale = plain.softmax_scale
    if softmax_scale is None and _flag(values, "mup_scale_qk_dot_by_d", False):
        softmax_scale = 1 / plain.d_head
    config = replace(
        plain,
        positions=positions,
        embedding_scale=_number(values, "mup_embeddings_scale", 1.0),
        softmax_scale=softmax_scale,
        logits_scale=_number(values, "mup_output_alpha", 1.0) * width_scale,
        hidden_lr_scale=width_scale,
    )
    return config, "sp" if replace(config, positions=plain.positions) == plain else "mup"
