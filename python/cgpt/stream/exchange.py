"""A micro-batch's gradients, from the rank that made them to the ranks that own them: one all-to-all a layer and owner.

    sent        what a layer reads of one owner, as it lies in the owner's buffer: rank r's shard of it goes to rank r
    received    this rank's shard of it from every rank that had a micro-batch in this round, in rank order

Gradients cross in the working dtype, which loses nothing, and are added in fp32 where they arrive, in rank order: the
order of micro-batches, for they are dealt out in turn (gradients.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cgpt.stream.devices import Event
from cgpt.stream.layout import Layout, shard
from cgpt.stream.needs import EXCHANGES, needs
from cgpt.stream.store import Store


@dataclass(frozen=True)
class Span:
    """What one layer reads of `owner`'s buffer, from its first parameter to the end of its last: elements [low, high),
    shares[r] of them rank r's, `mine` this rank's from its shard's start on."""

    owner: int
    names: tuple[str, ...]
    layout: Layout
    low: int
    high: int
    shares: tuple[int, ...]
    mine: int

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Its parameters in a flat buffer of the whole span, each flat."""
        found = {}
        for name in self.names:
            i = self.layout.names.index(name)
            start = self.layout.starts[i] - self.low
            found[name] = flat[start : start + math.prod(self.layout.shapes[i])]
        return found


@dataclass(frozen=True)
class Arrival:
    """What has been exchanged, once `event` is done: for each span what each rank gave, in `memory`, which is free for
    another exchange when it has been added up."""

    event: Event
    given: list[list[Tensor]]
    memory: tuple[Tensor, Tensor]


class Exchange:
    """Room for EXCHANGES micro-batches' gradients of one layer, on the store's device."""

    def __init__(self, store: Store):
        self.store, self.lanes, self.world = store, store.lanes, store.world
        self.spans = [spans_of(store, index) for index in range(len(store.layers))]
        size = needs(store.plans, store.placement, store.format).exchange
        rooms = [[store.lanes.allocate(size).view(store.dtype) for _ in range(2)] for _ in range(EXCHANGES)]
        self._rooms = [tuple(room) for room in rooms]
        self._turn = 0

    def pack(self, index: int, gradients: Mapping[str, Tensor | None]) -> None:
        """Lays layer `index`'s gradients out to be sent; within the arithmetic. Raises RuntimeError where there is
        none: whether a parameter has one would depend on the rank."""
        sent, _ = self._rooms[self._turn]
        for span in self.spans[index]:
            for name, there in span.views(sent).items():
                if gradients[name] is None:
                    raise RuntimeError(f"{name}: wanted a gradient of every micro-batch on several ranks, got none")
                there.view(gradients[name].shape).copy_(gradients[name])
            sent = sent[span.high - span.low :]

    def send(self, index: int, givers: int, after: list[Event]) -> Arrival:
        """Submits the exchange of what the first `givers` ranks have packed."""
        rank, name = self.world.rank, self.store.layers[index].name
        sent, received = room = self._rooms[self._turn]
        self._turn = (self._turn + 1) % EXCHANGES
        given = []
        for span in self.spans[index]:
            size, mine = span.high - span.low, span.mine
            there = received[: givers * mine]
            sizes = [mine if other < givers else 0 for other in range(self.world.count)]
            shares = list(span.shares) if rank < givers else [0] * self.world.count
            here = sent[: sum(shares)]

            def work(there=there, here=here, sizes=sizes, shares=shares) -> None:
                self.world.exchange(there, here, sizes, shares)

            nbytes = (givers - (rank < givers)) * mine * there.itemsize
            event = self.lanes.submit("wire", f"{name} gradients", work, after, nbytes)
            given.append([there[i * mine : (i + 1) * mine] for i in range(givers)])
            sent, received = sent[size:], received[givers * mine :]
        return Arrival(event, given, room)


def spans_of(store: Store, index: int) -> list[Span]:
    """What layer `index` reads, owner by owner."""
    rank, ranks, found = store.world.rank, store.world.count, []
    for owner in store.plans[index].owners:
        layout = store.plans[owner].owned
        names = tuple(name for name in layout.names if name in store.layers[index].parameters)
        places = [layout.names.index(name) for name in names]
        low = layout.starts[places[0]]
        high = layout.starts[places[-1]] + math.prod(layout.shapes[places[-1]])
        ends = [shard(layout.size, r, ranks) for r in range(ranks)]
        shares = tuple(max(0, min(high, end) - max(low, begin)) for begin, end in ends)
        found.append(Span(owner, names, layout, low, high, shares, shares[rank]))
    return found
