"""The single authority on parameters: every layer's weights, masters and moments, wherever they live.

    home     a layer's record (record.py): in the device's arena, in the host's, or in a file
    copies   of the working weights alone: on the device for good, in a slot of the device for one turn, on the host
             before a disk. A copy carries the version of the record it was made from, and is used in no other.

    gather(l)   submits what brings layer l's weights to the device: nothing, a copy, or a disk's read and a copy
    get(l)      the layer with its modules' parameters set to that memory, and the events to stand behind
    release(l)  gives the slot back, once the layer's arithmetic is done
    update(l)   runs the optimizer on the record, on the device or on the lanes of the host

A parameter that two layers read (the tied wte: embedding and head) has its home with the first of them. Where a layer
is not on the device its parameters read as NaN: nobody computes with weights that are not there and does not notice.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cgpt.errors import InputError
from cgpt.stream.buffers import Buffer, Ring
from cgpt.stream.devices import Device, Event, open_device
from cgpt.stream.disk import DiskRecords
from cgpt.stream.format import Format
from cgpt.stream.host import DiskTier, HostMemory
from cgpt.stream.layout import LayerPlan, Layout, layers_plan
from cgpt.stream.needs import AHEAD, SLOTS, Needs, needs
from cgpt.stream.placement import Placement
from cgpt.stream.record import Record, dtype_of, parameter_view


@dataclass(frozen=True)
class Layer:
    """One stop of the walk.

    module: what runs. The first layer takes token ids (B, T) to activations, the last (activations, targets) to a
        scalar loss, those between activations to activations.
    parameters: every parameter the module reads, by its full name; of two layers that read one, the first owns it.
    """

    name: str
    module: Callable
    parameters: dict[str, nn.Parameter]


Update = Callable[[Record, Tensor | None], None]  # of a record, with its gradients where they came with it


@dataclass(frozen=True)
class Piece:
    """A stretch of `owner`'s working weights that a slot holds: elements, from the owner's start to the slot's."""

    owner: int
    source: int
    slot: int
    size: int


def plans_of(layers: Sequence[Layer]) -> list[LayerPlan]:
    """The layers in numbers, for the planner."""
    return layers_plan([(x.name, {name: tuple(p.shape) for name, p in x.parameters.items()}) for x in layers])


