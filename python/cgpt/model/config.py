"""A GPT as one frozen dataclass of numbers; imports no torch.

    parameters = V·d + s·d + L·(4d² + 2d·f + f + 9d) + 2d        with f = 4d: V·d + s·d + L·(12d² + 13d) + 2d

V vocab_size, s seq_len, L n_layer, d d_model, f d_ff. Tied embeddings, so the head adds nothing. Without learned
positions s·d falls away, a gated MLP has d·f + f more a layer, an embedding norm 2d more.
Sources: Dey et al. 2023, Cerebras-GPT (arXiv 2304.03208), and its released configurations; Le Scao et al. 2022 (arXiv
2210.15424) for what varies beside them.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from cgpt.errors import InputError

ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
POSITIONS = ("learned", "none", "rotary", "alibi")

_SIZES = ("n_layer", "n_head", "d_model", "d_head", "d_ff", "vocab_size", "seq_len")


@dataclass(frozen=True)
class GPTConfig:
    """A decoder-only transformer: pre-LayerNorm, tied head, biases everywhere but the head.

    Whatever varies between models is a number here, so that the model's code asks no question about its kind.

    n_layer, n_head, d_model, d_head, d_ff: blocks, heads, widths of the stream, of one head and of the MLP.
    vocab_size, seq_len: rows of the token table; the longest sequence, and rows of the position table.
    activation: "gelu" (erf, what the published models use), "gelu_tanh" (GPT-2's own), or "swiglu", whose gate has
        another d_ff columns of c_fc.
    layer_norm_eps: added to the variance in every LayerNorm.
    embedding_init_std, hidden_init_std, residual_init_std: of the normal, before truncation at two sigma, that the
        tables, the projections, and the two projections into the residual stream are drawn from; None for the last
        means hidden_init_std / sqrt(2 n_layer).
    positions: how tokens know their place: "learned" (a table), "none", "rotary" or "alibi" (cgpt.model.position).
    embedding_norm: a LayerNorm, `ln_emb`, behind the embedding.
    embedding_scale, softmax_scale, residual_scale, logits_scale: factors on the embeddings' sum, on the attention
        scores (None: d_head^-0.5), on what attention and MLP add to the stream, and on the logits.
    embedding_lr_scale, hidden_lr_scale, vector_lr_scale: of the learning rate, for the tables, the projections, and
        biases and norms; see `lr_scale`.
    hidden_decay_scale: of the weight decay, for the projections; see `decay_scale`.
    embedding_eps_scale, hidden_eps_scale: of AdamW's eps, outside the blocks and in them; see `eps_scale`.

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
    positions: str = "learned"
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    softmax_scale: float | None = None
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    embedding_lr_scale: float = 1.0
    hidden_lr_scale: float = 1.0
    vector_lr_scale: float = 1.0
    hidden_decay_scale: float = 1.0
    embedding_eps_scale: float = 1.0
    hidden_eps_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in _SIZES:
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
        for name, known in (("activation", ACTIVATIONS), ("positions", POSITIONS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"GPTConfig: {name} must be one of {', '.join(known)}, got {value!r}")
        if not isinstance(self.embedding_norm, bool):
            raise InputError(f"GPTConfig: embedding_norm must be true or false, got {self.embedding_norm!r}")
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name in (*_SIZES, "activation", "positions", "embedding_norm"):
                continue
            if value is None and name in ("residual_init_std", "softmax_scale"):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise InputError(f"GPTConfig: {name} must be a positive number, got {value!r}")

    @property
    def residual_std(self) -> float:
        """Init std of attn.c_proj and mlp.c_proj: 2 n_layer of them add up in the residual stream (Radford 2019)."""
        if self.residual_init_std is not None:
            return self.residual_init_std
        return self.hidden_init_std / math.sqrt(2 * self.n_layer)

    @property
    def attention_scale(self) -> float:
        """The factor on the attention scores."""
        return self.d_head**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def position_rows(self) -> int:
        """Rows of the position table `wpe`; 0 where there is none."""
        return self.seq_len if self.positions == "learned" else 0

    @property
    def d_fc(self) -> int:
        """Columns of mlp.c_fc: d_ff, and as many before them for the gate where there is one."""
        return 2 * self.d_ff if self.activation == "swiglu" else self.d_ff

    def lr_scale(self, name: str) -> float:
        """What the learning rate of parameter `name` (HF GPT-2's names) is multiplied by."""
        return {
            "table": self.embedding_lr_scale,
            "projection": self.hidden_lr_scale,
            "vector": self.vector_lr_scale,
        }[_kind(name)]

    def decay_scale(self, name: str) -> float:
        """What the weight decay of parameter `name` is multiplied by, where it has any."""
        return self.hidden_decay_scale if _kind(name) == "projection" else 1.0

    def eps_scale(self, name: str) -> float:
        """What AdamW's eps is multiplied by for parameter `name`, a matrix or a vector."""
        return self.hidden_eps_scale if name.startswith("h.") else self.embedding_eps_scale

    @property
    def n_params(self) -> int:
        """Exact number of parameters; the tied head counts once."""
        return sum(self.param_breakdown().values())

    def param_breakdown(self) -> dict[str, int]:
        """Parameters by kind; the values add up to `n_params`."""
        d = self.d_model
        return {
            "token_embedding": self.vocab_size * d,
            "position_embedding": self.position_rows * d,
            "attention": self.n_layer * (4 * d * d + 4 * d),
            "mlp": self.n_layer * (d * self.d_fc + self.d_fc + self.d_ff * d + d),
            "layer_norm": (2 * self.n_layer + 1 + self.embedding_norm) * 2 * d,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives back an equal config."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GPTConfig":
        """The inverse of `to_dict`; fields with a default may be missing. Raises InputError for other missing ones, and
        for unknown ones."""
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        for problem, names in (("lacks", required - set(values)), ("has unknown", set(values) - known)):
            if names:
                raise InputError(f"GPTConfig: the dictionary {problem} {', '.join(sorted(names))}")
        return cls(**values)


def variant(
    config: GPTConfig,
    positions: str | None = None,
    activation: str | None = None,
    embedding_norm: bool | None = None,
) -> GPTConfig:
    """`config` with other positions, activation or embedding norm; None keeps what it has.

    A change between GELU and SwiGLU takes d_ff times or by 2/3, to a multiple of 8: three matrices then hold what two
    did (Shazeer 2020, arXiv 2002.05202, section 2). Raises InputError for an unknown name.
    """
    changed = {"positions": positions, "activation": activation, "embedding_norm": embedding_norm}
    new = replace(config, **{name: value for name, value in changed.items() if value is not None})
    gates = (new.activation == "swiglu") - (config.activation == "swiglu")
    return replace(new, d_ff=max(8, round(config.d_ff * (2 / 3) ** gates / 8) * 8)) if gates else new


def resized(config: GPTConfig, width: int | None = None, n_layer: int | None = None) -> GPTConfig:
    """`config` at another width, with more or fewer of its heads and d_ff in proportion, or at another depth; None
    keeps what it has. The numbers stay as they are: cgpt.model.parametrization says what they should be.

    Raises InputError for a width that no number of heads fits.
    """
    width = config.d_model if width is None else width
    if width < 1 or width % config.d_head:
        raise InputError(f"width: wanted a multiple of the heads' {config.d_head}, got {width}")
    d_ff = config.d_ff if width == config.d_model else max(8, round(config.d_ff / config.d_model * width / 8) * 8)
    heads, n_layer = width // config.d_head, config.n_layer if n_layer is None else n_layer
    return replace(config, n_layer=n_layer, n_head=heads, d_model=width, d_ff=d_ff)


def _kind(name: str) -> str:
    """ "table", "projection" or "vector": the kinds of parameters that learn at rates of their own."""
    if name in ("wte.weight", "wpe.weight"):
        return "table"
    part = name.split(".")[-2]
    return "vector" if name.endswith(".bias") or part.startswith("ln_") else "projection"
