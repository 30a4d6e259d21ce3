"""What commands that read a trained run are asked: which, and where it may live. Imports no torch: --help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cgpt.stream.limits import parse_bytes
from cgpt.train_flags import Folder, Text

if TYPE_CHECKING:
    from cgpt.placing import Room

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Device = Annotated[Literal["cpu", "cuda"], tyro.conf.arg(metavar="{cpu,cuda}")]


@dataclass(frozen=True)
class Read:
    """Which trained run is read, and where its layers live meanwhile: on the device if all of them fit."""

    run: Run
    """A run folder, as `cgpt train` leaves it."""
    device: Device = "cpu"
    """Where to compute."""
    device_memory: Text = None
    """Of the device, as 4GiB (default: all that is free); the other layers stream from the host. On a CPU, a stretch of
    memory that stands for a device's."""
    host_memory: Text = None
    """Of the host, on a CPU of the whole process (default: all that is free)."""
    disk: Folder = None
    """For layers that the host has no room for either; what is written there is gone at the end."""

    def room(self) -> Room:
        """The flags as placing reads them. Raises InputError for what is no size."""
        from cgpt.placing import Room

        device = self.device_memory and parse_bytes(self.device_memory, "--device-memory")
        host = self.host_memory and parse_bytes(self.host_memory, "--host-memory")
        return Room(self.device, device, host, self.disk and str(self.disk))
