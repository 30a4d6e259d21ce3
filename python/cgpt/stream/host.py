"""Memory of the host and the disk behind it, each allocated once at its exact size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cgpt.errors import InputError


class HostMemory:
    """One stretch of host memory that is handed out from its start, and only while the run is being built."""

    def __init__(self, nbytes: int, pinned: bool = False):
        self.nbytes, self.taken = nbytes, 0
        self._memory = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)

    def allocate(self, nbytes: int) -> Tensor:
        """uint8, zero. Raises InputError with both numbers where less is left."""
        if nbytes > self.nbytes - self.taken:
            raise InputError(
                f"host memory: wanted {nbytes} bytes more, got {self.nbytes - self.taken} of {self.nbytes}"
            )
        self.taken += nbytes
        return self._memory[self.taken - nbytes : self.taken].data


class DiskTier:
    """A file of fixed size that holds records."""

    def __init__(self, path: str, nbytes: int):
        self.path, self.nbytes = Path(path), nbytes
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.posix_fallocate(self._file, 0, nbytes)

    def reader(self, offset: int, memory: Tensor) -> Callable[[], None]:
        """What fills `memory` from `offset` when called."""
        view = memoryview(memory.numpy())

        def read() -> None:
            done = 0
            while done < len(view):
                done += os.preadv(self._file, [view[done:]], offset + done)

        return read

    def writer(self, offset: int, memory: Tensor) -> Callable[[], None]:
        """What writes `memory` at `offset` when called."""
        view = memoryview(memory.numpy())

        def write() -> None:
            done = 0
            while done < len(view):
                done += os.pwritev(self._file, [view[done:]], offset + done)

        return write
