"""Memory of the host and the disk behind it, each taken once, at its exact size, before training begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cgpt.errors import InputError
from cgpt_ext import _native


class HostMemory:
    """One stretch of host memory, handed out from its start while the run is being built.

    device: that copies go to. Memory is registered with a CUDA device, so that they run beside the arithmetic. Where
    the driver or RLIMIT_MEMLOCK allows less, copies of the rest still come out right, at the speed of the driver's own
    staging; `why_not_pinned` says why.
    """

    def __init__(self, nbytes: int, device: torch.device | None = None):
        self.nbytes, self.taken = nbytes, 0
        self.why_not_pinned: str | None = None
        if not nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)
            return
        arena = _native.HostArena(nbytes)
        if device is not None and device.type == "cuda":
            arena.register_cuda(torch.cuda.current_device() if device.index is None else device.index)
            self.why_not_pinned = arena.why_not_pinned
        self._memory = torch.frombuffer(arena, dtype=torch.uint8)

    def allocate(self, nbytes: int) -> Tensor:
        """uint8, zero. Raises InputError with both numbers where less is left."""
        left = self.nbytes - self.taken
        if nbytes > left:
            raise InputError(f"host memory: wanted {nbytes:,} bytes more, got {left:,} of {self.nbytes:,}")
        self.taken += nbytes
        # .data counts its versions alone: autograd must not take a change of another part for one of this.
        return self._memory[self.taken - nbytes : self.taken].data


class DiskTier:
    """A file that holds `nbytes` of records while training runs.

    path: a folder, or the name of a new file. It is unlinked as soon as it is open: the space comes back however the
    process ends, and nobody takes a half-updated state for a checkpoint. Raises OSError (no room, no such folder).
    """

    def __init__(self, path: str | Path, nbytes: int):
        path = Path(path)
        if path.is_dir():
            path = path / f"cgpt-state-{os.getpid()}.tmp"
        self.path, self.nbytes = path, nbytes
        if path.exists():
            raise InputError(f"{path}: wanted a folder or a new file for training state, got a file")
        self._file = _native.DiskFile(path, nbytes, "cgpt training state")
        path.unlink()
        self.direct, self.why_buffered = self._file.direct, self._file.why_buffered

    def reader(self, offset: int, memory: Tensor) -> Callable[[], None]:
        """What fills `memory` (uint8, on the host) from `offset` when called."""
        view = memory.numpy()
        return lambda: self._file.read(offset, view)

    def writer(self, offset: int, memory: Tensor) -> Callable[[], None]:
        """What writes `memory` at `offset` when called."""
        view = memory.numpy()
        return lambda: self._file.write(offset, view)

    def close(self) -> None:
        self._file.close()
