"""Layers that have nothing to do with GPT, and the same network as one plain torch module: what the walk must equal."""

import torch
import torch.nn.functional as F
from torch import nn

from cgpt.stream.store import Layer

VOCAB, WIDTH, DEPTH = 37, 24, 3


class Plain(nn.Module):
    """Embedding, tanh blocks with LayerNorm, and a head tied to the embedding."""

    def __init__(self, seed: int = 0, width: int = WIDTH):
        super().__init__()
        torch.manual_seed(seed)
        self.wte = nn.Embedding(VOCAB, width)
        self.h = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(DEPTH))
        self.ln_f = nn.LayerNorm(width)

    def block(self, i, x):
        return x + torch.tanh(self.h[i](x))

    def head(self, x, targets):
        return F.cross_entropy((self.ln_f(x) @ self.wte.weight.t()).flatten(0, 1).float(), targets.flatten())

    def forward(self, ids, targets):
        x = self.wte(ids)
        for i in range(DEPTH):
            x = self.block(i, x)
        logits = (self.ln_f(x) @ self.wte.weight.t()).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten())


def layers(model: Plain) -> list[Layer]:
    own = dict(model.named_parameters())

    def reads(*prefixes):
        return {name: parameter for name, parameter in own.items() if name.startswith(prefixes)}

    blocks = [Layer(f"h.{i}", lambda x, i=i: model.block(i, x), reads(f"h.{i}.")) for i in range(DEPTH)]
    return [Layer("embed", model.wte, reads("wte.")), *blocks, Layer("head", model.head, reads("ln_f.", "wte."))]


def batches(sizes, time=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.randint(VOCAB, (2, size, time), generator=generator) for size in sizes]
    return [(pair[0], pair[1]) for pair in pairs]
