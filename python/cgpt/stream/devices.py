"""Where the arithmetic is done, and the lanes that work beside it.

    compute                the caller's own thread
    down, up               copies between host and device
    wire                   what ranks exchange, in the same order on each of them
    optimizer              AdamW on the host
    read, write            the disk's

A lane does its work in the order of submission, each piece once the events it stands behind are done. Events are of
work that was submitted before, so lanes cannot wait for each other in a circle. An error in a lane stops the device:
whoever waits, or submits, or computes gets it, and nothing hangs. An error of the arithmetic is the caller's own.

    CpuDevice    lanes are threads; a bounded arena of host memory stands for a device's
    CudaDevice   lanes are threads with a stream each (devices_cuda.py)
    Simulated    everything is done at once, on a clock that counts bytes and FLOPs (devices_simulated.py)

Hunting for races: every piece of work first waits a random moment, and released memory is filled with NaN, so that
whoever reads too early or too late computes something else than in `serial` mode.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt.stream.cores import usable_cores
from cgpt.stream.timeline import Timeline
from cgpt_ext import _native

LANES = ("down", "up", "wire", "optimizer", "read", "write")
ALIGNMENT = 128  # bytes
LONGEST_DELAY = 0.002  # seconds; hunting
LONGEST_EXIT = 10.0  # seconds that the interpreter, ending, gives to work in progress

Result = TypeVar("Result")


class Event:
    """The end of a piece of work. what: its lane and name, for whoever asks what somebody waits for."""

    def __init__(self, device: Device, what: str = ""):
        self._device, self.what, self._over = device, what, threading.Event()

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        """Until it is done. Raises what stopped the device."""
        self._over.wait()
        self._device.check()

    def settle(self) -> None:
        """Until it is done or the device has stopped; for lanes, which raise nothing."""
        self._over.wait()

    def end(self) -> None:
        self._over.set()


class Device:
    """What all devices have: a bounded arena, lanes, and the memory of the first error.

    torch_device: of tensors that modules compute with. arena_bytes: all that `allocate` will ever give, taken at once.
    timeline: where spans are noted. hunt: a seed, for the mode that looks for races. serial: everything is done when it
    is submitted, on the caller's thread. progress: changes whenever a lane or the arithmetic has finished something.
    """

    def __init__(
        self,
        torch_device: torch.device,
        arena_bytes: int,
        *,
        timeline: Timeline | None = None,
        hunt: int | None = None,
        serial: bool = False,
    ):
        self.torch_device, self.timeline, self.serial = torch_device, timeline, serial
        self.arena_bytes, self.taken = arena_bytes, 0
        self.hunting = hunt is not None
        self._draws = {lane: random.Random(f"{hunt} {lane}") for lane in ("compute", *LANES)}
        self._errors: list[BaseException] = []  # the first stopped the device
        self.progress = 0
        self._at: dict[str, tuple[str, float, Sequence[Event]]] = {}  # lane -> its work, since when, behind what
        self._arena = self._make_arena(arena_bytes)

    def _make_arena(self, nbytes: int) -> Tensor:
        memory = torch.zeros(nbytes + ALIGNMENT, dtype=torch.uint8, device=self.torch_device)
        return memory[-memory.data_ptr() % ALIGNMENT :][:nbytes]

    def allocate(self, nbytes: int) -> Tensor:
        """uint8, zero, from a multiple of 128 bytes. Raises InputError with both numbers where less is left."""
        if not nbytes:
            return self._arena[:0].data
        start = -(-self.taken // ALIGNMENT) * ALIGNMENT
        if start + nbytes > self.arena_bytes:
            left = max(0, self.arena_bytes - start)
            raise InputError(f"device memory: wanted {nbytes:,} bytes more, got {left:,} of {self.arena_bytes:,}")
        self.taken = start + nbytes
        # .data counts its versions alone: autograd must not take a change of another part for one of this.
        return self._arena[start : self.taken].data

    def check(self) -> None:
        """Raises what stopped the device, if something did."""
        if self._errors:
            raise self._errors[0]

    def submit(
        self, lane: str, what: str, work: Callable[[], None], after: Sequence[Event] = (), nbytes: int = 0
    ) -> Event:
        """Puts `work` on a lane, behind the events in `after`, all of work submitted before. nbytes: that it moves."""
        raise NotImplementedError

    def compute(
        self, what: str, work: Callable[[], Result], after: Sequence[Event] = (), flops: float = 0.0
    ) -> tuple[Result, Event]:
        """Does `work` on the caller's thread, behind `after`; returns its result and the event behind which it is
        there."""
        raise NotImplementedError

    def copy(self, there: Tensor, here: Tensor) -> None:
        """From host to device or back, within a lane's work; there when that work is done."""
        there.copy_(here)

    def number(self, value: Tensor) -> float:
        """What the arithmetic has come to, for the caller to read."""
        return float(self.numbers(value))

    def numbers(self, value: Tensor) -> np.ndarray:
        """The same of many, double, in the tensor's shape."""
        return value.double().cpu().numpy()

    def poison(self, memory: Tensor) -> None:
        """Hunting: fills released memory with NaN."""
        if self.hunting:
            memory.view(torch.uint8).fill_(255)

    def state(self) -> list[str]:
        """A line for each lane: what it is at, for how long, what it waits for, and how much waits for it."""
        return [f"{lane:9} {self._doing(lane)}; {self._queued(lane)} queued" for lane in ("compute", *LANES)]

    def settle(self) -> None:
        """Waits for everything submitted. Raises what stopped the device."""
        self.check()

    def close(self) -> None:
        """Ends the lanes, once they have settled. Raises nothing; may be called again."""

    def _want_lane(self, lane: str) -> None:
        if lane not in LANES:
            raise ValueError(f"submit: lane must be one of {', '.join(LANES)}, got {lane}")

    def _begin(self, lane: str, what: str, after: Sequence[Event]) -> None:
        self._at[lane] = what, time.monotonic(), after

    def _finish(self, lane: str) -> None:
        self._at.pop(lane, None)
        self.progress += 1

    def _doing(self, lane: str) -> str:
        if (at := self._at.get(lane)) is None:
            return "idle"
        what, since, after = at
        behind = ", ".join(event.what for event in after if not event.done)
        return f"{what}, for {time.monotonic() - since:.1f} s" + (f", behind {behind}" if behind else "")

    def _queued(self, lane: str) -> int:
        return 0

    def _delay(self, lane: str) -> None:
        if self.hunting and self._draws[lane].random() < 0.5:
            time.sleep(self._draws[lane].random() * LONGEST_DELAY)

    def _note(self, lane: str, what: str, begin: float, end: float, nbytes: int = 0, flops: float = 0.0) -> None:
        if self.timeline is not None:
            self.timeline.record(lane, what, begin, end, nbytes, flops)


