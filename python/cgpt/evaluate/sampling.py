"""The next token from logits, by a counter-based uniform.

    p = softmax(logits / temperature), cut to the top_k largest, then to the fewest that hold top_p of the mass
    token = inverse CDF of p at u(seed, sample, position), tokens ordered by falling probability

A draw depends on (seed, sample, position) and the context alone, so a generation can be cut and continued anywhere, and
a prompt gets among others what it gets alone. top_p: Holtzman et al. 2020 (arXiv 1904.09751).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.model.init import counter_rng

HEAD = 256  # tokens that are put in order at first: they mostly hold the draw, and all 50257 take 20 times as long


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn: temperature 0 takes the most probable (the lowest id among equals), top_k 0 and top_p 1 cut
    nothing. Raises InputError for values outside their range."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"generate: temperature must be finite and not negative, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"generate: top_k must not be negative (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"generate: top_p must be in (0, 1], got {self.top_p}")

    def token(self, logits: Tensor, position: int, sample: int = 0) -> int:
        """The token at `position` of the prompt's `sample`-th continuation, of logits (V,) fp64. Raises InputError
        where they are not finite."""
        if not torch.isfinite(logits.sum()):  # of fp64, in which finite fp32 numbers do not add up to infinity
            raise InputError(f"generate: the model's logits at position {position} must be finite, got NaN or Inf")
        if self.temperature == 0:
            return int(logits.argmax())
        label = f"token {position}" if sample == 0 else f"sample {sample} token {position}"
        uniform = counter_rng(self.seed, label).random()
        return sample_token(logits, uniform, self.temperature, self.top_k, self.top_p)


def sample_token(logits: Tensor, uniform: float, temperature: float, top_k: int = 0, top_p: float = 1.0) -> int:
    """The token of `logits` (V,) fp64 at `uniform` in [0, 1) of the cut distribution's CDF."""
    count = min(top_k or HEAD, len(logits))
    while True:
        ranked, tokens = _largest(logits, count)
        mass = ((ranked - ranked[0]) / temperature).exp().cumsum(0)
        whole = mass[-1]
        if not top_k and count < len(logits):
            whole = ((logits - ranked[0]) / temperature).exp().sum()
        kept = count
        if top_p < 1:
            kept = min(int(torch.searchsorted(mass, top_p * whole)) + 1, count)
            cut_inside = bool(mass[-1] >= top_p * whole)
        else:
            cut_inside = bool(mass[-1] > uniform * whole)
        if top_k or count == len(logits) or cut_inside:
            break
        count = min(16 * count, len(logits))
    held = mass[kept - 1] if top_p < 1 else whole
    rank = int(torch.searchsorted(mass[:kept], uniform * held, right=True))
    return int(tokens[min(rank, kept - 1)])


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest and their tokens, falling, the lower token first among equals: the head of a stable sort."""
    if count < len(logits):
        least = logits.topk(count, sorted=False).values.min()
        tokens = (logits >= least).nonzero()[:, 0]
    else:
        tokens = torch.arange(len(logits))
    ranked, order = torch.sort(logits[tokens], descending=True, stable=True)
    return ranked[:count], tokens[order[:count]]
