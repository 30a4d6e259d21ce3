"""The single authority on parameters: every layer's weights, masters and moments, wherever they live.

    home     a layer's record (record.py): in the device's arena, in the host's, or in a file
    copies   of the working weights alone: on the device for good, in a slot of the device for one turn, on the host
             before a disk. A copy carries the version of the record it was made from, and is used in no other.
    shards   of several ranks each has its own of every record; what is on the device is whole, gathered from all

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
from cgpt.stream.layout import LayerPlan, layers_plan, shard_size
from cgpt.stream.needs import AHEAD, SLOTS, Needs, needs, streamed, sums_size, whole_sizes
from cgpt.stream.placement import Placement
from cgpt.stream.record import Record, dtype_of, parameter_view
from cgpt.world import World


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


def plans_of(layers: Sequence[Layer]) -> list[LayerPlan]:
    """The layers in numbers, for the planner."""
    return layers_plan([(x.name, {name: tuple(p.shape) for name, p in x.parameters.items()}) for x in layers])


class Store:
    """Holds `layers`' parameters in `format` where `placement` says.

    The modules may have been built on the meta device. Every parameter is zero until `write` or a checkpoint fills it.
    device: an open Device whose arena has room (`needs`), or "cpu" or "cuda" for one made to measure. disk: the file
    for layers whose home is the disk. world: the job, of as many ranks as the placement; every rank then calls the
    same in the same order, and what it reads and writes by name is its part. Raises InputError for memory that is not
    there, OSError for the disk.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        format: Format | None = None,
        device: str | torch.device | Device = "cpu",
        *,
        placement: Placement | None = None,
        disk: str | None = None,
        world: World | None = None,
    ):
        self.layers, self.world = list(layers), world or World()
        self.plans = plans_of(self.layers)
        self.format = format = format or Format()
        self.placement = placement or Placement.resident(len(self.layers), self.world.count)
        if self.placement.ranks != self.world.count:
            raise InputError(f"placement: wanted one of {self.world.count} ranks, got one of {self.placement.ranks}")
        self.dtype = dtype_of(format)
        wanted = needs(self.plans, self.placement, format)
        self.lanes = device if isinstance(device, Device) else open_device(str(device), wanted.device)
        self.device = self.lanes.torch_device
        self.host = HostMemory(wanted.host, self.device)
        homes = [i for i, home in enumerate(self.placement.state) if home == "disk"]
        if homes and disk is None:
            raise InputError("disk: wanted a folder for layers whose home is the disk, got none")
        kind = self.plans, homes, self.lanes, self.host, format, self.world.rank, self.world.count
        self.disk_records = DiskRecords(disk, wanted, *kind) if homes else None
        self.owner = {name: i for i, plan in enumerate(self.plans) for name in plan.owned.names}
        self.sizes = [shard_size(plan.owned.size, self.world.count) for plan in self.plans]  # of this rank's shards
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
        for owner in self.plans[index].owners:
            if self.kept[owner] is not None and self._copied[owner] != self.versions[owner]:
                self._renew(owner)
        if self._streamed[index]:
            slot = self._slots.take()
            slot.fill(index, self._version(index), lambda after: self._fill(index, slot, after))
            self._held[index] = slot

    def get(self, index: int) -> tuple[Layer, list[Event]]:
        """Layer `index` and the events behind which its arithmetic must stand, once `gather` has been called."""
        layer = self.layers[index]
        after = [self._fresh[owner] for owner in self.plans[index].owners if self.kept[owner] is not None]
        if index in self._held:
            slot = self._held[index]
            after.append(slot.use(index, self._version(index)))
            for owner, flat in self._stretches(index, slot).items():
                layout = self.plans[owner].owned
                for i, name in enumerate(layout.names):
                    if name in layer.parameters:
                        layer.parameters[name].data = parameter_view(flat, layout, i)
        return layer, _there(*after)

    def release(self, index: int, event: Event) -> None:
        """Gives back the device memory that `gather` took, once `event`, the layer's last arithmetic, is done."""
        for owner in self.plans[index].owners:
            self._read[owner]["compute"] = event
        if index in self._held:
            slot = self._held.pop(index)
            self._hide(index)
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
            self._updated[index] = self._working[index] = self._spent[index] = event
            self._note_in_place(index, event)
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
        for index in self._held:
            self._hide(index)
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
            self._note_in_place(index, None)
            self.versions[index] += 1

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
                    if name not in record.parts:
                        continue
                    value = torch.empty(self.shape(name))
                    initial(name, value)
                    record.set_master(name, value)

    # Where things are ----------------------------------------------------------------------------------------------

    def _allocate(self, wanted: Needs) -> None:
        """Takes the arenas apart."""
        place, width, indices, world = self.placement, self.dtype.itemsize, range(len(self.layers)), self.world
        self._wholes = whole_sizes(self.plans, world.count)
        self.aside = self.host.allocate(wanted.aside)  # a Snapshot's
        self.records: list[Record | None] = [None] * len(indices)  # in memory; None: on the disk
        self.kept: list[Tensor | None] = [None] * len(indices)  # working weights on the device for good
        self.near: list[Tensor | None] = [None] * len(indices)  # working weights on the host, before a disk
        self.gradients: list[Tensor | None] = [None] * len(indices)  # on the host, before AdamW there
        for i, plan in enumerate(self.plans):
            size, home, weights = self.sizes[i], place.state[i], place.weights[i]
            if home == "disk":
                if weights != "disk":
                    self.near[i] = self.host.allocate(size * width).view(self.dtype)
            else:
                memory = (self.lanes if home == "device" else self.host).allocate(size * self.format.record)
                self.records[i] = Record(plan.owned, self.format, memory, world.rank, world.count)
            if self._in_place(i):
                self.kept[i] = self.records[i].flat["working"]
            elif weights == "device":
                self.kept[i] = self.lanes.allocate(self._wholes[i] * width).view(self.dtype)
            if self.format.training and (home == "host" or (home == "disk" and place.visits > 1)):
                several = place.visits > 1
                nbytes = sums_size(plan, self.sizes) * 4 if several else size * width
                self.gradients[i] = self.host.allocate(nbytes)
        self._traffic = [size * self.format.traffic for size in self.sizes]
        ring = [Buffer(f"slot {i}", self.lanes.allocate(wanted.slot)) for i in range(SLOTS)]
        self._slots = Ring(ring if wanted.slot else [])
        self._streamed = [streamed(plan, place) for plan in self.plans]

    def _in_place(self, index: int) -> bool:
        """Whether the record itself is what the device computes with."""
        return self.placement.state[index] == "device" and self.world.count == 1

    def _note_in_place(self, index: int, event: Event | None) -> None:
        """The next version is there without a copy, behind `event`, where the record is what is computed with."""
        if self._in_place(index):
            self._copied[index], self._fresh[index] = self.versions[index] + 1, event

    def _stretches(self, index: int, slot: Buffer) -> dict[int, Tensor]:
        """What a slot of layer `index` holds, owner by owner: the whole of its working weights."""
        flat, found, end = slot.memory.view(self.dtype), {}, 0
        for owner in self._streamed[index]:
            found[owner] = flat[end : end + self._wholes[owner]]
            end += self._wholes[owner]
        return found

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

    def _hide(self, index: int) -> None:
        """Sets what layer `index` has read from a slot to NaN."""
        for name, parameter in self.layers[index].parameters.items():
            if self.owner[name] in self._streamed[index]:
                parameter.data = self._nan.expand(parameter.shape)

    # Copies --------------------------------------------------------------------------------------------------------

    def _version(self, index: int) -> tuple[int, ...]:
        """Of everything that a slot of layer `index` holds."""
        return tuple(self.versions[owner] for owner in self._streamed[index])

    def _renew(self, owner: int) -> None:
        """Brings the working weights to where they are kept on the device."""
        after = _there(self._read[owner].get("compute"))
        self._fresh[owner] = self._bring(owner, self.layers[owner].name, self.kept[owner], after)
        self._copied[owner] = self.versions[owner]

    def _fill(self, index: int, slot: Buffer, after: list[Event]) -> Event:
        """Submits what fills a slot; returns the last one's event."""
        events = [
            self._bring(owner, self.layers[index].name, there, after)
            for owner, there in self._stretches(index, slot).items()
        ]
        return events[-1]

    def _bring(self, owner: int, name: str, there: Tensor, after: list[Event]) -> Event:
        """Submits bringing `owner`'s working weights, which layer `name` asks for, to `there` on the device: this
        rank's shard, where it is not there already, then all the others'."""
        size, rank, ranks = self.sizes[owner], self.world.rank, self.world.count
        mine, ready = there[rank * size : (rank + 1) * size], [*after, *_there(self._working[owner])]
        if self.placement.state[owner] == "device":
            mine = self.records[owner].flat["working"]
        else:
            ready = [self._send_down(owner, name, mine, after)]
        if ranks == 1:
            return ready[0]

        nbytes = (ranks - 1) * mine.nbytes
        event = self.lanes.submit("wire", f"{name} weights", lambda: self.world.all_gather(there, mine), ready, nbytes)
        if self.placement.state[owner] == "device":
            self._read[owner]["wire"] = event
        return event

    def _send_down(self, owner: int, name: str, there: Tensor, after: list[Event]) -> Event:
        """Submits copying this rank's shard of `owner`'s working weights to the device."""
        fetched = None
        if self.placement.weights[owner] == "disk":
            fetched, event = self.disk_records.fetch(owner, self.versions[owner], _there(self._updated[owner]))
            source, ready = fetched.memory.view(self.dtype)[: there.numel()], [event]
            self._read[owner]["read"] = event
        else:
            near = self.near[owner]
            source, ready = self.records[owner].flat["working"] if near is None else near, _there(self._working[owner])

        def work() -> None:
            self.lanes.copy(there, source)
            if fetched is not None:
                self.lanes.poison(fetched.memory)

        event = self.lanes.submit("down", f"{name} weights", work, [*after, *ready], there.nbytes)
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
