"""How a layer's parameters lie in memory: side by side, those with weight decay first, each at a multiple of a chunk.

A layer owns one flat buffer of each kind (working weights, low halves, moments, gradients), all laid out alike, so a
layer is copied, read and written in one piece, and the optimizer sees two stretches of it. A parameter that two layers
read (the tied wte: embedding and head) lies with the first of them.

Of several ranks each has a shard of every layer's buffer, a stretch of as many whole chunks for each; the last may have
fewer, or none. So what is counted by chunks (sums of squares, grad_norm.h) is the same however many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CHUNK = 1024  # elements: a multiple of every cache line and of what DMA engines like

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Parameters of one layer in one flat buffer.

    names: in order, the first `decayed` of them under weight decay. starts: first element of each. size: elements
    of the whole, padding included.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    decayed: int
    size: int

    @classmethod
    def of(cls, shapes: Shapes) -> Layout:
        """Matrices first; vectors, which Cerebras-GPT (section 2.2) leaves undecayed, behind them."""
        names = sorted(shapes, key=lambda name: len(shapes[name]) < 2)
        starts, size = [], 0
        for name in names:
            starts.append(size)
            size += -(-math.prod(shapes[name]) // CHUNK) * CHUNK
        ordered = tuple(tuple(shapes[name]) for name in names)
        return cls(tuple(names), ordered, tuple(starts), sum(len(shape) >= 2 for shape in ordered), size)

    @property
    def parameters(self) -> int:
        """Elements without padding."""
        return sum(math.prod(shape) for shape in self.shapes)


def shard_size(size: int, ranks: int) -> int:
    """Elements of each rank's shard of a buffer of `size`, a multiple of CHUNK; they may reach past its end."""
    return -(-size // (CHUNK * ranks)) * CHUNK


def shard(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """(begin, end) of a rank's shard of a buffer of `size`; empty where the ranks before have all of it."""
    each = shard_size(size, ranks)
    return min(rank * each, size), min((rank + 1) * each, size)


@dataclass(frozen=True)
class LayerPlan:
    """One stop of the walk, in numbers: what it owns, and everything it reads, by name. owners: the layers, in their
    order, that own what it reads."""

    name: str
    owned: Layout
    reads: Layout
    owners: tuple[int, ...]


def layers_plan(reads: Sequence[tuple[str, Shapes]]) -> list[LayerPlan]:
    """From each layer's (name, shapes of all it reads), in the order of the walk."""
    plans: list[LayerPlan] = []
    owner: dict[str, int] = {}
    for name, shapes in reads:
        owned = {key: shape for key, shape in shapes.items() if key not in owner}
        owner |= dict.fromkeys(owned, len(plans))
        owners = tuple(sorted({owner[key] for key in shapes}))
        plans.append(LayerPlan(name, Layout.of(owned), Layout.of(shapes), owners))
    return plans
