"""What this machine is, as its files tell it: system, processor, cores, memory, NVIDIA's driver. Imports no torch.

Each function answers on its own and raises what it meets; diagnostics.py turns that into a line. root: where /proc and
/sys are, for tests.
"""

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
UNLIMITED = 1 << 60  # version 1 of control groups writes a number near 2^63 where there is no limit
# What csrc/cpu is compiled for, and what a later build might want.
INSTRUCTIONS = (
    *("avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "asimd", "asimdhp", "sve", "bf16"),
)


def system() -> str:
    """The kernel, the distribution and the C library: what decides which wheels install here."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    libc = " ".join(platform.libc_ver()).strip() or "C library unknown"
    words = (f"{platform.system()} {platform.release()} {platform.machine()}", distribution, libc)
    return ", ".join(word for word in words if word)


def processor(root: Path = ROOT) -> dict[str, str]:
    """The CPU's name, and which of INSTRUCTIONS it has."""
    rows = [line.partition(":") for line in (root / "proc/cpuinfo").read_text().splitlines()]
    found = {key.strip(): value.strip() for key, _, value in reversed(rows) if key.strip()}
    has = (found.get("flags") or found.get("Features") or "").split()
    unnamed = f"{platform.machine()}, implementer {found.get('CPU implementer')}, part {found.get('CPU part')}"
    name = found.get("model name") or found.get("Processor") or unnamed
    return {"name": name, "instructions": " ".join(word for word in INSTRUCTIONS if word in has)}


def cores(root: Path = ROOT) -> dict[str, int | float | None]:
    """Of the machine, those this process may run on, and how many of them its control groups pay for, None for all."""
    quotas = [quota for folder in control_groups(root) if (quota := _quota(folder)) is not None]
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": os.cpu_count(), "allowed": allowed, "quota": min(quotas, default=None)}


def usable(allowed: int, quota: float | None) -> int:
    """Threads that this process's cores carry, as `cores` found them: one that is paid for in part carries one too."""
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def memory(root: Path = ROOT) -> dict[str, int | None]:
    """Bytes: the machine's, what is free of it, and the least that a control group allows, None for no limit."""
    rows = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    found = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) > 1}
    limits = []
    for folder in control_groups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text is not None and text.isdigit() and int(text) < UNLIMITED:
                limits.append(int(text))
    return {"total": found["MemTotal"], "free": found["MemAvailable"], "limit": min(limits, default=None)}


def driver(root: Path = ROOT, library: str = "libcuda.so.1") -> dict[str, str | list[str] | None]:
    """NVIDIA's driver: its version, the newest CUDA it runs, and its GPUs' names, without torch; None where unknown."""
    gpus = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        rows = dict(line.partition(":")[::2] for line in path.read_text().splitlines())  # a serial number is among them
        gpus.append(rows.get("Model", "unknown").strip())
    return {"version": _read(root / "sys/module/nvidia/version"), "cuda": _driver_cuda(library), "gpus": gpus}


def _driver_cuda(library: str) -> str | None:
    try:
        ask = ctypes.CDLL(library).cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    number = ctypes.c_int()
    return None if ask(ctypes.byref(number)) else f"{number.value // 1000}.{number.value % 1000 // 10}"


def control_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups, versions 1 and 2, and of those above them.

    A container may see its own group as the top and yet be told the outer path. Of version 1's controllers that share
    a folder it may be told in another order than the folder's name has, but each has a link of its own name.
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for name in dict.fromkeys([controllers, *controllers.split(",")]):
            for depth in range(len(parts), -1, -1):
                yield root.joinpath("sys/fs/cgroup", name, *parts[:depth])


def _quota(folder: Path) -> float | None:
    """Cores that a control group pays for; None without a limit."""
    text = _read(folder / "cpu.max")
    if text is None:
        text = f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
    most, _, period = text.partition(" ")
    return round(int(most) / int(period), 2) if most.isdigit() and period.isdigit() and int(period) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
