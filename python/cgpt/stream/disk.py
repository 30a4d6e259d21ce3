"""Records of layers whose home is a file, and the buffers of host memory through which they come and go.

    staging    a record is read, updated and written back; the gradients that wait behind it on the disk come with it
    fetching   the working weights alone, which lie first in a record, on their way to the device; where nothing is
               trained they are the record, and these buffers are the staging ones too
    sending    gradients from the device, on their way behind the record
    saving     a record for the thread that writes a checkpoint

Every buffer begins at a multiple of the disk's blocks, and so does everything in the file, for direct access.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cgpt.stream.buffers import Buffer, Ring
from cgpt.stream.devices import Device, Event
from cgpt.stream.format import Format
from cgpt.stream.host import DiskTier, HostMemory
from cgpt.stream.layout import LayerPlan, shard_size
from cgpt.stream.needs import SLOTS, STAGING, Needs, disk_bytes
from cgpt.stream.record import Record, dtype_of


class DiskRecords:
    """The records of layers `homes` in the file `path`; takes its buffers from `host`, which nobody has used yet.

    Raises OSError for the disk.
    """

    def __init__(
        self,
        path: str,
        wanted: Needs,
        plans: Sequence[LayerPlan],
        homes: Sequence[int],
        lanes: Device,
        host: HostMemory,
        format: Format,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.tier = DiskTier(path, wanted.disk)
        self.plans, self.lanes, self._share = plans, lanes, (rank, ranks)
        self.sizes = [shard_size(plan.owned.size, ranks) for plan in plans]
        self.format, self.dtype = format, dtype_of(format)
        staging = _ring("staging", STAGING, wanted.staging, host)
        self._fetching = _ring("fetching", SLOTS, wanted.fetching, host)
        self._staging = staging if format.training else self._fetching
        self._sending = _ring("sending", SLOTS, wanted.sending, host)
        self._saving = host.allocate(wanted.saving)
        self._at: dict[int, int] = {}
        end = 0
        for index in homes:
            self._at[index] = end
            end += self._bytes(index) + (self._gradient_bytes(index) if wanted.sending else 0)

    def stage(
        self, index: int, version: int, after: Sequence[Event], gradients: bool = False
    ) -> tuple[Buffer, Record, Tensor, Event]:
        """Submits reading a record, and the gradients behind it; returns its buffer in use, both in it, and the event
        behind which they are there."""
        buffer, size = self._staging.take(), self.sizes[index]
        start = self._bytes(index)
        end = start + (self._gradient_bytes(index) if gradients else 0)
        work = self.tier.reader(self._at[index], buffer.memory[:end])
        what = f"{self.plans[index].name} state"
        buffer.fill(index, version, lambda before: self.lanes.submit("read", what, work, [*before, *after], end))
        record = self._record(index, buffer.memory)
        beside = buffer.memory[start : start + size * self.dtype.itemsize if gradients else start].view(self.dtype)
        return buffer, record, beside, buffer.use(index, version)

    def write_back(self, index: int, buffer: Buffer, after: Sequence[Event]) -> Event:
        """Submits writing a staged record and gives its buffer back."""
        memory = buffer.memory[: self._bytes(index)]
        event = self._write(index, f"{self.plans[index].name} state", 0, buffer, memory, after)
        buffer.drain(event)
        return event

    def fetch(self, index: int, version: int, after: Sequence[Event]) -> tuple[Buffer, Event]:
        """Submits reading the working weights; returns their buffer in use, and the event behind which they are
        there."""
        buffer, nbytes = self._fetching.take(), self._gradient_bytes(index)
        work = self.tier.reader(self._at[index], buffer.memory[:nbytes])
        what = f"{self.plans[index].name} weights"
        buffer.fill(index, version, lambda before: self.lanes.submit("read", what, work, [*before, *after], nbytes))
        return buffer, buffer.use(index, version)

    def send_gradients(
        self, index: int, work: Callable[[Tensor], None], after: Sequence[Event], spent: Sequence[Event]
    ) -> Event:
        """Has `work` fill a buffer with layer `index`'s gradients on the lane up, behind `after`, and writes it behind
        the layer's record once the last ones are `spent`; returns the event of the write."""
        buffer, name = self._sending.take(), self.plans[index].name
        nbytes = self.sizes[index] * self.dtype.itemsize
        flat = buffer.memory[:nbytes].view(self.dtype)

        def start(before: list[Event]) -> Event:
            return self.lanes.submit("up", f"{name} gradients", lambda: work(flat), [*before, *after], nbytes)

        buffer.fill(index, 0, start)
        sent, memory = buffer.use(index, 0), buffer.memory[: self._gradient_bytes(index)]
        event = self._write(index, f"{name} gradients", self._bytes(index), buffer, memory, [sent, *spent])
        buffer.drain(event)
        return event

    def peek(self, index: int) -> Record:
        """A record read at once, on the caller's thread, into the memory that is for this alone."""
        memory = self._saving[: self._bytes(index)]
        self.tier.reader(self._at[index], memory)()
        return self._record(index, memory)

    def reset(self) -> None:
        """Takes every buffer back; nothing may still be using them."""
        for ring in (self._staging, self._fetching, self._sending):
            ring.reset()

    def _write(
        self, index: int, what: str, offset: int, buffer: Buffer, memory: Tensor, after: Sequence[Event]
    ) -> Event:
        write = self.tier.writer(self._at[index] + offset, memory)

        def work() -> None:
            write()
            self.lanes.poison(buffer.memory)

        return self.lanes.submit("write", what, work, after, memory.nbytes)

    def _record(self, index: int, memory: Tensor) -> Record:
        memory = memory[: self.sizes[index] * self.format.record]
        return Record(self.plans[index].owned, self.format, memory, *self._share)

    def _bytes(self, index: int) -> int:
        return disk_bytes(self.sizes[index] * self.format.record)

    def _gradient_bytes(self, index: int) -> int:
        """Of a layer's gradients, and of its working weights."""
        return disk_bytes(self.sizes[index] * self.dtype.itemsize)


def _ring(name: str, count: int, nbytes: int, host: HostMemory) -> Ring:
    return Ring([Buffer(f"{name} {i}", host.allocate(nbytes)) for i in range(count if nbytes else 0)])
