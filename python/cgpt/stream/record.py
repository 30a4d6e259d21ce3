"""One layer's parameters and optimizer state in one stretch of memory, one section after another.

    precision  working weights       master                              bytes an element
    bf16       bf16, the high half   int16, the low half: split master   2 + 2 + 8 = 12
    fp16       fp16, rounded         fp32                                2 + 4 + 8 = 14
    fp32       fp32, the master      none                                4 + 8     = 12

exp_avg and exp_avg_sq are fp32. Without training there are working weights alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.stream.layout import Layout
from cgpt_ext import _native, join_master, split_master

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOMENTS = ("exp_avg", "exp_avg_sq")


def sections(precision: str, training: bool) -> dict[str, torch.dtype]:
    """What a record holds, in the order in which it lies. Raises InputError for an unknown precision."""
    if precision not in DTYPES:
        raise InputError(f"precision must be one of {', '.join(DTYPES)}, got {precision}")
    found = {"working": DTYPES[precision]}
    if training:
        if precision == "bf16":
            found["low"] = torch.int16
        if precision == "fp16":
            found["master"] = torch.float32
        found |= dict.fromkeys(MOMENTS, torch.float32)
    return found


def record_bytes(size: int, precision: str, training: bool = True) -> int:
    """Bytes of a record of `size` elements."""
    return size * sum(dtype.itemsize for dtype in sections(precision, training).values())


@dataclass
class Group:
    """What AdamW is given at once: a record's decayed or undecayed parameters, as parallel lists of views."""

    decayed: bool
    names: list[str]
    working: list[Tensor]
    lows: list[Tensor] | None
    masters: list[Tensor] | None
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


class Record:
    """`layout`'s parameters in `memory`, uint8 of `record_bytes` bytes; views of it, never copies.

    working: where the working weights lie instead, for a record that is split between two memories.
    """

    def __init__(self, layout: Layout, precision: str, training: bool, memory: Tensor):
        self.layout, self.precision, self.training = layout, precision, training
        self.memory = memory
        self.flat: dict[str, Tensor] = {}
        start = 0
        for kind, dtype in sections(precision, training).items():
            end = start + layout.size * dtype.itemsize
            self.flat[kind] = memory[start:end].view(dtype)
            start = end

    def view(self, kind: str, name: str) -> Tensor:
        """A parameter's part of a section, in the parameter's shape."""
        return parameter_view(self.flat[kind], self.layout, self.layout.names.index(name))

    def master(self, name: str) -> Tensor:
        """The exact fp32 master of a parameter, as a tensor of its own on the CPU."""
        working = self.view("working", name)
        if "low" in self.flat:
            return join_master(working, self.view("low", name)).cpu()
        source = self.view("master", name) if "master" in self.flat else working
        return source.to("cpu", torch.float32, copy=True)

    def set_master(self, name: str, value: Tensor) -> None:
        """Sets a parameter's master to `value` (fp32, its shape) and its working weights to the rounded value.

        bf16 rounds ties away from zero (the split master's high half), with and without masters, so that training,
        evaluation and generation compute with the same bits. Raises InputError for another shape or dtype.
        """
        working = self.view("working", name)
        if value.shape != working.shape or value.dtype != torch.float32:
            raise InputError(f"{name}: wanted float32 {tuple(working.shape)}, got {value.dtype} {tuple(value.shape)}")
        if self.precision == "bf16":
            if "low" in self.flat and working.device.type == "cpu":  # in place: an embedding's halves are large
                _native.split_master(value.contiguous(), working, self.view("low", name))
                return
            high, low = split_master(value.contiguous())
            working.copy_(high)
            if "low" in self.flat:
                self.view("low", name).copy_(low)
            return
        working.copy_(value)
        if "master" in self.flat:
            self.view("master", name).copy_(value)

    def groups(self) -> tuple[Group, Group]:
        """(decayed, undecayed) of a record that trains."""
        names, cut = self.layout.names, self.layout.decayed
        return self._group(True, names[:cut]), self._group(False, names[cut:])

    def _group(self, decayed: bool, names: tuple[str, ...]) -> Group:
        def views(kind: str) -> list[Tensor] | None:
            return [self.view(kind, name) for name in names] if kind in self.flat else None

        return Group(
            decayed, list(names), views("working"), views("low"), views("master"), *(views(kind) for kind in MOMENTS)
        )


def parameter_view(flat: Tensor, layout: Layout, i: int) -> Tensor:
    """Parameter number `i` of a flat buffer laid out as `layout`, in its shape."""
    start, shape = layout.starts[i], layout.shapes[i]
    return flat[start : start + math.prod(shape)].view(shape)
