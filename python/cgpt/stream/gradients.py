"""A step's gradients as they are produced: summed, rounded once, measured, and sent to where AdamW will want them.

    part    of one reader and parameter: its micro-batches' contributions in their order, in fp32 where there are
            several; the embedding and the head each have a part of the tied wte
    sum     the readers' parts from the head down, rounded to the working dtype
    norm    of the sums: squares of each chunk as soon as they are there, in double, added in their order at the end

So the bits depend neither on how micro-batches are grouped into visits nor on where a layer lives. Between visits the
parts of a layer whose home is not on the device wait on the host and come down again with the layer.

Of N ranks, rank r has micro-batches r, r + N, r + 2N, ... of the step's; those of one round are added in rank order, by
the rank that owns the element (exchange.py). That is the order of one rank that has them all, so N changes no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cgpt.stream.devices import Event
from cgpt.stream.exchange import Exchange, Span
from cgpt.stream.layout import CHUNK
from cgpt.stream.record import Part, parts_of
from cgpt.stream.store import Store
from cgpt_ext import grad_square_sums

STRETCH = 1 << 22  # elements
IN_FLIGHT = 2  # layers whose gradients may be on their way up while the next are computed


@dataclass
class Gradients:
    """One step's gradients, times the loss scale it was asked with.

    loss: mean over all samples in nats per token, not scaled.
    by_name: parameter name -> this rank's part of its gradient in the working dtype, on the device or the host, as its
        layer's home is; None where it waits on the disk, behind the layer's record.
    ready: layer -> the event behind which its gradients are there, for those on the host.
    norm: global L2 norm, of the sums of squares of all chunks in their order, in double.
    """

    loss: float
    by_name: dict[str, Tensor | None]
    ready: dict[int, Event]
    norm: float


class Sums:
    """Gradients of a step of `contributions` micro-batches, of all ranks; exchange: where there are several."""

    def __init__(self, store: Store, contributions: int, exchange: Exchange | None = None):
        self.by_name: dict[str, Tensor | None] = {}
        self.ready: dict[int, Event] = {}
        self._store, self._lanes, self._exchange = store, store.lanes, exchange
        self._contributions = contributions
        self._own = [parts_of(plan.owned, store.world.rank, store.world.count) for plan in store.plans]
        self._squares: dict[int, Tensor] = {}
        self._flats: dict[tuple[int, int], Tensor] = {}  # (reader, owner) -> fp32 parts, laid out as the owner's shard
        self._parts: dict[tuple[int, str], Tensor | None] = {}  # (reader, name) -> its part; None: on the host
        self._parked: dict[int, tuple[list[int], Event]] = {}
        self._added: list[Event] = []  # the last to use what was received
        self._sent: list[Event] = []
        self._due: deque[tuple[bool, Callable[[], None]]] = deque()  # what waits for an exchange, or behind one

    def after(self) -> list[Event]:
        """What a layer's backward must stand behind, so that gradients on their way up do not pile up."""
        return self._sent[-IN_FLIGHT:][:1] if len(self._sent) >= IN_FLIGHT else []

    def add(self, index: int, x: Tensor, y: Tensor, dy: Tensor) -> Tensor | None:
        """Differentiates one micro-batch through layer `index`; returns the gradient of x, None for token ids."""
        parameters = self._store.layers[index].parameters
        inputs = [x] if x.requires_grad else []
        found = torch.autograd.grad(y, [*inputs, *parameters.values()], dy, allow_unused=True)
        gradients = dict(zip(parameters, found[len(inputs) :], strict=True))
        if self._exchange is not None:
            self._exchange.pack(index, gradients)
        else:
            self._contribute(index, gradients)
        return found[0] if inputs else None

    def exchange(self, index: int, number: int, event: Event | None) -> None:
        """Sends what `add` has packed of this rank's micro-batch `number`, if it has one, behind `event`, and takes
        what others have; every rank, for every layer and round. What came of the round before is added up meanwhile."""
        if self._exchange is None:
            return
        givers = min(self._store.world.count, self._contributions - number * self._store.world.count)
        arrived = self._exchange.send(index, givers, self._added if event is None else [event])

        def work() -> None:
            for span, pieces in zip(self._exchange.spans[index], arrived.given, strict=True):
                for piece in pieces:
                    self._add_flat(index, span, piece)
            for memory in arrived.memory:
                self._lanes.poison(memory)

        def add_up() -> None:
            _, added = self._lanes.compute(f"{self._name(index)} sum", work, [arrived.event])
            self._added = [added]

        self._due.append((True, add_up))
        self._settle(1)

    def fetch(self, index: int) -> list[Event]:
        """Starts bringing the parts of layer `index` that wait on the host; returns what to stand behind."""
        if index not in self._parked:
            return []
        owners, sent = self._parked.pop(index)
        there = {owner: flat for owner, flat in self._flats_on_host(index).items() if owner in owners}
        what = f"{self._name(index)} sums"
        here, event = self._lanes.compute(
            what, lambda: {owner: torch.empty_like(flat, device=self._store.device) for owner, flat in there.items()}
        )
        for owner, flat in here.items():
            self._adopt(index, owner, flat)

        def work() -> None:
            for owner, flat in here.items():
                self._lanes.copy(flat, there[owner])

        nbytes = sum(flat.nbytes for flat in here.values())
        return [self._lanes.submit("down", what, work, [event, sent], nbytes)]

    def park(self, index: int, event: Event) -> None:
        """Sends the parts of layer `index` up until its next visit, where its home is not on the device."""
        if self._store.placement.state[index] != "device":
            self._behind_exchanges(lambda: self._park(index, event))

    def finish(self, index: int) -> None:
        """What layer `index` owns is complete: its readers lie above it and have had their turn."""
        self._behind_exchanges(lambda: self._finish(index))

    def settle(self) -> None:
        """Ends the visit: all that was exchanged is added up."""
        self._settle(0)

    def step_ended(self, losses: Sequence[Tensor | None]) -> Gradients:
        """The step's gradients, once every layer is finished; losses: of this rank's micro-batches, in their order."""
        world, chunks = self._store.world, self._chunks()
        rounds = -(-self._contributions // world.count)
        numbers = [torch.zeros((), dtype=torch.float64, device=self._store.device) if x is None else x for x in losses]
        squares = [self._squares[index] for index in sorted(self._squares)]
        told = self._told(torch.cat([torch.stack(numbers), *squares]), rounds + max(map(sum, chunks)))
        loss = sum(float(told[i % world.count][i // world.count]) for i in range(self._contributions))
        total, begin = 0.0, [rounds] * world.count
        for layer in range(len(chunks[0])):
            for rank, row in enumerate(told):
                end = begin[rank] + chunks[rank][layer]
                total = np.cumsum(np.concatenate([[total], row[begin[rank] : end]]))[-1]
                begin[rank] = end
        return Gradients(loss, self.by_name, self.ready, float(np.sqrt(total)))

    def _contribute(self, index: int, gradients: dict[str, Tensor | None]) -> None:
        """Adds a micro-batch's gradients on the only rank."""
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            if self._contributions == 1:
                self._parts[index, name] = gradient.contiguous()
                continue
            owner = self._store.owner[name]
            flat = self._flat(index, owner)
            there = self._own[owner][name].of(flat)
            if (index, name) in self._parts:
                there.add_(gradient)
            else:
                there.copy_(gradient)
                self._parts[index, name] = there

    def _add_flat(self, index: int, span: Span, piece: Tensor) -> None:
        """Adds this rank's share of one micro-batch's gradients of what layer `index` reads of an owner."""
        owner, fresh = span.owner, (index, span.owner) not in self._flats
        flat = self._flat(index, owner)
        start = max(0, span.low - self._store.world.rank * flat.numel())
        there = flat[start : start + span.mine]
        there.copy_(piece) if fresh else there.add_(piece)
        if fresh:
            mine = self._own[owner]
            self._parts |= {(index, name): mine[name].of(flat) for name in span.names if name in mine}

    def _flat(self, index: int, owner: int) -> Tensor:
        """The fp32 parts of what layer `index` reads of `owner`."""
        if (index, owner) not in self._flats:
            size = self._store.sizes[owner]
            self._flats[index, owner] = torch.empty(size, dtype=torch.float32, device=self._store.device)
        return self._flats[index, owner]

    def _adopt(self, index: int, owner: int, flat: Tensor) -> None:
        """Puts parts where those were that went to the host."""
        self._flats[index, owner] = flat
        for name, part in self._own[owner].items():
            if (index, name) in self._parts:
                self._parts[index, name] = part.of(flat)

    def _behind_exchanges(self, work: Callable[[], None]) -> None:
        self._due.append((False, work))
        if self._exchange is None:
            self._settle(0)

    def _settle(self, left: int) -> None:
        """Does what is due, but for the newest `left` exchanges and what stands behind them."""
        waiting = sum(arrives for arrives, _ in self._due)
        while self._due and (waiting > left or not self._due[0][0]):
            arrives, work = self._due.popleft()
            waiting -= arrives
            work()

    def _park(self, index: int, event: Event) -> None:
        owners = [owner for reader, owner in self._flats if reader == index]
        flats = {owner: self._flats.pop((index, owner)) for owner in owners}
        self._parts |= {key: None for key in self._parts if key[0] == index}  # views of them
        there = self._flats_on_host(index)
        if self._exchange is not None:  # the sums are newer than the layer's own arithmetic
            _, event = self._lanes.compute(f"{self._name(index)} sums", lambda: None)

        def work() -> None:
            for owner in owners:
                self._lanes.copy(there[owner], flats.pop(owner))

        self._parked[index] = owners, self._send(index, work, event, sum(flat.nbytes for flat in flats.values()))

    def _finish(self, index: int) -> None:
        store, own = self._store, self._own[index]
        mine, event = self._lanes.compute(f"{self._name(index)} norm", lambda: self._complete(index))
        if store.placement.state[index] == "device" or not mine:
            self.by_name |= mine
            return
        parts: dict[str, Part] = {name: own[name] for name in mine}
        nbytes = sum(gradient.nbytes for gradient in mine.values())

        def work(flat: Tensor) -> None:
            for name, part in parts.items():
                self._lanes.copy(part.of(flat), mine.pop(name))

        if store.gradients[index] is None:
            self.by_name |= dict.fromkeys(parts)
            self.ready[index] = store.send_gradients(index, work, [event])
            self._sent.append(self.ready[index])
            return
        flat = store.gradients[index][: store.sizes[index] * store.dtype.itemsize].view(store.dtype)
        self.by_name |= {name: part.of(flat) for name, part in parts.items()}
        self.ready[index] = self._send(index, lambda: work(flat), event, nbytes)

    def _complete(self, index: int) -> dict[str, Tensor]:
        """Sums of what layer `index` owns, rounded; notes their squares."""
        mine = {}
        for name in self._own[index]:
            readers = [i for i in reversed(range(len(self._store.layers))) if (i, name) in self._parts]
            parts = [self._parts.pop((reader, name)) for reader in readers]
            if parts:
                mine[name] = _rounded_sum(parts, self._store.dtype)
        for key in [key for key in self._flats if key[1] == index]:
            del self._flats[key]
        if mine:
            self._squares[index] = grad_square_sums(list(mine.values()), CHUNK)
        return mine

    def _send(self, index: int, work, event: Event, nbytes: int) -> Event:
        what = f"{self._name(index)} gradients"
        sent = self._lanes.submit("up", what, work, [event, *self._store.spent(index)], nbytes)
        self._sent.append(sent)
        return sent

    def _flats_on_host(self, index: int) -> dict[int, Tensor]:
        flat, end, found = self._store.gradients[index].view(torch.float32), 0, {}
        for owner in self._store.plans[index].owners:
            size = self._store.sizes[owner]
            found[owner] = flat[end : end + size]
            end += size
        return found

    def _chunks(self) -> list[list[int]]:
        """How many sums of squares each rank has of each layer."""
        world = self._store.world
        if world.count == 1:
            return [[self._squares[index].numel() if index in self._squares else 0 for index in range(len(self._own))]]
        return [
            [
                sum(-(-part.size // CHUNK) for part in parts_of(plan.owned, rank, world.count).values())
                for plan in self._store.plans
            ]
            for rank in range(world.count)
        ]

    def _told(self, own: Tensor, size: int) -> np.ndarray:
        """Every rank's numbers, (ranks, size) double."""
        world = self._store.world
        whole = own.new_zeros(world.count, size)
        whole[world.rank, : own.numel()] = own
        if world.count == 1:
            return self._lanes.numbers(whole)
        _, event = self._lanes.compute("numbers", lambda: None)
        row = whole[world.rank].clone()
        nbytes = (world.count - 1) * row.nbytes
        told = self._lanes.submit("wire", "numbers", lambda: world.all_gather(whole.view(-1), row), [event], nbytes)
        found, _ = self._lanes.compute("numbers", lambda: whole, [told])
        return self._lanes.numbers(found)

    def _name(self, index: int) -> str:
        return self._store.layers[index].name


def _rounded_sum(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of the first part, the second and so on in fp32, rounded once; stretch by stretch into the first where
    its dtype allows, for an embedding's parts are the largest tensors of a step."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    total = parts[0] if parts[0].dtype == dtype else parts[0].new_empty(parts[0].shape, dtype=dtype)
    flat = [part.reshape(-1).split(STRETCH) for part in parts]
    for there, first, *rest in zip(total.view(-1).split(STRETCH), *flat, strict=True):
        stretch = first.to(torch.float32)
        for part in rest:
            stretch = stretch + part
        there.copy_(stretch)
    return total
