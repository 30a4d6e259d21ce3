"""How much memory there is: budgets as they are asked for, and what the machine and its rules leave to this process.

free memory of the machine     /proc/meminfo, MemAvailable
control groups, v1 and v2      limit - usage + page cache that can be dropped, of the group and all above it
RLIMIT_AS, RLIMIT_DATA         soft limit - what is mapped already
RLIMIT_MEMLOCK                 bounds pinned memory alone
"""

from __future__ import annotations

import contextlib
import math
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cgpt.errors import InputError

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{i}B": (1024 if i else 1000) ** power for power, prefix in enumerate("KMGTP", start=1) for i in ("", "i")
}
UNLIMITED = 1 << 60  # version 1 of control groups writes a number near 2^63 where there is no limit


@dataclass(frozen=True)
class Budgets:
    """Bytes that a run may take of each tier, and the folder or file of the last."""

    device: int
    host: int
    disk: int = 0
    disk_path: Path | None = None


@dataclass(frozen=True)
class Limits:
    """found: bytes left by name of the rule. pinned: what RLIMIT_MEMLOCK allows, None for no limit."""

    found: dict[str, int]
    pinned: int | None = None

    @property
    def host(self) -> int | None:
        """Bytes of host memory that are left; None where nothing says so."""
        return min(self.found.values(), default=None)

    @property
    def binding(self) -> str | None:
        """The rule that leaves least."""
        return min(self.found, key=self.found.get, default=None)


def parse_bytes(text: str, what: str = "bytes") -> int:
    """Reads "4GiB", "80GB", "1.5 TB" or "4096". Raises InputError, naming `what`, for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if not match or match[2].lower() not in units:
        raise InputError(f"{what}: wanted a size such as 4GiB or 80GB, got {text!r}")
    return int(float(match[1]) * units[match[2].lower()])


def bytes_text(nbytes: float, up: bool = False) -> str:
    """Two decimals and a binary unit. up: rounded up, so that granting what is printed is enough."""
    power = max((p for p in range(5) if nbytes >= 1024**p), default=0)
    scaled = nbytes / 1024**power * 100
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{(math.ceil(scaled) if up else math.floor(scaled)) / 100:.{2 if power else 0}f} {unit}"


def limits(root: Path = Path("/"), getrlimit=resource.getrlimit) -> Limits:
    """What this process may still take of the host. root: where /proc and /sys are."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found["free memory"] = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    groups = dict(_groups(root))
    if groups:
        name = min(groups, key=groups.get)
        found[name] = groups[name]
    mapped, data = _mapped(root)
    for name, kind, taken in (("RLIMIT_AS", resource.RLIMIT_AS, mapped), ("RLIMIT_DATA", resource.RLIMIT_DATA, data)):
        soft, _ = getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            found[name] = max(0, soft - taken)
    pinned, _ = getrlimit(resource.RLIMIT_MEMLOCK)
    return Limits(found, None if pinned == resource.RLIM_INFINITY else pinned)


def _groups(root: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes left) of every control group above this process that limits its memory."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from _above(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                yield from _above(root / "sys/fs/cgroup/memory", path, *names)


def _above(top: Path, path: str, limit: str, usage: str, cache: str) -> Iterator[tuple[str, int]]:
    """A group and its parents. A container may see its own group as the top and yet be told the outer path."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = top.joinpath(*parts[:depth])
        with contextlib.suppress(OSError, ValueError):
            most = int((folder / limit).read_text())  # "max": no limit
            if most < UNLIMITED:
                taken = int((folder / usage).read_text()) - _stat(folder / "memory.stat", cache)
                yield f"control group /{'/'.join(parts[:depth])}", max(0, most - taken)


def _stat(path: Path, key: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return next((int(x.split()[1]) for x in path.read_text().splitlines() if x.split()[0] == key), 0)
    return 0


def _mapped(root: Path) -> tuple[int, int]:
    """Bytes of address space and of data that this process has."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = (root / "proc/self/statm").read_text().split()
        return int(words[0]) * resource.getpagesize(), int(words[5]) * resource.getpagesize()
    return 0, 0
