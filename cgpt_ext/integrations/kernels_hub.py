"""These kernels as a repository of Hugging Face's `kernels` package, without a hub: `kernelize` puts them into a model.

    from kernels import Mode, kernelize, use_kernel_mapping
    from cgpt_ext.integrations.kernels_hub import kernel_mapping, mark_layers

    mark_layers()                                  # transformers does not mark GPT2MLP and LlamaMLP itself
    with use_kernel_mapping(kernel_mapping()):
        model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

A layer here is a forward for the module it is put into; where that module's parts or activation do not fit, it runs
the module's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt_ext.integrations.transformers_patch import gpt2_mlp, llama_mlp
from cgpt_ext.ops.layer_norm import layer_norm

DEVICES = ("cpu", "cuda")


class GPT2MLP(torch.nn.Module):
    """For transformers' GPT2MLP: (..., d_model) -> (..., d_model), the two projections and GELU in one op."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        fused = gpt2_mlp(self, hidden_states)
        return type(self).forward(self, hidden_states) if fused is None else fused


class LlamaMLP(torch.nn.Module):
    """For transformers' LlamaMLP: SwiGLU in one op where there are at least hidden_size tokens."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        fused = llama_mlp(self, x)
        return type(self).forward(self, x) if fused is None else fused


class LayerNorm(torch.nn.Module):
    """For torch.nn.LayerNorm over one dimension with a weight."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1 or self.weight is None or input.dtype == torch.float64:
            return type(self).forward(self, input)
        return layer_norm(input, self.weight, self.bias, self.eps)


LAYERS = {"GPT2MLP": GPT2MLP, "LlamaMLP": LlamaMLP, "LayerNorm": LayerNorm}


@dataclass(frozen=True)
class Repository:
    """One layer of LAYERS, as `kernels` wants to be given it: by `load()`, and comparable.

    Raises ValueError where there is no such layer.
    """

    layer_name: str

    def __post_init__(self):
        if self.layer_name not in LAYERS:
            raise ValueError(f"Repository: layer_name must be {' or '.join(LAYERS)}, got {self.layer_name}")

    def load(self) -> type[torch.nn.Module]:
        return LAYERS[self.layer_name]


def kernel_mapping() -> dict[str, dict[str, Repository]]:
    """Every layer on every device, for `kernels.use_kernel_mapping` or `register_kernel_mapping`."""
    return {name: dict.fromkeys(DEVICES, Repository(name)) for name in LAYERS}


def mark_layers() -> None:
    """Gives transformers' GPT2MLP and LlamaMLP the names that `kernel_mapping` serves, by which `kernelize` finds them.

    torch.nn.LayerNorm is not marked, being everybody's: `replace_kernel_forward_from_hub(torch.nn.LayerNorm,
    "LayerNorm")` does it.
    """
    from kernels import replace_kernel_forward_from_hub
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    for module in (GPT2MLP, LlamaMLP):
        replace_kernel_forward_from_hub(module, module.__name__)
