"""What flows between two layers, on the host until backward asks for it.

    forward    a layer's input goes up as soon as it is made, one micro-batch at a time
    backward   a layer's inputs come down a turn ahead, into the half of a ring that the layer two turns back had

The first layer's input is token ids, which stay; the last layer's is used in the turn in which it is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cgpt.errors import InputError
from cgpt.stream.buffers import Buffer, Ring
from cgpt.stream.devices import Event
from cgpt.stream.store import Store


class Boundaries:
    """Room for `placement.micro_batches` micro-batches of at most `placement.boundary` bytes at every boundary."""

    def __init__(self, store: Store):
        self.lanes, place = store.lanes, store.placement
        self.names = [layer.name for layer in store.layers]
        rows = range(place.micro_batches)
        self._host = [[store.host.allocate(place.boundary) for _ in rows] for _ in self.names[2:]]
        self._ring = Ring([Buffer(f"boundary {i}", self.lanes.allocate(place.boundary)) for i in range(2 * len(rows))])
        self._kept: dict[tuple[int, int], tuple[Tensor, Event]] = {}
        self._brought: dict[tuple[int, int], tuple[Buffer, Tensor]] = {}

    def keep(self, index: int, row: int, x: Tensor, event: Event) -> None:
        """Sends micro-batch `row`'s input of layer `index` up, once `event`, what makes it, is done."""
        room = self._host[index - 1][row]
        if x.nbytes > room.numel():
            raise InputError(
                f"{self.names[index]}: wanted at most {room.numel():,} bytes of activations a micro-batch "
                f"(Placement.boundary), got {x.nbytes:,}"
            )
        there = room[: x.nbytes].view(x.dtype).view(x.shape)
        what = f"{self.names[index]} input"
        event = self.lanes.submit("up", what, lambda: self.lanes.copy(there, x), [event], x.nbytes)
        self._kept[index, row] = there, event

    def bring(self, index: int) -> None:
        """Starts bringing all that was kept for layer `index` down."""
        for key in [key for key in self._kept if key[0] == index]:
            there, sent = self._kept.pop(key)
            buffer = self._ring.take()
            here = buffer.memory[: there.nbytes].view(there.dtype).view(there.shape)

            def start(after: Sequence[Event], here=here, there=there, sent=sent) -> Event:
                what = f"{self.names[index]} input"
                return self.lanes.submit(
                    "down", what, lambda: self.lanes.copy(here, there), [*after, sent], there.nbytes
                )

            buffer.fill(key, 0, start)
            self._brought[key] = buffer, here

    def take(self, index: int, row: int) -> tuple[Tensor, Event]:
        """Micro-batch `row`'s input of layer `index` on the device, and the event to stand behind."""
        buffer, here = self._brought[index, row]
        return here, buffer.use((index, row), 0)

    def give_back(self, index: int, row: int, event: Event) -> None:
        """Ends the use of it, once `event`, the backward of that micro-batch, is done."""
        buffer, _ = self._brought.pop((index, row))
        if self.lanes.hunting:
            _, event = self.lanes.compute("poison", lambda: self.lanes.poison(buffer.memory), [event])
        buffer.drain(event)

    def abandon(self) -> None:
        """Forgets what was kept and brought; the lanes must have settled."""
        self._kept.clear()
        self._brought.clear()
        self._ring.reset()
