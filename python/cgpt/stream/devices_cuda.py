"""A CUDA device: a stream for each lane, held by a thread that waits for what stands before and behind its work."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from cgpt.stream.devices import CpuDevice, Device, Event


class StreamEvent(Event):
    """What has been enqueued on the compute stream by now."""

    def __init__(self, device: Device):
        super().__init__(device)
        self._recorded = torch.cuda.Event()
        self._recorded.record(torch.cuda.current_stream(device.torch_device))

    @property
    def done(self) -> bool:
        return self._recorded.query()

    def wait(self) -> None:
        self.settle()
        self._device.check()

    def settle(self) -> None:
        self._recorded.synchronize()


class CudaDevice(CpuDevice):
    """Compute is the caller's current stream, and returns as soon as the work is enqueued there.

    A lane's thread waits for its stream before it ends an event, so an event of any lane means data that is there, and
    tensors that a lane's work holds live until it is done with them.
    """

    def __init__(self, index: int, arena_bytes: int, *, optimizer_threads: int | None = None, **options):
        Device.__init__(self, torch.device("cuda", index), arena_bytes, **options)
        self.optimizer_threads = optimizer_threads or max(
            1, len(os.sched_getaffinity(0)) - 2
        )  # this thread, and copies
        self._queues, self._threads, self._last = {}, {}, {}
        self._streams: dict[str, torch.cuda.Stream] = {}

    def copy(self, there, here):
        there.copy_(here, non_blocking=True)

    def settle(self):
        super().settle()
        torch.cuda.current_stream(self.torch_device).synchronize()

    def _computed(self) -> Event:
        return StreamEvent(self)

    def _do(self, lane: str, what: str, work: Callable[[], None], nbytes: int) -> None:
        if lane not in self._streams:
            self._streams[lane] = torch.cuda.Stream(self.torch_device)

        def enqueue() -> None:
            with torch.cuda.stream(self._streams[lane]):
                work()
            self._streams[lane].synchronize()

        super()._do(lane, what, enqueue, nbytes)
