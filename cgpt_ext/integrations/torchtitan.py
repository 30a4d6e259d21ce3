"""torchtitan's overrides: our packed attention in place of its VarlenAttention, our AdamW in place of torch's.

    torchrun ... -m torchtitan.train --module llama3 --config llama3_debugmodel_varlen_attn \\
        --override.imports cgpt_ext.integrations.torchtitan.attention cgpt_ext.integrations.torchtitan.adamw

Attention takes the model's documents as torchtitan packs them, grouped heads, sliding windows, and runs in the dtype
that it is given, where torchtitan's own casts to bf16. It has no log-sum-exp to hand out, so models that end attention
with an `out_transform` (sinks) raise ValueError. The optimizer's states are fp32: `implementation` may be anything but
fused_opt_states_bf16. Its checkpoints are torch's, key for key. LLaMA's RMSNorm and SwiGLU stay torchtitan's; its SPMD
type checking (a debug option) knows no attention but its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import derive, override
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata

from cgpt_ext.ops.attention import attention_varlen
from cgpt_ext.optim import AdamW


class Attention(VarlenAttention):
    """`cgpt_ext.attention_varlen` behind VarlenAttention's arguments."""

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        pass

    def __init__(self, config: Config):
        super(VarlenAttention, self).__init__()  # its own activates a flash-attention that nobody calls here
        self.window_size = config.window_size

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        out_transform: Callable | None = None,
        **_,
    ) -> Tensor:
        """q (B, L, H, D), k and v (B, L, Hkv, D) -> (B, L, H, D); torchtitan shards them by these names.

        Raises TypeError where attention_masks is no VarlenMetadata, ValueError where there is an out_transform.
        """
        if not isinstance(attention_masks, VarlenMetadata):
            got = type(attention_masks).__name__
            raise TypeError(f"torchtitan: attention_masks must be VarlenMetadata, got {got}")
        if out_transform is not None:
            raise ValueError(f"torchtitan: out_transform must be None, got {out_transform}")
        masks = attention_masks
        packed = (x.flatten(0, 1) for x in (q_BLNH, k_BLNH, v_BLNH))
        out = attention_varlen(
            *packed, masks.cu_seq_q, masks.cu_seq_k, masks.max_q, masks.max_k,
            softmax_scale=scale, window_size=tuple(self.window_size),
        )  # fmt: skip
        return out.unflatten(0, q_BLNH.shape[:2])


class Optimizers(OptimizersContainer):
    """torchtitan's container, whose "AdamW" is ours."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable:
        return AdamW if name == "AdamW" else OptimizersContainer._resolve_optimizer_factory(name)


@override(target=VarlenAttention.Config, description="attention of cgpt-ext")
def attention(config: VarlenAttention.Config) -> Attention.Config:
    return derive(config, Attention.Config)


@override(target=OptimizersContainer.Config, description="AdamW of cgpt-ext")
def adamw(config: OptimizersContainer.Config) -> Optimizers.Config:
    return derive(config, Optimizers.Config)
