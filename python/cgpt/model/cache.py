"""Keys and values of tokens that have been read, so that a token more costs one position's arithmetic.

    keys[l], values[l]    (H, slots x capacity, K) of layer l; slot s holds rows [s capacity, (s + 1) capacity)

Slots hold sequences of different lengths. A step reads new tokens of some of them, packed one behind the other as one
sequence (1, total, D) without padding: a prompt's first walk, one token each, or both at once. To attention_varlen the
rows that a slot does not use are sequences without a query, so a slot's result depends on its own tokens alone.
Idea: Pope et al. 2022 (arXiv 2211.05102, section 2); slots that are filled anew while others go on: Yu et al. 2022
(Orca, OSDI). H heads, K head dim, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.model.config import GPTConfig
from cgpt_ext import attention_varlen


def cache_bytes(config: GPTConfig, slots: int, capacity: int, width: int) -> int:
    """Bytes of a cache whose values are `width` bytes wide."""
    return 2 * config.n_layer * slots * capacity * config.d_model * width


class Cache:
    """Room for the keys and values of `slots` sequences of up to `capacity` tokens, in the parameters' dtype.

    Raises InputError for a capacity that the model's positions do not reach, or without a slot.
    """

    def __init__(self, config: GPTConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device):
        if slots < 1 or not 1 <= capacity <= config.seq_len:
            wanted = f"at least one slot of 1 to {config.seq_len} tokens"
            raise InputError(f"Cache: wanted {wanted}, got {slots} of {capacity}")
        self.slots, self.capacity, self.device = slots, capacity, device
        shape = config.n_head, slots * capacity, config.d_head
        layers = range(config.n_layer)
        self._pairs = [[torch.empty(shape, dtype=dtype, device=device) for _ in range(2)] for _ in layers]

    def step(self, parts: Sequence[tuple[int, int, int]]) -> Step:
        """What one walk reads: (slot, tokens that it holds already, new tokens) of each slot that takes part, in slot
        order, which is the order of the packed tokens too. Raises InputError for rows that a slot does not have."""
        if not parts:
            raise InputError("Cache: wanted a slot to read, got none")
        positions: list[int] = []
        rows: list[int] = []
        queries, keys, last = [0], [0], []
        for slot, held, count in parts:
            begin = slot * self.capacity
            if not (keys[-1] <= begin and slot < self.slots and held >= 0 < count and held + count <= self.capacity):
                wanted = f"slots in order below {self.slots}, each of up to {self.capacity} tokens"
                raise InputError(f"Cache: wanted {wanted}, got {held} + {count} in slot {slot}")
            if begin > keys[-1]:
                queries.append(queries[-1])
                keys.append(begin)
            queries.append(queries[-1] + count)
            keys.append(begin + held + count)
            positions += range(held, held + count)
            rows += range(begin + held, begin + held + count)
            last.append(len(rows) - 1)
        longest = [max(b - a for a, b in itertools.pairwise(ends)) for ends in (queries, keys)]
        ends = [torch.tensor(x, dtype=torch.int32, device=self.device) for x in (queries, keys)]
        indices = [torch.tensor(x, dtype=torch.int64, device=self.device) for x in (positions, rows, last)]
        pasts = [Past(*pair, indices[0], indices[1], keys[-1], *ends, *longest) for pair in self._pairs]
        return Step(indices[0], indices[2], pasts)

    def copy(self, source: int, target: int, count: int) -> None:
        """Gives slot `target` the first `count` rows of slot `source`."""
        begins = source * self.capacity, target * self.capacity
        for memory in itertools.chain.from_iterable(self._pairs):
            there, here = (memory[:, begin : begin + count] for begin in reversed(begins))
            there.copy_(here)


@dataclass(frozen=True)
class Step:
    """positions: (total,) int64, each new token's place in its sequence. last: (parts,) int64, where each part's last
    token lies among the new ones. layers: what each layer has read."""

    positions: Tensor
    last: Tensor
    layers: list[Past]


@dataclass(frozen=True)
class Past:
    """A layer's keys and values, (H, slots x capacity, K), as one step sees them. rows: (total,) int64, where the new
    ones go; end: the row behind the last; the others: attention_varlen's."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    rows: Tensor
    end: int
    ends_q: Tensor
    ends_k: Tensor
    longest_q: int
    longest_k: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, alibi_slopes: Tensor | None = None) -> Tensor:
        """Keeps the new tokens' k and v, (1, total, H, K), and gives causal attention of their q to all that their
        sequences hold: (1, total, H, K)."""
        past = []
        for memory, new in ((self.keys, k), (self.values, v)):
            memory.index_copy_(1, self.rows, new[0].transpose(0, 1))
            past.append(memory[:, : self.end].transpose(0, 1))
        ends = self.ends_q, self.ends_k, self.longest_q, self.longest_k
        return attention_varlen(q[0], *past, *ends, True, scale, alibi_slopes=alibi_slopes)[None]
