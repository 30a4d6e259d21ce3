"""Initial weights: every value a pure function of (seed, parameter name, position), so creation order is
free.

    w = sigma · sqrt(2) · erfinv(u · erf(sqrt(2))),   u uniform in [-1, 1)     normal, truncated at two sigma

Biases are 0, LayerNorm weights 1; sigma per parameter comes from the config. Truncation leaves 0.8796 sigma
as the standard deviation, as in torch's trunc_normal_ and in the published models. The uniforms are
Philox4x64 (Salmon et al. 2011) keyed by a hash of seed and name: a layer can be initialised alone, on any
rank, with the same bits.
"""

import hashlib
import math

import numpy as np
import torch

from cgpt.model.config import GPTConfig

_CHUNK = 1 << 22  # values drawn at once: 16 MiB of scratch, however large the parameter


def counter_rng(seed: int, label: str) -> np.random.Generator:
    """A generator that depends on (seed, label) alone: its Philox key is their 128-bit BLAKE2b hash."""
    digest = hashlib.blake2b(f"{seed}/{label}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def init_std(name: str, config: GPTConfig) -> float:
    """Sigma of the matrix or table `name` (HF GPT-2 names), before truncation."""
    if name in ("wte.weight", "wpe.weight"):
        return config.embedding_init_std
    if name.endswith("c_proj.weight"):
        return config.residual_std
    return config.hidden_init_std


@torch.no_grad()
def init_parameter(name: str, tensor: torch.Tensor, config: GPTConfig, seed: int) -> None:
    """Fill `tensor`, of any floating dtype on any device, with the initial values of parameter `name`.

    Values are made in fp32 on the CPU, then rounded to the tensor's dtype: bf16 weights are the rounded fp32
    ones.
    """
    if name.endswith(".bias"):
        tensor.zero_()
    elif tensor.dim() == 1:
        tensor.fill_(1.0)
    else:
        _truncated_normal(tensor, init_std(name, config), counter_rng(seed, name))


def _truncated_normal(tensor: torch.Tensor, std: float, rng: np.random.Generator) -> None:
    flat = tensor.view(-1)
    bound = math.erf(math.sqrt(2.0))
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        values = torch.from_numpy(rng.random(part.numel(), dtype=np.float32))
        values.mul_(2 * bound).sub_(bound).erfinv_().mul_(std * math.sqrt(2.0))
        part.copy_(values.clamp_(-2 * std, 2 * std))