class CpuDevice(Device):
    """The CPU, with a thread a lane.

    optimizer_threads: that AdamW's lane may use beside itself (default: half the cores this process may use). Copies
    take one: OpenMP's idle threads spin, and pools of several lanes on two cores cost twelve times the work.
    """

    def __init__(self, arena_bytes: int, *, optimizer_threads: int | None = None, **options):
        threads = optimizer_threads or max(1, usable_cores() // 2)
        self._start(torch.device("cpu"), arena_bytes, threads, options)

    def _start(self, torch_device: torch.device, arena_bytes: int, optimizer_threads: int, options: dict) -> None:
        super().__init__(torch_device, arena_bytes, **options)
        if optimizer_threads < 1:  # a lane's thread that dies of it would leave everyone waiting
            raise InputError(f"optimizer_threads: wanted 1 or more, got {optimizer_threads}")
        self.optimizer_threads = optimizer_threads
        self._lanes: dict[str, tuple[SimpleQueue, threading.Thread]] = {}
        self._last: dict[str, Event] = {}
        self._ended = threading.Event()
        weakref.finalize(self, _abandon, self._ended, self._lanes)

    def submit(self, lane, what, work, after=(), nbytes=0):
        self._want_lane(lane)
        self.check()
        event = Event(self, f"{lane} {what}")
        turn = (lane, what, work, tuple(after), nbytes, event)
        if self.serial:
            self._turn(*turn)
            self.check()
            return event
        if lane not in self._lanes:
            self._open(lane)
        self._lanes[lane][0].put((self, turn))
        self._last[lane] = event  # behind the put: whoever waits for it must not do so in vain after a Ctrl-C
        return event

    def compute(self, what, work, after=(), flops=0.0):
        self._begin("compute", what, after)
        try:
            for event in after:
                self._stand_behind(event)
            self.check()
            self._delay("compute")
            return self._arithmetic(what, work, flops)
        finally:
            self._finish("compute")

    def settle(self):
        for event in list(self._last.values()):
            event.settle()
        self.check()

    def close(self):
        for queue, _ in self._lanes.values():
            queue.put(None)
        for _, thread in self._lanes.values():
            thread.join()
        self._lanes.clear()

    def _stand_behind(self, event: Event) -> None:
        event.wait()

    def _arithmetic(self, what: str, work: Callable[[], Result], flops: float) -> tuple[Result, Event]:
        begin = time.perf_counter()
        result = work()
        self._note("compute", what, begin, time.perf_counter(), 0, flops)
        event = Event(self, f"compute {what}")
        event.end()
        return result, event

    def _queued(self, lane: str) -> int:
        return self._lanes[lane][0].qsize() if lane in self._lanes else 0

    def _open(self, lane: str) -> None:
        queue: SimpleQueue = SimpleQueue()
        threads = self.optimizer_threads if lane == "optimizer" else 1
        thread = threading.Thread(target=_serve, args=(queue, threads), name=f"cgpt {lane}", daemon=True)
        thread.start()
        self._lanes[lane] = queue, thread

    def _turn(self, lane: str, what: str, work: Callable[[], None], after: tuple, nbytes: int, event: Event) -> None:
        """One piece of work on its lane's thread. Whatever fails in it, waiting too, stops the device: `event` ends."""
        self._begin(lane, what, after)
        try:
            for before in after:
                before.settle()
            if not self._errors and not self._ended.is_set():
                self._delay(lane)
                begin = time.perf_counter()
                self._do(lane, work)
                self._note(lane, what, begin, time.perf_counter(), nbytes)
        except BaseException as error:  # of any kind: whoever waits must get it
            self._errors.append(error)
        finally:
            self._finish(lane)
            event.end()

    def _do(self, lane: str, work: Callable[[], None]) -> None:
        work()


def _serve(queue: SimpleQueue, threads: int) -> None:
    """A lane's thread. Idle, it refers to no device and no tensor, so that those nobody else refers to are freed."""
    _native.set_thread_count(threads)
    while (item := queue.get()) is not None:
        device, turn = item
        device._turn(*turn)
        item = device = turn = None


def _abandon(ended: threading.Event, lanes: dict[str, tuple[SimpleQueue, threading.Thread]]) -> None:
    """Ends the lanes of a device that nobody closed: it has been collected, or the interpreter ends. A thread that is
    still in native code when the interpreter is gone would abort the process, so it may end what it is at."""
    ended.set()  # what is submitted and not begun is not done
    lanes = list(lanes.values())
    for queue, _ in lanes:
        queue.put(None)
    deadline = time.monotonic() + LONGEST_EXIT
    for _, thread in lanes:
        if thread is not threading.current_thread():  # which may be who collects
            thread.join(max(0.0, deadline - time.monotonic()))


def open_device(name: str, arena_bytes: int, **options) -> Device:
    """The device torch calls `name`, "cpu", "cuda" (the current one) or "cuda:1"."""
    kind = torch.device(name)
    if kind.type == "cpu":
        return CpuDevice(arena_bytes, **options)
    from cgpt.stream.devices_cuda import CudaDevice

    index = torch.cuda.current_device() if kind.index is None else kind.index
    return CudaDevice(index, arena_bytes, **options)
