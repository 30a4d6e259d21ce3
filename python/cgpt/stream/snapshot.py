"""The state as it was after one step, to be saved while the next steps change it.

    waiting -> writing -> written      the saving thread takes the layers in their order
    waiting -> copied  -> written      the optimizer comes first: it copies the record aside, then changes it

AdamW passes `gate` before it changes a layer. Where there is no room aside, or the layer is being written just then, it
waits for the saving thread; a slow disk so slows training down, and never lets a checkpoint hold two steps' state.
(torch's own asynchronous checkpoint of tensors on the CPU writes whatever they hold by then: pytorch#144657.)

The two cannot wait for each other in a circle: the saving thread waits for updates submitted before the snapshot was
made, which pass no gate of its, and reads the disk by itself, into memory that is there for nothing else. Of several
ranks each has a snapshot of its shards; what was submitted before it on one waits for nothing submitted after it on
another, for all submit in the same order.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import Tensor

from cgpt.stream.record import Record
from cgpt.stream.store import Store


class Snapshot:
    """`store`'s records as they are when every update submitted by now is done.

    The store's updates pass the gate until every layer is written, or `drop` ends it. Records that must change before
    they are written go to the store's memory aside. A store has one snapshot at a time: RuntimeError where it has one,
    or where its placement leaves no memory for one (`aside` is None).
    """

    def __init__(self, store: Store):
        if store.snapshot is not None:
            raise RuntimeError("snapshot: wanted a store without one, got a store whose snapshot is still being saved")
        if store.placement.aside is None:
            raise RuntimeError("snapshot: wanted a placement with memory aside, got none")
        self.store, self.layers, self.world = store, store.layers, store.world
        self._state = ["waiting"] * len(store.layers)
        self._ready = [store.pending(index) for index in range(len(store.layers))]
        self._copies: dict[int, Record] = {}
        self._room, self._free = store.aside, [(0, store.aside.numel())]
        self._changed = threading.Condition()
        self._dropped = False
        store.snapshot = self

    def gate(self, index: int, record: Record) -> None:
        """Called by whoever is about to change `record`, layer `index`'s; returns when it may."""
        with self._changed:
            self._changed.wait_for(lambda: self._may_pass(index, record))

    @contextlib.contextmanager
    def record(self, index: int) -> Iterator[Record]:
        """Layer `index`'s record for the saving thread, which asks once for every layer. Raises what stopped the
        store's lanes."""
        for event in self._ready[index]:
            event.wait()
        with self._changed:
            copied = self._copies.get(index)
            if copied is None:
                self._state[index] = "writing"
        try:
            if copied is not None:
                yield copied
            else:
                with self.store.peek(index) as record:
                    yield record
        finally:
            with self._changed:
                self._state[index] = "written"
                if self._copies.pop(index, None) is not None:
                    self._give_back(copied.memory)
                self._changed.notify_all()

    def drop(self) -> None:
        """Ends it: nobody waits at the gate any more."""
        with self._changed:
            self._dropped = True
            self._changed.notify_all()
        if self.store.snapshot is self:
            self.store.snapshot = None

    def _may_pass(self, index: int, record: Record) -> bool:
        """Whether layer `index` may change; copies it aside where that lets it. Asked again whenever a layer has been
        written, which may have made room."""
        if self._dropped:
            return True
        if self._state[index] == "waiting":
            memory = self._take(record.memory.numel())
            if memory is not None:
                self._copies[index] = record.copied_to(memory)
                self._state[index] = "copied"
        return self._state[index] in ("copied", "written")

    def _take(self, nbytes: int) -> Tensor | None:
        """The first stretch of the room that is large enough."""
        for i, (start, size) in enumerate(self._free):
            if size >= nbytes:
                self._free[i] = (start + nbytes, size - nbytes)
                return self._room[start : start + nbytes]
        return None

    def _give_back(self, memory: Tensor) -> None:
        start = memory.storage_offset() - self._room.storage_offset()
        spans = sorted([*self._free, (start, memory.numel())])
        self._free = []
        for start, size in spans:
            if self._free and sum(self._free[-1]) == start:
                self._free[-1] = (self._free[-1][0], self._free[-1][1] + size)
            else:
                self._free.append((start, size))
