"""Memory that one layer after another uses: who has it, in which state, and which event ends each state.

    FREE -> FILLING -> READY -> IN_USE -> DRAINING -> FREE

A lane fills it (a copy, a disk's read), the arithmetic or another lane uses it, and it is free again once the event of
its last use is done. Whoever fills it next hands that event to its lane, so no thread waits for a buffer by itself.
Every step is checked: a buffer that is used by a layer which does not have it, or before it was filled, or in a
version that is not the store's, is a defect of the schedule and stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import Enum

from torch import Tensor

from cgpt.stream.devices import Event

State = Enum("State", ["FREE", "FILLING", "READY", "IN_USE", "DRAINING"])


class Buffer:
    """One buffer. memory: uint8."""

    def __init__(self, name: str, memory: Tensor):
        self.name, self.memory = name, memory
        self.holder: Hashable = None
        self.version: Hashable = None
        self._state = State.FREE
        self._event: Event | None = None

    @property
    def state(self) -> State:
        """What it is in by now: READY once what fills it is done, FREE once the last use is."""
        after = {State.FILLING: State.READY, State.DRAINING: State.FREE}
        return after[self._state] if self._state in after and self._event.done else self._state

    def fill(self, holder: Hashable, version: Hashable, start: Callable[[list[Event]], Event]) -> None:
        """Gives the buffer to `holder`. start(after) submits what fills it, behind the events in `after`."""
        self._want(State.FREE, State.DRAINING)
        after = [] if self._event is None else [self._event]
        self.holder, self.version, self._state = holder, version, State.FILLING
        self._event = start(after)

    def use(self, holder: Hashable, version: Hashable) -> Event:
        """Begins the use by `holder`; returns the event that fills it, behind which the use must stand."""
        self._want(State.FILLING, State.READY)
        if (self.holder, self.version) != (holder, version):
            raise RuntimeError(
                f"{self.name}: wanted {holder} in version {version}, got {self.holder} in version {self.version}"
            )
        self._state = State.IN_USE
        return self._event

    def drain(self, event: Event) -> None:
        """Ends the use: the buffer is free once `event` is done."""
        self._want(State.IN_USE)
        self._state, self._event = State.DRAINING, event

    def reset(self) -> None:
        """Free, whatever was on its way; nothing may still be using it."""
        self._state, self._event, self.holder = State.FREE, None, None

    def _want(self, *states: State) -> None:
        state = self.state
        if state not in states:
            wanted = " or ".join(state.name for state in states)
            raise RuntimeError(f"{self.name}: wanted one that is {wanted}, got {state.name}, held by {self.holder}")


class Ring:
    """Buffers of one size that are taken in turn."""

    def __init__(self, buffers: Sequence[Buffer]):
        self.buffers = list(buffers)
        self._next = 0

    def take(self) -> Buffer:
        """The buffer whose turn it is; the one that has been out of use longest."""
        buffer = self.buffers[self._next]
        self._next = (self._next + 1) % len(self.buffers)
        return buffer

    def reset(self) -> None:
        """All free; nothing may still be using them."""
        for buffer in self.buffers:
            buffer.reset()
