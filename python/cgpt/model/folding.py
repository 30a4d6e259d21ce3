"""A model whose forward has factors, muP's or CompleteP's, as a plain tied GPT-2 with the same logits.

    wte, wpe <- e (wte, wpe)      c_attn's q columns <- a sqrt(K) q      c_proj <- r c_proj      ln_f <- (o / e) ln_f

e embedding_scale, a softmax_scale, r residual_scale, o logits_scale, K d_head; weights and biases alike. The tied head
reads the scaled wte, so ln_f gives e back. Exact but for rounding. With ln_emb the scaled tables go through it as the
scaled sum did. Source: the conversion that Cerebras-GPT's muP models were released through, there with the head untied.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from cgpt.model.config import GPTConfig

PLAIN = {
    "embedding_scale": 1.0,
    "softmax_scale": None,
    "residual_scale": 1.0,
    "logits_scale": 1.0,
    "embedding_lr_scale": 1.0,
    "hidden_lr_scale": 1.0,
    "vector_lr_scale": 1.0,
    "hidden_decay_scale": 1.0,
    "embedding_eps_scale": 1.0,
    "hidden_eps_scale": 1.0,
}


def fold(state: Mapping[str, Tensor], config: GPTConfig) -> tuple[dict[str, Tensor], GPTConfig]:
    """(state, config) of the plain model: `state` is a GPT's state_dict, in any float type, and is not written to.

    Tensors that no factor touches are the ones given.
    """
    return {name: fold_tensor(name, value, config) for name, value in state.items()}, folded(config)


def folded(config: GPTConfig) -> GPTConfig:
    """The plain model's config: its factors are 1, those of the optimizer too, which fitted weights of another size."""
    return replace(config, **PLAIN)


def fold_tensor(name: str, value: Tensor, config: GPTConfig) -> Tensor:
    """The plain model's parameter `name` from that of a model of this config; `value` itself where no factor touches
    it."""
    if name in ("wte.weight", "wpe.weight"):
        return _times(value, config.embedding_scale)
    if name.startswith("ln_f."):
        return _times(value, config.logits_scale / config.embedding_scale)
    if ".c_attn." in name:
        return _times(value, config.attention_scale / config.d_head**-0.5, config.d_model)
    if ".c_proj." in name:
        return _times(value, config.residual_scale)
    return value


def _times(value: Tensor, factor: float, columns: int | None = None) -> Tensor:
    """The first `columns` of the last dimension times `factor`, the others as they are."""
    if factor == 1.0:
        return value
    value = value.clone()
    value[..., :columns] *= factor
    return value
