"""Training FLOPs per token, forward and backward together.

    published convention    72·L·d² + 24·L·s·d + 10·V·d + 9·h·s·L     weights, attention, vocabulary, softmax
    matrix products done    6·(L·(4d² + 2d·f) + V·d) + 6·L·s·d        what a causal kernel really has to do
    rule of thumb           6·N                                       Kaplan et al. 2020

The first is the convention behind the FLOPs that the Cerebras-GPT paper prints (arXiv 2304.03208, appendix
F): it counts attention uncausally and twice over and the embedding as a product, and reproduces 17 of 18
published figures to two significant digits. Compare models and fit laws with it. The second is for what a
machine achieves: FLOP/s in a training log come from it, so that no time is credited to work that nobody did.
"""

from dataclasses import dataclass
from typing import Protocol


class Shape(Protocol):
    """The numbers needed; `cgpt.model.config.GPTConfig` has them."""

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    vocab_size: int
    seq_len: int


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward FLOPs per token by kind, published convention; plain integers."""

    projections: int
    attention: int
    vocabulary: int
    softmax: int

    @property
    def total(self) -> int:
        """The sum of the four kinds."""
        return self.projections + self.attention + self.vocabulary + self.softmax


def flops_per_token(shape: Shape) -> FlopsPerToken:
    """The published convention, by kind. An MLP of another width than 4d counts by its own width."""
    layers, d = shape.n_layer, shape.d_model
    return FlopsPerToken(
        projections=6 * layers * (4 * d * d + 2 * d * shape.d_ff),
        attention=24 * layers * shape.seq_len * d,
        vocabulary=10 * shape.vocab_size * d,
        softmax=9 * shape.n_head * shape.seq_len * layers,
    )


def matmul_flops_per_token(shape: Shape, seq_len: int | None = None) -> int:
    """FLOPs of the matrix products of one training token, attention at its causal half.

    seq_len: length of the sequences trained on, where shorter than the model's. Recomputation is not counted.
    """
    layers, d = shape.n_layer, shape.d_model
    weights = layers * (4 * d * d + 2 * d * shape.d_ff) + shape.vocab_size * d
    return 6 * weights + 6 * layers * (seq_len or shape.seq_len) * d


def six_n(n_params: int) -> int:
    """6·N, the rule of thumb for one token's forward and backward (Kaplan et al. 2020, section 2.1)."""
    return 6 * n_params
