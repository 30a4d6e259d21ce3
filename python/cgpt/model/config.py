"""The shape of a GPT as one frozen dataclass of numbers; imports no torch.

    parameters = V·d + s·d + L·(4d² + 2d·f + f + 9d) + 2d        with f = 4d: V·d + s·d + L·(12d² + 13d) + 2d

V vocab_size, s seq_len, L n_layer, d d_model, f d_ff. Tied embeddings, so the head adds nothing.
Source: Dey et al. 2023, Cerebras-GPT (arXiv 2304.03208), and its released configurations.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from cgpt.errors import InputError

ACTIVATIONS = ("gelu", "gelu_tanh")


@dataclass(frozen=True)
class GPTConfig:
    """A decoder-only transformer: learned positions, pre-LayerNorm, tied head, biases everywhere but the
    head.

    Whatever varies between models is a number here, so that the model's code asks no question about its kind.

    n_layer, n_head, d_model, d_head, d_ff: blocks, heads, widths of the stream, of one head and of the MLP.
    vocab_size, seq_len: rows of the token and of the position table.
    activation: "gelu" (erf, what the published models use) or "gelu_tanh" (GPT-2's own).
    layer_norm_eps: added to the variance in every LayerNorm.
    embedding_init_std, hidden_init_std, residual_init_std: of the normal, before truncation at two sigma,
    that the
        tables, the projections, and the two projections into the residual stream are drawn from; None for the
        last means hidden_init_std / sqrt(2 n_layer).

    Raises InputError where the numbers do not make a model.
    """

    n_layer: int
    n_head: int
    d_model: int
    d_head: int
    d_ff: int
    vocab_size: int
    seq_len: int
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5
    embedding_init_std: float = 0.02
    hidden_init_std: float = 0.02
    residual_init_std: float | None = None

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "d_model", "d_head", "d_ff", "vocab_size", "seq_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"GPTConfig: {name} must be a positive integer, got {value!r}")
        if self.n_head * self.d_head != self.d_model:
            raise InputError(
                f"GPTConfig: n_head x d_head must be d_model = {self.d_model}, "
                f"got {self.n_head} x {self.d_head} = {self.n_head * self.d_head}"
            )
        if self.d_head % 8 or self.d_head > 256:
            raise InputError(f"GPTConfig: d_head must be a multiple of 8 up to 256, got {self.d_head}")
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"GPTConfig: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        for name in ("layer_norm_eps", "embedding_init_std", "hidden_init_std", "residual_init_std"):
            value = getattr(self, name)
            if value is None and name == "residual_init_std":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise InputError(f"GPTConfig: {name} must be a positive number, got {value!r}")

    @property
    def residual_std(self) -> float:
        """Init std of attn.c_proj and mlp.c_proj: 2 n_layer of them add up in the residual stream (Radford
        2019)."""
        if self.residual_init_std is not None:
            return self.residual_init_std
        return self.hidden_init_std / math.sqrt(2 * self.n_layer)

    @property
    def n_params(self) -> int:
        """Exact number of parameters; the tied head counts once."""
        return sum(self.param_breakdown().values())

    def param_breakdown(self) -> dict[str, int]:
        """Parameters by kind; the values add up to `n_params`."""
        d = self.d_model
        return {
            "token_embedding": self.vocab_size * d,
            "position_embedding": self.seq_len * d,
            "attention": self.n_layer * (4 * d * d + 4 * d),
            "mlp": self.n_layer * (2 * d * self.d_ff + self.d_ff + d),
            "layer_norm": (2 * self.n_layer + 1) * 2 * d,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives back an equal config."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GPTConfig":
        """The inverse of `to_dict`. Raises InputError for missing and unknown fields."""
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        for problem, names in (("lacks", required - set(values)), ("has unknown", set(values) - known)):
            if names:
                raise InputError(f"GPTConfig: the dictionary {problem} {', '.join(sorted(names))}")
        return cls(**values)
