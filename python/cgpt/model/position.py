"""How tokens know their place, one class a kind: what goes on in each block's attention.

    learned    x = wte[ids] + wpe[t], once, in the embedding             Radford et al. 2019 (GPT-2)
    none       nothing: the causal mask alone tells first from last      Haviv et al. 2022 (arXiv 2203.16634)
    rotary     q_t and k_t turned by t · 10000^(-2i / K), i < K / 2      Su et al. 2021 (arXiv 2104.09864)
    alibi      scores of head h less slope_h · (t - s)                   Press et al. 2022 (arXiv 2108.12409)

t and s positions of a query and a key, K head dim. Rotary turns the whole head, values i and i + K / 2 together. Only
learned positions have parameters; the others hold constants, one copy a device for all blocks. With `past`, tokens are
new ones of sequences whose earlier keys and values are kept (cache.py).
"""

import torch
from torch import Tensor

from cgpt.model.cache import Past
from cgpt.model.config import GPTConfig
from cgpt_ext import attention, attention_qkv, rotary

ROTARY_BASE = 10000.0


class Unmarked:
    """Attention that sees no positions: none at all, or learned ones that the embedding has added."""

    def __init__(self, config: GPTConfig) -> None:
        self.n_head, self.softmax_scale = config.n_head, config.attention_scale

    def attend(self, qkv: Tensor, past: Past | None = None) -> Tensor:
        """Causal attention: q, k and v side by side (B, T, 3 D) -> (B, T, D)."""
        return self._attend(qkv, past)

    def _attend(self, qkv: Tensor, past: Past | None, slopes: Tensor | None = None) -> Tensor:
        if past is None:
            return attention_qkv(qkv, self.n_head, True, self.softmax_scale, alibi_slopes=slopes)
        return past.attend(*self._heads(qkv), self.softmax_scale, slopes).flatten(2)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (B, T, H, K), views."""
        B, T, packed = qkv.shape
        return qkv.view(B, T, 3, self.n_head, packed // (3 * self.n_head)).unbind(2)


class Rotary(Unmarked):
    """Queries and keys turned by their positions' angles, so that scores depend on distances."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        turns = torch.arange(0, config.d_head, 2, dtype=torch.float64, device="cpu") / config.d_head
        at = torch.arange(config.seq_len, dtype=torch.float64, device="cpu")
        angles = at[:, None] * ROTARY_BASE**-turns
        self._angles = _Constants(angles.cos().float(), angles.sin().float())

    def attend(self, qkv: Tensor, past: Past | None = None) -> Tensor:
        """As Unmarked's. v is read where it lies; q and k are written once, turned."""
        q, k, v = self._heads(qkv)
        angles = self._angles.on(qkv.device)
        if past is not None:
            angles = tuple(rows[past.positions] for rows in angles)
        q, k = rotary(q, *angles), rotary(k, *angles)
        if past is None:
            return attention(q, k, v, True, self.softmax_scale).flatten(2)
        return past.attend(q, k, v, self.softmax_scale).flatten(2)


class Alibi(Unmarked):
    """Scores that fall with distance, each head at a slope of its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self._slopes = _Constants(torch.tensor(alibi_slopes(config.n_head), device="cpu"))

    def attend(self, qkv: Tensor, past: Past | None = None) -> Tensor:
        """As Unmarked's."""
        return self._attend(qkv, past, *self._slopes.on(qkv.device))


KINDS = {"learned": Unmarked, "none": Unmarked, "rotary": Rotary, "alibi": Alibi}


def positions_of(config: GPTConfig) -> Unmarked:
    """The hook that all blocks of a model share."""
    return KINDS[config.positions](config)


def alibi_slopes(n_head: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ..., 2^-8 for n heads, a power of two. For others those of the power below, then every other
    one of the power above, as Press et al. release them."""
    below = 1 << (n_head.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
    return slopes + [2.0 ** (-8 * i / (2 * below)) for i in range(1, 2 * (n_head - below), 2)]


class _Constants:
    """Tensors that are no state of the model: in no state_dict, never cast, on each device once it has asked."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = {tensors[0].device: tensors}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._copies:
            first = next(iter(self._copies.values()))
            self._copies[device] = tuple(tensor.to(device) for tensor in first)
        return self._copies[device]
