"""One layer's parameters and optimizer state in one stretch of memory, one section after another; or a rank's shard.

    working    what the layer computes with
    low        int16 low halves of bf16 weights: the split master; or master, fp32, behind fp16 weights
    exp_avg, exp_avg_sq

format.py says which a format has, and in which dtypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.stream.format import MOMENTS, Format
from cgpt.stream.layout import Layout, shard_size
from cgpt_ext import _native, join_master, split_master

PIECE = 1 << 20  # elements that are split at once where it cannot be done in place: 4 MB, of embeddings of 1 GB


def dtype_of(format: Format) -> torch.dtype:
    """Of the working weights."""
    return getattr(torch, format.sections["working"])


@dataclass
class Group:
    """What AdamW is given at once: a record's decayed or undecayed parameters, as parallel lists of views."""

    decayed: bool
    names: list[str]
    firsts: list[int]  # the first element of each parameter that the record has
    working: list[Tensor]
    lows: list[Tensor] | None
    masters: list[Tensor] | None
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


@dataclass(frozen=True)
class Part:
    """What a rank has of a parameter: `size` of its elements from `first` on, at `start` of the rank's shard. shape: of
    the parameter where that is all of it, else flat."""

    first: int
    size: int
    start: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """Its stretch of a flat buffer that is laid out as the shard is."""
        return flat[self.start : self.start + self.size].view(self.shape)

    def cut(self, whole: Tensor) -> Tensor:
        """The same elements of the whole parameter, contiguous."""
        return whole.reshape(-1)[self.first : self.first + self.size].view(self.shape)


def parts_of(layout: Layout, rank: int = 0, ranks: int = 1) -> dict[str, Part]:
    """What a rank has of each of `layout`'s parameters, in their order; those that it has nothing of left out."""
    found = {name: part_of(layout, name, rank, ranks) for name in layout.names}
    return {name: part for name, part in found.items() if part.size}


def part_of(layout: Layout, name: str, rank: int, ranks: int) -> Part:
    """What a rank has of one parameter; it may be nothing."""
    i, each = layout.names.index(name), shard_size(layout.size, ranks)
    start, shape, begin = layout.starts[i], layout.shapes[i], rank * each
    low = max(start, begin)
    size = max(0, min(start + math.prod(shape), begin + each) - low)
    return Part(low - start, size, low - begin, shape if size == math.prod(shape) else (size,))


class Record:
    """`layout`'s parameters in `memory`, uint8, format.record bytes an element; views of it, never copies.

    Of several ranks each has the `parts` in its shard, of which there may be none.
    """

    def __init__(self, layout: Layout, format: Format, memory: Tensor, rank: int = 0, ranks: int = 1):
        self.layout, self.format = layout, format
        self.memory = memory
        self.rank, self.ranks = rank, ranks
        self.parts = parts_of(layout, rank, ranks)
        self.flat: dict[str, Tensor] = {}
        start = 0
        for kind, name in format.sections.items():
            dtype = getattr(torch, name)
            end = start + shard_size(layout.size, ranks) * dtype.itemsize
            self.flat[kind] = memory[start:end].view(dtype)
            start = end

    def copied_to(self, memory: Tensor) -> Record:
        """The same record in other memory."""
        memory.copy_(self.memory)
        return Record(self.layout, self.format, memory, self.rank, self.ranks)

    def view(self, kind: str, name: str) -> Tensor:
        """A parameter's part of a section: in the parameter's shape where that is all of it, else flat."""
        return self.parts[name].of(self.flat[kind]) if name in self.parts else self.flat[kind][:0]

    def master(self, name: str) -> Tensor:
        """The exact fp32 master of this rank's part of a parameter, as a tensor of its own on the CPU."""
        working = self.view("working", name)
        if "low" in self.flat:
            return join_master(working, self.view("low", name)).cpu()
        source = self.view("master", name) if "master" in self.flat else working
        return source.to("cpu", torch.float32, copy=True)

    def set_master(self, name: str, value: Tensor) -> None:
        """Sets this rank's part of a parameter's master to that of `value` (fp32, the parameter's shape) and its
        working weights to the rounded value.

        bf16 rounds ties away from zero (the split master's high half), with and without masters, so that training,
        evaluation and generation compute with the same bits. Raises InputError for another shape or dtype.
        """
        value = self.checked(name, value)
        self.set_part(name, part_of(self.layout, name, self.rank, self.ranks).cut(value))

    def checked(self, name: str, value: Tensor) -> Tensor:
        """`value`, a whole parameter. Raises InputError for another shape or dtype."""
        shape = self.layout.shapes[self.layout.names.index(name)]
        if tuple(value.shape) != shape or value.dtype != torch.float32:
            raise InputError(f"{name}: wanted float32 {shape}, got {value.dtype} {tuple(value.shape)}")
        return value

    def set_part(self, name: str, value: Tensor) -> None:
        """`set_master` from this rank's part alone (fp32, as many elements as it has, which may be none)."""
        if name not in self.parts:
            return
        working = self.view("working", name)
        value = value.view(working.shape)
        if self.format.precision == "bf16":
            if "low" in self.flat and working.device.type == "cpu":  # in place: an embedding's halves are large
                _native.split_master(value.contiguous(), working, self.view("low", name))
                return
            low = self.view("low", name).view(-1) if "low" in self.flat else None
            flat, working = value.contiguous().view(-1), working.view(-1)
            for start in range(0, flat.numel(), PIECE):
                high, rest = split_master(flat[start : start + PIECE])
                working[start : start + PIECE].copy_(high)
                if low is not None:
                    low[start : start + PIECE].copy_(rest)
            return
        working.copy_(value)
        if "master" in self.flat:
            self.view("master", name).copy_(value)

    def groups(self) -> tuple[Group, Group]:
        """(decayed, undecayed) of a record that trains."""
        decayed = set(self.layout.names[: self.layout.decayed])
        matrices = [name for name in self.parts if name in decayed]
        return self._group(True, matrices), self._group(False, [name for name in self.parts if name not in decayed])

    def _group(self, decayed: bool, names: list[str]) -> Group:
        def views(kind: str) -> list[Tensor] | None:
            return [self.view(kind, name) for name in names] if kind in self.flat else None

        return Group(
            decayed,
            names,
            [self.parts[name].first for name in names],
            views("working"),
            views("low"),
            views("master"),
            *(views(kind) for kind in MOMENTS),
        )


def parameter_view(flat: Tensor, layout: Layout, i: int) -> Tensor:
    """Parameter number `i` of a flat buffer laid out as `layout`, in its shape."""
    start, shape = layout.starts[i], layout.shapes[i]
    return flat[start : start + math.prod(shape)].view(shape)