class Store:
    """Holds `layers`' parameters in `format` where `placement` says.

    The modules may have been built on the meta device. Every parameter is zero until `write` or a checkpoint fills it.
    device: an open Device whose arena has room (`needs`), or "cpu" or "cuda" for one made to measure. disk: the file
    for layers whose home is the disk. Raises InputError for memory that is not there, OSError for the disk.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        format: Format | None = None,
        device: str | torch.device | Device = "cpu",
        *,
        placement: Placement | None = None,
        disk: str | None = None,
    ):
        self.layers = list(layers)
        self.plans = plans_of(self.layers)
        self.format = format = format or Format()
        self.placement = placement or Placement.resident(len(self.layers))
        self.dtype = dtype_of(format)
        wanted = needs(self.plans, self.placement, format)
        self.lanes = device if isinstance(device, Device) else open_device(str(device), wanted.device)
        self.device = self.lanes.torch_device
        self.host = HostMemory(wanted.host, self.device)
        homes = [i for i, home in enumerate(self.placement.state) if home == "disk"]
        if homes and disk is None:
            raise InputError("disk: wanted a folder for layers whose home is the disk, got none")
        kind = self.plans, homes, self.lanes, self.host, format
        self.disk_records = DiskRecords(disk, wanted, *kind) if homes else None
        self.owner = {name: i for i, plan in enumerate(self.plans) for name in plan.owned.names}
        count = len(self.layers)
        self.versions = [0] * count
        self._copied = [0] * count  # the version of the copy that is kept on the device
        self._updated: list[Event | None] = [None] * count  # ends the last update of the record
        self._working: list[Event | None] = [None] * count  # and of the weights that copies are made from
        self._spent: list[Event | None] = [None] * count  # ends the last use of its gradients
        self._fresh: list[Event | None] = [None] * count  # ends the last renewal of the kept copy
        self._read: list[dict[str, Event]] = [{} for _ in range(count)]  # the last to read the record, by lane
        self._held: dict[int, Buffer] = {}
        self._later: deque[tuple[int, Callable[[], None]]] = deque()  # updates on the disk, to be submitted
        self.snapshot = None  # a Snapshot while one is being saved
        self._allocate(wanted)
        self._adopt_parameters()

    # The walk's three verbs, and the optimizer's one ---------------------------------------------------------------

    def gather(self, index: int) -> None:
        """Starts bringing layer `index` to the device. Kept there: it is there, or is renewed."""
        self._submit_updates(index + AHEAD)
        for owner in sorted({self.owner[name] for name in self.plans[index].reads.names}):
            if self.kept[owner] is not None and self._copied[owner] != self.versions[owner]:
                self._renew(owner)
        if self._pieces[index]:
            slot = self._slots.take()
            slot.fill(index, self._version(index), lambda after: self._bring(index, slot, after))
            self._held[index] = slot

    def get(self, index: int) -> tuple[Layer, list[Event]]:
        """Layer `index` and the events behind which its arithmetic must stand, once `gather` has been called."""
        layer, after = self.layers[index], []
        for name in self.plans[index].reads.names:
            owner = self.owner[name]
            if self.kept[owner] is not None and self._fresh[owner] is not None:
                after.append(self._fresh[owner])
        if index in self._held:
            slot = self._held[index]
            after.append(slot.use(index, self._version(index)))
            flat, layout = slot.memory.view(self.dtype), self._slot_layouts[index]
            for i, name in enumerate(layout.names):
                layer.parameters[name].data = parameter_view(flat, layout, i)
        return layer, list(dict.fromkeys(after))

    def release(self, index: int, event: Event) -> None:
        """Gives back the device memory that `gather` took, once `event`, the layer's last arithmetic, is done."""
        for name in self.plans[index].reads.names:
            self._read[self.owner[name]]["compute"] = event
        if index in self._held:
            slot = self._held.pop(index)
            for name in self._slot_layouts[index].names:
                self._hide(self.layers[index].parameters[name])
            if self.lanes.hunting:
                _, event = self.lanes.compute("poison", lambda: self.lanes.poison(slot.memory), [event])
            slot.drain(event)

    def update(self, index: int, what: str, work: Update, after: Sequence[Event]) -> None:
        """Runs `work` on layer `index`'s record and the gradients that wait beside it on the disk, behind `after` and
        everything that still reads it: at once where the record is on the device, else on the optimizer's lane,
        between a disk's read and its write."""
        if any(waiting == index for waiting, _ in self._later):
            self._submit_updates()
        after = [*after, *self._read[index].values(), *_there(self._updated[index])]
        nbytes, snapshot, change = self._traffic[index], self.snapshot, work

        def work(record: Record, gradients: Tensor | None = None) -> None:
            if snapshot is not None:
                snapshot.gate(index, record)
            change(record, gradients)

        self._read[index] = {}
        if self.placement.state[index] == "device":
            _, event = self.lanes.compute(what, lambda: work(self.records[index]), after)
            self._copied[index] = self.versions[index] + 1
            self._updated[index] = self._working[index] = self._fresh[index] = self._spent[index] = event
        elif self.placement.state[index] == "host":
            event = self.lanes.submit("optimizer", what, lambda: work(self.records[index]), after, nbytes)
            self._updated[index] = self._working[index] = self._spent[index] = event
        else:
            self._later.append((index, lambda: self._update_on_disk(index, what, work, after, nbytes)))
        self.versions[index] += 1

    def _submit_updates(self, until: int | None = None) -> None:
        """Submits the updates of layers on the disk that have waited for the walk to come near, up to layer `until`:
        were all reads of state queued at once, those of the next layers' weights would stand behind the last."""
        while self._later and (until is None or self._later[0][0] <= until):
            self._later.popleft()[1]()

    def spent(self, index: int) -> list[Event]:
        """The last update's use of layer `index`'s gradients, on its way or done."""
        self._submit_updates(index)
        return _there(self._spent[index])

    def pending(self, index: int) -> list[Event]:
        """The last update of layer `index`'s record, on its way or done."""
        self._submit_updates(index)
        return _there(self._updated[index])

    def abandon(self) -> None:
        """Takes every buffer back from a walk that an error has ended."""
        with contextlib.suppress(Exception):  # the lanes' own error has been raised already
            self.lanes.settle()
        for index in list(self._held):
            for name in self._slot_layouts[index].names:
                self._hide(self.layers[index].parameters[name])
        self._held.clear()
        self._slots.reset()
        if self.disk_records is not None:
            self.disk_records.reset()

    def close(self) -> None:
        """Ends the lanes and gives the disk's space back; the store cannot be used any more."""
        self.lanes.close()
        if self.disk is not None:
            self.disk.close()

    @property
    def disk(self) -> DiskTier | None:
        """The file behind the host, where there is one."""
        return self.disk_records and self.disk_records.tier

    def settle(self) -> None:
        """Waits for every copy and update that is on its way."""
        self._submit_updates()
        self.lanes.settle()

    # Parameters by name --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def record(self, index: int, *, writing: bool = False) -> Iterator[Record]:
        """Layer `index`'s record once its updates are done, from the disk where it lives there; `writing` puts it
        back as a new version."""
        self._submit_updates(index)
        for event in _there(self._updated[index], *(self._read[index].values() if writing else ())):
            event.wait()
        with self._at_home(index, writing) as record:
            if writing and self.snapshot is not None:
                self.snapshot.gate(index, record)
            yield record
        if writing:
            self.versions[index] += 1
            if self.placement.state[index] == "device":
                self._copied[index] = self.versions[index]

    @contextlib.contextmanager
    def peek(self, index: int) -> Iterator[Record]:
        """Layer `index`'s record for reading on another thread, one at a time, which sees to it that nothing changes
        it meanwhile: from the disk into memory for this alone."""
        yield self.disk_records.peek(index) if self.records[index] is None else self.records[index]

    @property
    def owned(self) -> list[tuple[str, ...]]:
        """Each layer's own parameters' names, decayed first."""
        return [plan.owned.names for plan in self.plans]

    def names(self) -> list[str]:
        """Every parameter's name, in layer order."""
        return list(self.owner)

    def shape(self, name: str) -> torch.Size:
        layout = self.plans[self.owner[name]].owned
        return torch.Size(layout.shapes[layout.names.index(name)])

    @property
    def n_parameters(self) -> int:
        return sum(plan.owned.parameters for plan in self.plans)

    def moment(self, kind: str, name: str) -> Tensor:
        """`exp_avg` or `exp_avg_sq` of a parameter as fp32, a tensor of its own on the CPU."""
        with self.record(self.owner[name]) as record:
            return record.view(kind, name).to("cpu", torch.float32, copy=True)

    def read(self, name: str) -> Tensor:
        """The exact fp32 master of a parameter, as a tensor of its own on the CPU."""
        with self.record(self.owner[name]) as record:
            return record.master(name)

    def write(self, name: str, value: Tensor) -> None:
        """Sets a parameter's master to `value` (fp32, its shape); Record.set_master says how it is rounded."""
        with self.record(self.owner[name], writing=True) as record:
            record.set_master(name, value)

    def initialise(self, initial: Callable[[str, Tensor], None]) -> None:
        """Sets every parameter to what `initial(name, tensor)` writes into an fp32 tensor of its shape, and every
        moment to zero."""
        for index, names in enumerate(self.owned):
            with self.record(index, writing=True) as record:
                record.memory.zero_()
                for name in names:
                    value = torch.empty(self.shape(name))
                    initial(name, value)
                    record.set_master(name, value)

    # Where things are ----------------------------------------------------------------------------------------------

    def _allocate(self, wanted: Needs) -> None:
        """Takes the arenas apart."""
        place, width, indices = self.placement, self.dtype.itemsize, range(len(self.layers))
        self.aside = self.host.allocate(wanted.aside)  # a Snapshot's
        self.records: list[Record | None] = [None] * len(indices)  # in memory; None: on the disk
        self.kept: list[Tensor | None] = [None] * len(indices)  # working weights on the device for good
        self.near: list[Tensor | None] = [None] * len(indices)  # working weights on the host, before a disk
        self.gradients: list[Tensor | None] = [None] * len(indices)  # on the host, before AdamW there
        for i, plan in enumerate(self.plans):
            size, home, weights = plan.owned.size, place.state[i], place.weights[i]
            if home == "disk":
                if weights != "disk":
                    self.near[i] = self.host.allocate(size * width).view(self.dtype)
            else:
                memory = (self.lanes if home == "device" else self.host).allocate(size * self.format.record)
                self.records[i] = Record(plan.owned, self.format, memory)
            if home == "device":
                self.kept[i] = self.records[i].flat["working"]
            elif weights == "device":
                self.kept[i] = self.lanes.allocate(size * width).view(self.dtype)
            if self.format.training and (home == "host" or (home == "disk" and place.visits > 1)):
                several = place.visits > 1
                self.gradients[i] = self.host.allocate(plan.reads.size * 4 if several else size * width)
        self._traffic = [plan.owned.size * self.format.traffic for plan in self.plans]
        ring = [Buffer(f"slot {i}", self.lanes.allocate(wanted.slot)) for i in range(SLOTS)]
        self._slots = Ring(ring if wanted.slot else [])
        streamed = [[name for name in plan.reads.names if self.kept[self.owner[name]] is None] for plan in self.plans]
        shapes = [dict(zip(plan.reads.names, plan.reads.shapes, strict=True)) for plan in self.plans]
        self._slot_layouts = [Layout.of({name: shapes[i][name] for name in streamed[i]}) for i in indices]
        self._pieces = [self._pieces_of(layout) for layout in self._slot_layouts]

    def _pieces_of(self, slot: Layout) -> list[Piece]:
        """What to copy into a slot, neighbours in one piece."""
        pieces: list[Piece] = []
        for i, name in enumerate(slot.names):
            owned = self.plans[self.owner[name]].owned
            end = slot.starts[i + 1] if i + 1 < len(slot.names) else slot.size
            piece = Piece(self.owner[name], owned.starts[owned.names.index(name)], slot.starts[i], end - slot.starts[i])
            last = pieces[-1] if pieces else None
            if last and (last.owner, last.source + last.size) == (piece.owner, piece.source):
                pieces[-1] = Piece(last.owner, last.source, last.slot, last.size + piece.size)
            else:
                pieces.append(piece)
        return pieces

    def _adopt_parameters(self) -> None:
        nan = torch.full((), float("nan"), dtype=self.dtype, device=self.device)
        seen = set()
        for layer in self.layers:
            for name, parameter in layer.parameters.items():
                if name in seen:
                    continue
                seen.add(name)
                owner, layout = self.owner[name], self.plans[self.owner[name]].owned
                there = nan.expand(parameter.shape)
                if self.kept[owner] is not None:
                    there = parameter_view(self.kept[owner], layout, layout.names.index(name))
                # swap_tensors keeps the object, so that ties hold; .data has a version counter of its own, for
                # autograd takes a copy into any other part of the arena for a change of this one.
                torch.utils.swap_tensors(parameter, nn.Parameter(there.data, requires_grad=self.format.training))
        self._nan = nan

    def _hide(self, parameter: nn.Parameter) -> None:
        parameter.data = self._nan.expand(parameter.shape)

    # Copies --------------------------------------------------------------------------------------------------------

    def _version(self, index: int) -> tuple[int, ...]:
        """Of everything that a slot of layer `index` holds."""
        return tuple(self.versions[piece.owner] for piece in self._pieces[index])

    def _renew(self, owner: int) -> None:
        """Copies the working weights to where they are kept on the device."""
        source = self._host_weights(owner)
        after = _there(self._working[owner], self._read[owner].get("compute"))
        event = self.lanes.submit(
            "down",
            f"{self.layers[owner].name} weights",
            lambda: self.lanes.copy(self.kept[owner], source),
            after,
            source.nbytes,
        )
        self._fresh[owner] = self._read[owner]["down"] = event
        self._copied[owner] = self.versions[owner]

    def _host_weights(self, owner: int) -> Tensor:
        return self.records[owner].flat["working"] if self.near[owner] is None else self.near[owner]

    def _bring(self, index: int, slot: Buffer, after: list[Event]) -> Event:
        """Submits the copies into a slot, each behind what makes its source ready; returns the last one's event."""
        flat, name = slot.memory.view(self.dtype), self.layers[index].name
        for owner in dict.fromkeys(piece.owner for piece in self._pieces[index]):
            pieces = [piece for piece in self._pieces[index] if piece.owner == owner]
            fetched = None
            if self.placement.weights[owner] == "disk":
                version, before = self.versions[owner], _there(self._updated[owner])
                fetched, event = self.disk_records.fetch(owner, version, before)
                source, ready = fetched.memory.view(self.dtype), [event]
                self._read[owner]["read"] = event
            else:
                source, ready = self._host_weights(owner), _there(self._working[owner])

            def copy(pieces=pieces, source=source, fetched=fetched) -> None:
                for piece in pieces:
                    there = flat[piece.slot : piece.slot + piece.size]
                    self.lanes.copy(there, source[piece.source : piece.source + piece.size])
                if fetched is not None:
                    self.lanes.poison(fetched.memory)

            nbytes = sum(piece.size for piece in pieces) * self.dtype.itemsize
            event = self.lanes.submit("down", f"{name} weights", copy, [*after, *ready], nbytes)
            self._read[owner]["down"] = event
            if fetched is not None:
                fetched.drain(event)
        return event

    # The disk ------------------------------------------------------------------------------------------------------

    def _update_on_disk(self, index: int, what: str, work: Update, after: list[Event], nbytes: int) -> None:
        beside = self.gradients[index] is None
        before = [*_there(self._updated[index]), *(after if beside else ())]
        buffer, record, gradients, ready = self.disk_records.stage(index, self.versions[index], before, beside)

        def run() -> None:
            work(record, gradients if beside else None)
            if self.near[index] is not None:
                self.near[index].copy_(record.flat["working"])

        done = self.lanes.submit("optimizer", what, run, [*after, ready], nbytes)
        self._spent[index] = ready if beside else done
        self._updated[index] = self.disk_records.write_back(index, buffer, [done])
        self._working[index] = self._updated[index] if self.near[index] is None else done

    def send_gradients(self, index: int, work: Callable[[Tensor], None], after: Sequence[Event]) -> Event:
        """DiskRecords.send_gradients, once the last gradients have been used."""
        return self.disk_records.send_gradients(index, work, after, self.spent(index))

    def _at_home(self, index: int, writing: bool) -> contextlib.AbstractContextManager[Record]:
        in_memory = self.records[index]
        return self._from_disk(index, writing) if in_memory is None else contextlib.nullcontext(in_memory)

    @contextlib.contextmanager
    def _from_disk(self, index: int, writing: bool) -> Iterator[Record]:
        before = _there(self._updated[index])
        buffer, record, _, ready = self.disk_records.stage(index, self.versions[index], before)
        ready.wait()
        try:
            yield record
        except BaseException:
            buffer.drain(ready)
            raise
        if not writing:
            buffer.drain(ready)
            return
        if self.near[index] is not None:
            self.near[index].copy_(record.flat["working"])
        self._updated[index] = self._working[index] = self.disk_records.write_back(index, buffer, [])


def _there(*events: Event | None) -> list[Event]:
    return [event for event in events if event is not None]
