"""GPT-2's architecture as parts that an executor walks one by one: embed, h[0], ..., h[L-1], head.

    x = e (wte[ids] + wpe[0..T))                                embed   (B, T) -> (B, T, D)
    x = x + r attention(ln_1(x));  x = x + r mlp(ln_2(x))       h[l]    (B, T, D) -> (B, T, D)
    loss = cross_entropy(o ln_f(x) wte^T, targets)              head    (B, T, D) -> scalar

e, r, o are the config's embedding_scale, residual_scale and logits_scale: 1 unless a parametrization says otherwise,
and free then. Positions may come from elsewhere than wpe (position.py), and a norm, ln_emb, may follow the embedding.
Parameters carry Hugging Face GPT-2's names and layout: projections are (in, out). Sources: Radford et al. 2019 (GPT-2);
Dey et al. 2023 (Cerebras-GPT, arXiv 2304.03208). Shape legend: B batch, T time, D d_model, H heads, K head dim, F d_ff,
V vocab. Parameters may be fp32, bf16 or fp16; every part computes in the type of its parameters.
"""

import torch
from torch import Tensor, nn

from cgpt.errors import InputError
from cgpt.model.cache import Past, Step
from cgpt.model.config import GPTConfig
from cgpt.model.init import init_parameter
from cgpt.model.position import Unmarked, positions_of
from cgpt_ext import cross_entropy, embedding, gelu_mlp, layer_norm, linear


class Table(nn.Module):
    """One matrix of embeddings, `weight` (rows, D)."""

    def __init__(self, rows: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, d_model))


class Projection(nn.Module):
    """x W + b with `weight` (in, out), the layout that GPT-2's checkpoints call Conv1D."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out))
        self.bias = nn.Parameter(torch.empty(d_out))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """(..., in) -> (..., out), times `scale` within the product."""
        return linear(x, self.weight.t(), self.bias, scale)


class LayerNorm(nn.Module):
    """Fused LayerNorm over the last dimension, times `scale`; with `residual`, returns (norm(x + residual), x +
    residual)."""

    def __init__(self, config: GPTConfig, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = nn.Parameter(torch.empty(config.d_model))
        self.eps, self.scale = config.layer_norm_eps, scale

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(..., D) -> (..., D), or a pair of them."""
        weight, bias = _scaled(self.weight, self.scale), _scaled(self.bias, self.scale)  # D values, not B T D
        return layer_norm(x, weight, bias, self.eps, residual)


class Attention(nn.Module):
    """Causal multi-head self-attention on one packed projection, whose gradient is written once."""

    def __init__(self, config: GPTConfig, positions: Unmarked) -> None:
        super().__init__()
        self.c_attn = Projection(config.d_model, 3 * config.d_model)
        self.c_proj = Projection(config.d_model, config.d_model)
        self.positions, self.scale = positions, config.residual_scale

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), what it adds to the stream."""
        return self.c_proj(self.positions.attend(self.c_attn(x), past), self.scale)


class MLP(nn.Module):
    """gelu(x W1 + b1) W2 + b2, fused; W1's columns are gate and value side by side where there is a gate."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Projection(config.d_model, config.d_fc)
        self.c_proj = Projection(config.d_ff, config.d_model)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        up, down = self.c_fc, self.c_proj
        return gelu_mlp(x, up.weight.t(), up.bias, down.weight.t(), down.bias, self.activation)


class Block(nn.Module):
    """One pre-LayerNorm layer; the second norm takes the first residual addition with it. positions: the model's, or
    its own."""

    def __init__(self, config: GPTConfig, positions: Unmarked | None = None) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, positions or positions_of(config))
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.scale = config.residual_scale

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). past: of this layer, where x are new tokens only."""
        y, x = self.ln_2(self.attn(self.ln_1(x), past), residual=x)
        return torch.add(x, self.mlp(y), alpha=self.scale)


class Head:
    """The final norm and the tied output projection: reads `ln_f` and `wte`, owns no parameter."""

    def __init__(self, ln_f: LayerNorm, wte: Table) -> None:
        self.ln_f, self.wte = ln_f, wte

    def __call__(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats, an fp32 scalar: x (B, T, D), targets (B, T) int64, -100 ignored. Logits are
        never whole."""
        return cross_entropy(self.ln_f(x), self.wte.weight, targets)

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V) in the parameters' dtype; pass the positions wanted, the vocabulary is
        wide."""
        return self.ln_f(x) @ self.wte.weight.t()


class GPT(nn.Module):
    """The whole model; `state_dict()` has the names and shapes of Hugging Face's GPT2Model, as far as that has them.

    config: its shape. seed: of the initial weights (see cgpt.model.init). Built under `torch.device("meta")`
    it costs nothing and holds nothing; give it storage with `to_empty` and values with `init_weights` or
    `load_state_dict`.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = Table(config.vocab_size, config.d_model)
        self.wpe = Table(config.position_rows, config.d_model) if config.position_rows else None
        self.ln_emb = LayerNorm(config) if config.embedding_norm else None
        positions = positions_of(config)
        self.h = nn.ModuleList(Block(config, positions) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config, config.logits_scale)
        if not self.wte.weight.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Set every parameter to its initial value, in place, whatever its dtype and device."""
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter, self.config, seed)

    def embed(self, ids: Tensor, step: Step | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, D). Raises InputError for T > seq_len, another shape or dtype, ids off the
        table.

        step: says where packed new tokens, (1, T), stand in their sequences. Ids on a GPU are not read back to be
        checked: that would stall its stream at every step.
        """
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise InputError(f"GPT: ids must be (batch, time) int64, got {tuple(ids.shape)} {ids.dtype}")
        if step is None and ids.shape[1] > self.config.seq_len:
            raise InputError(f"GPT: a sequence must be at most {self.config.seq_len} tokens, got {ids.shape[1]}")
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in torch.aminmax(ids))
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise InputError(f"GPT: token ids must be in [0, {self.config.vocab_size}), got {wrong}")
        wpe = None if self.wpe is None else self.wpe.weight
        if wpe is not None and step is not None:
            wpe = wpe[step.positions]
        x = embedding(ids, self.wte.weight, wpe)
        x = _scaled(x, self.config.embedding_scale)
        return x if self.ln_emb is None else self.ln_emb(x)

    @property
    def head(self) -> Head:
        """`head(x, targets)` is the loss, `head.logits(x)` the logits."""
        return Head(self.ln_f, self.wte)

    def forward(self, ids: Tensor, targets: Tensor | None = None, step: Step | None = None) -> Tensor:
        """The parts in order: the loss where targets (B, T) are given, logits (B, T, V) where not.

        step: of a cache; ids (1, T) are then what it says, and the logits (parts, V) those after each part.
        """
        x = self.embed(ids, step)
        for layer, block in enumerate(self.h):
            x = block(x, None if step is None else step.layers[layer])
        if step is not None:
            x = x[0, step.last]
        return self.head.logits(x) if targets is None else self.head(x, targets)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x itself where the factor is 1: no work, no node in the graph."""
    return x if factor == 1.0 else x * factor
