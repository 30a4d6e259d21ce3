"""A GPT of plain torch modules, the same of ours, a corpus that can be learnt, and a count of our kernels' calls."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cgpt_ext import _native
from cgpt_ext import nn as ours

VOCAB, TIME, WIDTH, HEADS, LAYERS = 37, 16, 32, 2, 2

# native function -> the part of a trainer that it serves
KERNELS = {
    "attention_fwd": "attention",
    "gelu_mlp_fwd": "gelu_mlp",  # of a few rows
    "gelu_mlp_linear_fwd": "gelu_mlp",
    "layer_norm_fwd": "layer_norm",
    "adamw": "adamw",
}


@contextmanager
def counted():
    """Counts the calls of each kernel of KERNELS."""
    calls, kept = Counter(), {name: getattr(_native, name) for name in KERNELS}

    def counting(part, kernel):
        def call(*arguments):
            calls[part] += 1
            return kernel(*arguments)

        return call

    for name, part in KERNELS.items():
        setattr(_native, name, counting(part, kept[name]))
    try:
        yield calls
    finally:
        for name, kernel in kept.items():
            setattr(_native, name, kernel)


class Attention(nn.Module):
    """What `cgpt_ext.nn.CausalSelfAttention` computes, with its parameters' names."""

    def __init__(self, d_model: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """What `cgpt_ext.nn.GeluMLP` computes, with its parameters' names."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class GPT(nn.Module):
    """(B, T) tokens -> (B, T, V) logits."""

    def __init__(self, mine: bool):
        super().__init__()
        norm = ours.LayerNorm if mine else nn.LayerNorm
        attention, mlp = (ours.CausalSelfAttention, ours.GeluMLP) if mine else (Attention, MLP)
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(TIME, WIDTH)
        self.h = nn.ModuleList(
            nn.ModuleList([norm(WIDTH), attention(WIDTH, HEADS), norm(WIDTH), mlp(WIDTH, 4 * WIDTH)])
            for _ in range(LAYERS)
        )
        self.ln_f = norm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for ln_1, attention, ln_2, mlp in self.h:
            x = x + attention(ln_1(x))
            x = x + mlp(ln_2(x))
        return F.linear(self.ln_f(x), self.wte.weight)


def gpt(mine: bool) -> GPT:
    """The same weights, whoever computes with them."""
    torch.manual_seed(5)
    reference = GPT(False)
    nn.init.normal_(reference.wte.weight, std=0.1)
    model = GPT(mine)
    model.load_state_dict(reference.state_dict())
    return model


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def batches(count: int, size: int = 4) -> list[Tensor]:
    """(size, TIME + 1) tokens: sequences that step by 3, from anywhere, with one token in eight at random."""
    draw = torch.Generator().manual_seed(11)
    made = []
    for _ in range(count):
        start = torch.randint(VOCAB, (size, 1), generator=draw)
        ids = (start + 3 * torch.arange(TIME + 1)) % VOCAB
        noise = torch.randint(VOCAB, ids.shape, generator=draw)
        made.append(torch.where(torch.rand(ids.shape, generator=draw) < 0.125, noise, ids))
    return made
