"""Hugging Face's GPT-2 and Llama, taken apart for `Streamed`: an embedding, blocks, and a head that gives the loss.

    trainer = Streamed(*parts(model), precision="bf16", device="cuda", placement=...)

The parts hold the model's own modules, so the model's code does the arithmetic; only the loss is ours, which never has
the logits of all tokens in memory. Sequences are full: no padding, positions from 0, attention causal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cgpt.errors import InputError
from cgpt_ext import cross_entropy

KNOWN = ("GPT2LMHeadModel", "LlamaForCausalLM")


def parts(model: nn.Module) -> tuple[nn.Module, list[nn.Module], nn.Module]:
    """(embed, blocks, head) of a transformers GPT2LMHeadModel or LlamaForCausalLM, on the meta device or not.

    The head takes (activations, targets): targets are the token that follows each, shifted by the caller; -100 has no
    part in the loss. Raises InputError for other models and for options that a list of blocks cannot follow.
    """
    kind = next((base.__name__ for base in type(model).__mro__ if base.__name__ in KNOWN), None)
    if kind is None:
        raise InputError(f"huggingface.parts: model must be one of {', '.join(KNOWN)}, got {type(model).__name__}")
    config = model.config
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise InputError("huggingface.parts: gradient checkpointing must be off, the placement says what to recompute")
    attention = getattr(config, "_attn_implementation", "eager") or "eager"
    if attention not in ("eager", "sdpa"):
        raise InputError(f"huggingface.parts: attn_implementation must be eager or sdpa, got {attention}")
    if kind == "GPT2LMHeadModel":
        if config.add_cross_attention:
            raise InputError("huggingface.parts: GPT-2 must have no cross-attention, got add_cross_attention=True")
        body = model.transformer
        blocks = [_Block(block, attention) for block in body.h]
        return _Gpt2Embed(body), blocks, _Head(body.ln_f, model.lm_head)
    body = model.model
    if getattr(body.rotary_emb, "rope_type", "default") in ("dynamic", "longrope"):
        raise InputError(
            f"huggingface.parts: rotary frequencies must not depend on the length, got {body.rotary_emb.rope_type}"
        )
    if any(buffer.is_meta for buffer in body.rotary_emb.buffers()):  # no checkpoint has them
        with torch.device("cpu"):
            body.rotary_emb = type(body.rotary_emb)(config=config)
    blocks = [_Block(block, attention, body.rotary_emb) for block in body.layers]
    return _Embed(body.embed_tokens), blocks, _Head(body.norm, model.lm_head)


def names(model: nn.Module, trainer) -> dict[str, str]:
    """Trainer's name of each parameter -> the model's, as in its state_dict and its safetensors files."""
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: own[id(p)] for layer in trainer.store.layers for name, p in layer.parameters.items()}


class _Embed(nn.Module):
    def __init__(self, tokens: nn.Module):
        super().__init__()
        self.tokens = tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids)


class _Gpt2Embed(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.wte, self.wpe, self.drop = body.wte, body.wpe, body.drop

    def forward(self, ids: Tensor) -> Tensor:
        return self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device)[None]))


class _Block(nn.Module):
    def __init__(self, block: nn.Module, attention: str, rotary: nn.Module | None = None):
        super().__init__()
        self.block, self.attention, self.rotary = block, attention, rotary

    def forward(self, x: Tensor) -> Tensor:
        mask = None  # of which sdpa makes its causal kernel
        if self.attention == "eager":
            time = x.shape[1]
            mask = x.new_full((1, 1, time, time), torch.finfo(x.dtype).min).triu(1)
        options = {"attention_mask": mask, "use_cache": False}
        if self.rotary is not None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
            options |= {"position_ids": positions, "position_embeddings": self.rotary(x, positions)}
        y = self.block(x, **options)
        return y[0] if isinstance(y, tuple) else y  # a tuple before transformers 5


class _Head(nn.Module):
    def __init__(self, norm: nn.Module, projection: nn.Linear):
        super().__init__()
        self.norm, self.projection = norm, projection

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.norm(x), self.projection.weight, targets)
