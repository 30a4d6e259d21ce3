"""Training FLOPs per token, forward and backward together.

    published convention    6·L·(4d² + m·d·f) + 24·L·s·d + 10·V·d + 9·h·s·L   weights, attention, vocabulary, softmax
    matrix products done    6·(L·(4d² + m·d·f) + V·d) + 6·L·s·d               what a causal kernel really has to do
    rule of thumb           6·N                                               Kaplan et al. 2020

m is the number of the MLP's matrices, 3 where it is gated (SwiGLU) and else 2; with two of f = 4d the first begins
72·L·d². The first is the convention behind the FLOPs that the Cerebras-GPT paper prints (arXiv 2304.03208, appendix F):
it counts attention uncausally and twice over and the embedding as a product, and reproduces 17 of 18 published figures
to two significant digits. Compare models and fit laws with it. The second is for what a machine achieves: FLOP/s in a
training log come from it, so that no time is credited to work that nobody did.
"""

from dataclasses import asdict, dataclass
from typing import Protocol

PF_DAY = 8.64e19  # FLOPs of one PFLOP/s for a day, Kaplan's unit of compute
GATED = ("swiglu",)  # activations of two matrices in and one out


class Shape(Protocol):
    """The numbers needed; `cgpt.model.config.GPTConfig` has them."""

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    vocab_size: int
    seq_len: int
    activation: str

    @property
    def n_params(self) -> int: ...


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward FLOPs per token by part, published convention; plain integers.

    projections: attention's four. mlp: all of it. attention: scores and weighted sums. six_n: the rule of thumb, for
    comparison.
    """

    projections: int
    mlp: int
    attention: int
    vocabulary: int
    softmax: int
    six_n: int

    @property
    def total(self) -> int:
        """The sum of the five parts."""
        return self.projections + self.mlp + self.attention + self.vocabulary + self.softmax

    @property
    def forward(self) -> float:
        """FLOPs of a token that is only read or written: a third, since backward does each product twice."""
        return self.total / 3

    def to_dict(self) -> dict[str, int]:
        """Parts, `six_n` and `total`; JSON values."""
        return {**asdict(self), "total": self.total}


def flops_per_token(shape: Shape) -> FlopsPerToken:
    """The published convention, by part. An MLP of another width than 4d counts by its own width."""
    layers, d = shape.n_layer, shape.d_model
    return FlopsPerToken(
        projections=24 * layers * d * d,
        mlp=6 * layers * _mlp_weights(shape),
        attention=24 * layers * shape.seq_len * d,
        vocabulary=10 * shape.vocab_size * d,
        softmax=9 * shape.n_head * shape.seq_len * layers,
        six_n=6 * shape.n_params,
    )


def matmul_flops_per_token(shape: Shape, seq_len: int | None = None) -> int:
    """FLOPs of the matrix products of one training token, attention at its causal half.

    seq_len: length of the sequences trained on, where shorter than the model's. Recomputation is not counted.
    """
    layers, d = shape.n_layer, shape.d_model
    weights = layers * (4 * d * d + _mlp_weights(shape)) + shape.vocab_size * d
    return 6 * weights + 6 * layers * (seq_len or shape.seq_len) * d


def six_n(n_params: float) -> float:
    """6·N, the rule of thumb for one token's forward and backward (Kaplan et al. 2020, section 2.1)."""
    return 6 * n_params


def _mlp_weights(shape: Shape) -> int:
    matrices = 3 if shape.activation in GATED else 2
    return matrices * shape.d_model * shape.d_ff
