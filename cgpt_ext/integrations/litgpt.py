"""LitGPT's commands with our attention, GELU-MLP and LayerNorm; our AdamW needs no more than its name.

    python -m cgpt_ext.integrations.litgpt pretrain pythia-160m --optimizer cgpt_ext.optim.AdamW ...

is `litgpt pretrain ...` with these parts; scripts of one's own call `apply_cgpt_kernels_to_litgpt()` before they build
a model. Parameters keep their names. Stays LitGPT's own: attention under a mask of its making (generation, sliding
windows), logit softcapping and heads that are no multiple of 8 up to 256; multi-head latent attention; SwiGLU, whose
two projections ours has in one; RMSNorm; layers of LoRA, adapters and bitsandbytes.
"""

import sys

from torch import Tensor, nn

from cgpt_ext.nn import LayerNorm
from cgpt_ext.ops.attention import attention as attend
from cgpt_ext.ops.gelu_mlp import gelu_mlp

ACTIVATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


def apply_cgpt_kernels_to_litgpt(attention: bool = True, mlp: bool = True, layer_norm: bool = True) -> None:
    """Gives LitGPT's classes forwards of our ops. Models built before keep torch's LayerNorm; the rest changes too.

    Raises ImportError where LitGPT is not installed.
    """
    import litgpt.config
    import litgpt.model

    if attention:
        _patch(litgpt.model.CausalSelfAttention, "scaled_dot_product_attention", _attention)
    if mlp:
        _patch(litgpt.model.GptNeoxMLP, "forward", _mlp)
    if layer_norm:
        _patch(litgpt.config.Config, "norm_class", _norm_class)


def _patch(kind: type, name: str, ours) -> None:
    """Once: `ours` makes the new method or property from theirs."""
    found = kind.__dict__[name]
    theirs = found.fget if isinstance(found, property) else found
    if not hasattr(theirs, "theirs"):
        method = ours(theirs)
        method.theirs = theirs
        setattr(kind, name, property(method) if isinstance(found, property) else method)


def _attention(theirs):
    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q, k, v (B, H, T, D) -> (B, T, H, D)."""
        config, width = self.config, q.shape[-1]
        served = width % 8 == 0 and width <= 256 and q.shape[2] == k.shape[2]
        if mask is not None or config.attention_logit_softcapping is not None or not served:
            return theirs(self, q, k, v, mask)
        scale = (config.attention_scores_scalar or config.head_size) ** -0.5 * self.mscale**2
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True, softmax_scale=scale)

    return scaled_dot_product_attention


def _mlp(theirs):
    def forward(self, x: Tensor) -> Tensor:
        if type(self.fc) is not nn.Linear or type(self.proj) is not nn.Linear:
            return theirs(self, x)
        activation = ACTIVATIONS[self.config.gelu_approximate]
        return gelu_mlp(x, self.fc.weight, self.fc.bias, self.proj.weight, self.proj.bias, activation)

    return forward


def _norm_class(theirs):
    def norm_class(self) -> type:
        found = theirs(self)
        return LayerNorm if found is nn.LayerNorm else found

    return norm_class


def main() -> None:
    """LitGPT's command line, after `apply_cgpt_kernels_to_litgpt()`."""
    try:
        from litgpt.__main__ import main as litgpt_main
    except ImportError as error:
        sys.exit(f"litgpt: wanted LitGPT installed (pip install litgpt), got {error}")
    apply_cgpt_kernels_to_litgpt()
    litgpt_main()


if __name__ == "__main__":
    main()
